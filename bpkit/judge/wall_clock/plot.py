"""A picture of a report: speed by decoder and domain, and where the time goes. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpkit.judge.wall_clock.report import PHASES, entries, groups

COLOURS = tuple(f"C{i}" for i in range(10) if i != 7)  # C7 is grey, as plain decoding is
PHASE_COLOURS = ("#4477aa", "#ee6677", "#ccbb44", "#bbbbbb")


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Write the picture; the suffix says the format."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    figure = Figure(figsize=(11, 8), layout="constrained")
    speed, share = figure.subplots(2, 1, height_ratios=(3, 2))
    _speeds(speed, report)
    _shares(share, report["overall"])
    settings, machine = report["settings"], report["machine"]
    figure.suptitle(
        f"{settings['target']} with {settings['drafter']} on {machine['gpu'] or machine['cpu']}, "
        f"{report['overall']['prompts']} prompts",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _bars(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"plain": group["plain"], **entries(group)}


def _speeds(axes: Any, report: dict[str, Any]) -> None:
    """Tokens per second, a cluster of bars for each group, with 95% intervals."""
    shown = groups(report)
    names = list(_bars(report["overall"]))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        bars = [_bars(group)[name] for group in shown.values()]
        rates = [bar["tokens_per_second"] for bar in bars]
        # A ratio of sums may lie outside its bootstrap interval when there are very few prompts.
        low = [max(r - b["tokens_per_second_interval"][0], 0) for r, b in zip(rates, bars, strict=True)]
        high = [max(b["tokens_per_second_interval"][1] - r, 0) for r, b in zip(rates, bars, strict=True)]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(shown))]
        colour = "#888888" if name == "plain" else COLOURS[(i - 1) % len(COLOURS)]
        axes.bar(places, rates, width * 0.92, yerr=[low, high], label=name, color=colour, error_kw={"lw": 1})
    axes.set_xticks(range(len(shown)), [f"{title}\n({group['prompts']} prompts)" for title, group in shown.items()])
    axes.set_ylabel("tokens/s (95% interval over prompts)")
    axes.legend(fontsize=8, ncols=min(len(names), 6), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _shares(axes: Any, group: dict[str, Any]) -> None:
    """Shares of the wall-clock time, a stacked bar for each decoder that tells them apart."""
    bars = {name: bar["share"] for name, bar in _bars(group).items() if bar["share"] is not None}
    left = [0.0] * len(bars)
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        widths = [100 * share[phase] for share in bars.values()]
        axes.barh(list(bars), widths, left=left, label=phase, color=colour)
        left = [x + w for x, w in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of wall-clock time, overall (%)")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
