"""A sweep's figures on the terminal and as a picture: tables, and a sentence for each figure on what it means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences
from bpkit.sizes import format_sizes
from recipes.sweep.read import Sweep

NOISE_ALIKE = 2.0
"""Sizes whose noise differs by more than this factor are not interchangeable: the shuffle then overstates chance."""
_UNITS = {"acceptance_length": "acceptance length", "tokens_per_second": "tokens/s"}


def print_sweep(report: Mapping[str, Any], console: Console) -> None:
    """Print the means by size, the figures of each group, and what they say."""
    console.print(_by_size(report))
    console.print(_figures(groups(report), report["figure"]))
    title, group = main_group(report)
    print_sentences(sentences(title, group, report["figure"]), console)


def groups(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups by title: all sizes, those asked for, and the domains."""
    titled = {f"all sizes ({len(report['all']['sizes'])})": report["all"]}
    if report["chosen"] is not None:
        titled[f"sizes {format_sizes(report['chosen']['sizes'])}"] = report["chosen"]
    return {**titled, **(report["domains"] or {})}


def main_group(report: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The group that the sentences are about: the sizes asked for, else all."""
    group = report["chosen"] or report["all"]
    return f"sizes {format_sizes(group['sizes'])}", group


def _by_size(report: Mapping[str, Any]) -> Table:
    figure, best = _UNITS[report["figure"]], str(report["all"]["best_fixed"]["block_size"])
    rows = [
        TableRow((size, f"{e['value']:.2f}", bracketed(e["interval"], ".2f")), "green" if size == best else None)
        for size, e in report["by_size"].items()
    ]
    return Table(f"{figure}, mean over {report['prompts']} prompts", ("block size", figure, "95% interval"), [rows])


def _figures(shown: Mapping[str, Mapping[str, Any]], figure: str) -> Table:
    head = ("", *(f"{title}\n{group['prompts']} prompts" for title, group in shown.items()))
    rows = {
        f"best fixed size, in sample ({_UNITS[figure]})": [
            f"{g['best_fixed']['value']:.2f} at {g['best_fixed']['block_size']}" for g in shown.values()
        ],
        "size best on the other prompts (leave-one-out)": [_with_gain(g["leave_one_out"]) for g in shown.values()],
        "in-sample oracle per prompt (a bound)": [_with_gain(g["oracle"]) for g in shown.values()],
        "the same where no prompt prefers any size": [_with_gain(g["chance"]) for g in shown.values()],
        "p-value of that oracle": [f"{g['chance']['p_value']:.3f}" for g in shown.values()],
        "chosen by neighbouring sizes: gain": [_neighbours(g["neighbours"]) for g in shown.values()],
        "p-value of that gain": [
            "-" if g["neighbours"] is None else f"{g['neighbours']['p_value']:.4f}" for g in shown.values()
        ],
    }
    return Table("choosing a size", head, [[TableRow((name, *cells)) for name, cells in rows.items()]])


def _with_gain(entry: Mapping[str, Any]) -> str:
    return f"{entry['value']:.2f}, {_gain(entry)}"


def _gain(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['gain']:+.2f}% {bracketed([100 * x for x in entry['gain_interval']], '+.2f')}"


def _neighbours(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None else _gain(entry)


def sentences(title: str, group: Mapping[str, Any], figure: str) -> list[str]:
    """What the figures of a group mean, one sentence or two each."""
    best, honest, oracle, chance = (group[key] for key in ("best_fixed", "leave_one_out", "oracle", "chance"))
    taken = ", ".join(f"{size} for {count}" for size, count in honest["block_sizes"].items())
    said = [
        f"Of {title}; means over prompts of each prompt's own {_UNITS[figure]}; in brackets 95% intervals.",
        f"Best fixed: size {best['block_size']} has the highest mean, {best['value']:.2f}, on the prompts it was "
        "chosen on.",
        f"Leave-one-out: with the size that is best on the other prompts ({taken}), a prompt gets "
        f"{honest['value']:.2f}: what one size for all gives on a prompt that had no say in it.",
        f"The oracle, {oracle['value']:.2f}, is a bound and no policy: it takes for each prompt the size that measured "
        f"best on that prompt, luck included. It is {100 * oracle['gain']:+.2f}% over the best fixed size.",
        f"Where no prompt prefers any size, the same arithmetic gives {100 * chance['gain']:+.2f}% "
        f"{bracketed([100 * x for x in chance['gain_interval']], '+.2f')}: {_against_luck(chance['p_value'])}.",
        _about_neighbours(group["neighbours"]),
    ]
    ratio = chance["spread_ratio"]
    if ratio is None or ratio > NOISE_ALIKE:
        by = "unboundedly" if ratio is None else f"by a factor of {ratio:.1f}"
        said.append(
            f"Care: the sizes differ in noise {by}, so shuffling between them overstates what chance gives; look at "
            "sizes near each other with --sizes."
        )
    if figure == "acceptance_length":
        said.append("More accepted is not faster: larger blocks cost more to draft and verify, which this table omits.")
    return said


def _against_luck(p_value: float) -> str:
    if p_value > 0.05:
        return f"the oracle's gain is no more than luck gives (p = {p_value:.3f})"
    return (
        f"the oracle's gain is more than luck gives (p = {p_value:.4f}), by the difference and not by the whole of it"
    )


def _about_neighbours(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "Choosing by neighbouring sizes takes four sizes and three prompts; there are fewer."
    more = "more" if entry["p_value"] <= 0.05 else "no more"
    return (
        f"Chosen per prompt by what the sizes next to it did on that prompt, and scored by its own value, a size gives "
        f"{_gain(entry)} over the size best on the other prompts: {more} than without preferences "
        f"({100 * entry['chance_gain']:+.2f}%, p = {entry['p_value']:.4f}). It takes running the prompt at those sizes "
        "first, which a policy cannot do."
    )


# The picture


def plot_sweep(sweep: Sweep, report: Mapping[str, Any], path: Path) -> None:
    """Curves of all prompts with their mean, and the oracle's gain beside what chance gives. Needs matplotlib."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, gains = figure.subplots(1, 2, width_ratios=(3, 2))
    title, group = main_group(report)
    _curves(curves, sweep, report, group)
    _gains(gains, title, group)
    figure.savefig(path, dpi=150)


def _curves(axes: Any, sweep: Sweep, report: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """A thin line for each prompt, the mean with its interval, and a dot at each prompt's best of the group's sizes."""
    axes.plot(sweep.sizes, sweep.values.T, color="#bbbbbb", lw=0.6)
    part = sweep.at(group["sizes"])
    axes.plot(
        part.sizes[part.values.argmax(axis=1)],
        part.values.max(axis=1),
        "o",
        ms=3,
        color="#ee6677",
        label="each prompt's best (in sample)",
    )
    entries = list(report["by_size"].values())
    mean, (low, high) = [e["value"] for e in entries], np.array([e["interval"] for e in entries]).T
    axes.fill_between(sweep.sizes, low, high, color="#4477aa", alpha=0.3, lw=0)
    axes.plot(sweep.sizes, mean, "o-", ms=3, color="#4477aa", label="mean over prompts (95%)")
    axes.set_xlabel("block size")
    axes.set_ylabel(_UNITS[report["figure"]])
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _gains(axes: Any, title: str, group: Mapping[str, Any]) -> None:
    """Gains over one size for all, as dots with intervals."""
    rows = [
        ("oracle, in sample\n(a bound)", group["oracle"]["gain"], group["oracle"]["gain_interval"]),
        ("oracle, no prompt\nprefers any size", group["chance"]["gain"], group["chance"]["gain_interval"]),
    ]
    near = group["neighbours"]
    if near is not None:
        rows += [
            ("chosen by\nneighbouring sizes", near["gain"], near["gain_interval"]),
            ("the same without\npreferences", near["chance_gain"], near["chance_interval"]),
        ]
    for place, (_, gain, (low, high)) in enumerate(rows):
        colour = "#4477aa" if place % 2 == 0 else "#888888"
        axes.plot([100 * low, 100 * high], [place, place], color=colour, lw=2)
        axes.plot([100 * gain], [place], "o", color=colour)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel(f"gain over one size for all (%), {title}")
    axes.spines[["top", "right"]].set_visible(False)
