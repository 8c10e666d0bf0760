"""The pictures of an evaluation. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bpkit.judge.evaluation.figures import REASON
from bpkit.judge.evaluation.fixed import called
from bpkit.judge.evaluation.tables import LOST, RATIO, bounds, compared, lost, lost_titles
from bpkit.judge.pictures import ABOVE, DOMAINS, FIXED, INK, LINES, ORACLE, POLICY, draw, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def acceptance_lengths(result: Mapping[str, Any]) -> Figure:
    """Acceptance length by fixed block size: a line for each domain, and source, with 95% intervals."""
    figure, axes = draw(3.6)
    groups = {"all": result["overall"]} | (result["domains"] if len(result["domains"]) > 1 else {})
    ticks = set[int]()
    for number, (title, group) in enumerate(groups.items()):
        for style, (source, entries) in zip(itertools.cycle(LINES), _by_source(group).items(), strict=False):
            sizes = list(entries)
            values = [e["acceptance_length"] for e in entries.values()]
            low, high = zip(*(e["acceptance_length_interval"] for e in entries.values()), strict=True)
            colour = INK if title == "all" else DOMAINS[(number - 1) % len(DOMAINS)]
            said, width = f"{title}, {source}" if source else title, 2.2 if title == "all" else 1.5
            axes.plot(sizes, values, f"o{style}", color=colour, ms=4, lw=width, label=said)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.13, lw=0)
            ticks.update(sizes)
    axes.set_xlabel("block size (1: no drafting)")
    axes.set_ylabel("acceptance length")
    axes.set_xticks(_ticks(list(ticks)))
    axes.set_ylim(bottom=0.9)
    axes.legend(frameon=False, ncols=2, fontsize=10)
    return figure


def _by_source(group: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Fixed sizes by source, each with plain decoding; without a name if there is one source only."""
    if "best_fixed_of_source" not in group:
        return {"": {int(size): entry for size, entry in group["fixed"].items()}}
    entries = group["fixed"].values()
    return {
        source: {e["block_size"]: e for e in entries if e["source"] in (None, source)}
        for source in group["best_fixed_of_source"]
    }


def cost_curves(result: Mapping[str, Any]) -> Figure:
    """What a step costs by block size: its parts and the whole, as the staircases that they are."""
    by_source = result.get("curves_of_source", {"": result["curves"]})
    seconds = result["unit"] == "seconds"
    factor = 1e3 if seconds else 1.0
    figure, axes = draw(3.3)
    for style, (source, curves) in zip(itertools.cycle(LINES), by_source.items(), strict=False):
        for name, colour, width in (("step", INK, 3.5), ("verify", DOMAINS[0], 1.6), ("draft", DOMAINS[1], 1.6)):
            values = [factor * value for value in curves[name]]
            said = f"{name}, {source}" if source else name
            line, points = (said, None) if source else (None, said)
            axes.step(curves["block_size"], values, style, where="pre", color=colour, lw=width, label=line)
            axes.plot(curves["block_size"], values, "o", color=colour, ms=4, label=points, clip_on=False)
    axes.set_xlabel("block size, the whole draft verified")
    axes.set_ylabel("milliseconds" if seconds else "plain steps")
    axes.set_xticks(_ticks(list({size for curves in by_source.values() for size in curves["block_size"]})))
    axes.set_ylim(bottom=0)
    axes.legend(ncols=3, **ABOVE)
    return figure


def ratios(group: Mapping[str, Any]) -> Figure:
    """Tokens/s over the best fixed size: the policies close up, and below the bounds on their own scale."""
    policies = {name: entry[RATIO] for name, entry in group["policies"].items()}
    hindsight = {name: entry[RATIO] for name, entry in bounds(group).items()}
    heights = [max(1, len(policies)), len(hindsight)]
    figure, (near, far) = draw(2.0 + 0.34 * sum(heights), rows=2, height_ratios=heights)
    _forest(near, policies, POLICY)
    _forest(far, hindsight, ORACLE)
    spans = [x for entry in policies.values() for x in (entry["value"], *entry["interval"])]
    if spans:
        far.axvspan(min(spans), max(spans), color=POLICY, alpha=0.2, lw=0)
    best = called(group["best_fixed"])
    near.set_title(f"policies (line: best fixed size, {best})", loc="left", fontsize=10, color=POLICY)
    far.set_title("bounds: chosen with hindsight (band: the policies)", loc="left", fontsize=10, color=INK)
    far.set_xlabel("tokens/s over those of the best fixed size")
    return figure


def _forest(axes: Any, entries: Mapping[str, Any], colour: str) -> None:
    """A row for each entry: value and interval; a line at 1."""
    for row, entry in enumerate(entries.values()):
        axes.plot(entry["interval"], [row, row], color=colour, lw=3, alpha=0.45, solid_capstyle="butt")
        axes.plot([entry["value"]], [row], "o", color=colour, ms=6)
    axes.axvline(1, color=FIXED, lw=1.5)
    axes.set_yticks(range(len(entries)), list(map(short, entries)))
    axes.set_ylim(max(1, len(entries)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)


LOST_COLOURS = dict(zip((*LOST.values(), "deciding"), (*DOMAINS[:5], ORACLE), strict=True))


def regrets(group: Mapping[str, Any]) -> Figure:
    """Of each one's time, what the step oracle does not take: a bar for the best fixed size and for each policy."""
    known = {who: lost(e["regret"]) for who, e in compared(group).items() if REASON not in e["regret"]}
    figure, axes = draw(1.8 + 0.36 * len(known))
    left = [0.0] * len(known)
    for title in lost_titles(group):
        values = [percents[title] for percents in known.values()]
        axes.barh(range(len(known)), values, left=left, height=0.7, color=LOST_COLOURS[title], label=title)
        left = [before + value for before, value in zip(left, values, strict=True)]
    axes.set_yticks(range(len(known)), list(map(short, known)))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of one's own time")
    axes.legend(ncols=2, **ABOVE)
    return figure


def choices(result: Mapping[str, Any]) -> Figure:
    """By stretch of the output: how often the step oracle differs from the best fixed size, and what it chooses."""
    import matplotlib as mpl

    chosen = result["oracle_choices"]
    stretches = chosen["positions"]
    largest = max(int(size) for size in chosen["block_size"])
    colours = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, largest), "viridis_r")
    figure, (differs, sizes, lengths) = draw(6.6, rows=3, height_ratios=(2, 3, 3), sharex=True)
    of = (("block_size", "block size", POLICY), ("verify_length", "verify length", FIXED), ("source", "source", INK))
    for name, label, colour in of:
        if name not in chosen["differs"]:
            continue
        values = [100 * stretch["differs"][name] for stretch in stretches]
        differs.plot(range(len(stretches)), values, "o-", color=colour, label=label)
    differs.set_ylim(0, 105)
    other = "" if "source" in chosen["differs"] else "size "
    differs.set_ylabel(f"% that differ\nfrom {other}{chosen['best_fixed']}")
    differs.legend(ncols=3, **ABOVE)
    _shares(sizes, stretches, "block_size", colours)
    sizes.set_ylabel("block size,\n% of steps")
    _shares(lengths, stretches, "verify_length", colours)
    lengths.set_ylabel("verify length,\n% of steps")
    spans = [f"{s['start']}-{s['end'] - 1}" for s in stretches]
    lengths.set_xticks(range(len(stretches)), spans, rotation=30, ha="right")
    lengths.set_xlabel("output tokens before the step")
    bar = figure.colorbar(colours, ax=[sizes, lengths], aspect=30, fraction=0.05)
    bar.set_label("block size; drafted tokens verified")
    bar.locator = mpl.ticker.MaxNLocator(integer=True)
    bar.update_ticks()
    return figure


def _shares(axes: Any, stretches: Sequence[Mapping[str, Any]], name: str, colours: Any) -> None:
    """Stacked shares of steps by value, a bar for each stretch."""
    bottom = [0.0] * len(stretches)
    for value in sorted({int(key) for stretch in stretches for key in stretch[name]}):
        parts = [100 * stretch[name].get(str(value), 0) / stretch["steps"] for stretch in stretches]
        colour = colours.to_rgba(value)
        axes.bar(range(len(stretches)), parts, bottom=bottom, width=0.85, color=colour, edgecolor="white", lw=0.4)
        bottom = [below + part for below, part in zip(bottom, parts, strict=True)]
    axes.set_ylim(0, 100)


def _ticks(sizes: list[int]) -> list[int]:
    """Block sizes to be named on an axis, none too near to the one before it."""
    gap = max(1, round((max(sizes) - min(sizes)) / 12))
    kept: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not kept or kept[-1] - size >= gap:
            kept.append(size)
    return sorted(kept)
