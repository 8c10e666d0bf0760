"""The pictures of an evaluation under load. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpkit.judge.evaluation.fixed import called
from bpkit.judge.load.setup import BOUNDS, CONCURRENCY, POLICIES
from bpkit.judge.load.tables import RATIO, title
from bpkit.judge.pictures import ABOVE, DOMAINS, FIXED, LINES, ORACLE, draw, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEST = "best fixed size"


def plot_load_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a picture of speed by load. The suffix says the format. Raises ValueError if no load was finished."""
    if not report["loads"]:
        raise ValueError(f"{path}: no load was finished, so that there is nothing to draw")
    ratios(report["loads"]).savefig(path, dpi=150)


def closed(loads: Mapping[str, Any]) -> dict[int, Any]:
    """The loads of constant concurrency, by rows."""
    return {load["rows"]: load for load in loads.values() if load["kind"] == CONCURRENCY}


def ratios(loads: Mapping[str, Any]) -> Figure:
    """Tokens/s over the best fixed size by load, with intervals; concurrency on a logarithmic axis."""
    by_rows = closed(loads)
    others = [load for load in loads.values() if load["kind"] != CONCURRENCY]
    figure, axes = draw(4.2)
    places = {id(load): float(rows) for rows, load in by_rows.items()}
    last = max(by_rows, default=0.5)
    places |= {id(load): last * 4.0 ** (number + 1) for number, load in enumerate(others)}
    for (name, group), style in zip(_who(loads), itertools.cycle(_styles()), strict=False):
        entries = [(places[id(load)], load[group][name]) for load in loads.values()]
        style = {"color": ORACLE, "ls": ":"} if group == BOUNDS else style
        line = [(at, entry[RATIO]) for at, entry in entries if at <= last]
        axes.plot(*zip(*line, strict=True) if line else ([], []), marker="o", ms=4, label=short(name), **style)
        for at, entry in entries:
            if entry["interval"] is not None:
                axes.plot([at, at], entry["interval"], color=style["color"], lw=3, alpha=0.3, solid_capstyle="butt")
            if at > last:
                axes.plot([at], [entry[RATIO]], "o", color=style["color"], ms=5)
    axes.axhline(1, color=FIXED, lw=1.5)
    axes.set_xscale("log", base=2)
    labels = [f"{rows}\n{called(load['best_fixed'])}" for rows, load in by_rows.items()]
    labels += [f"{_briefly(load)}\n{called(load['best_fixed'])}" for load in others]
    axes.set_xticks(list(places.values()), labels)
    axes.minorticks_off()
    axes.set_xlabel("rows at once; below: best fixed block size there")
    axes.set_ylabel("tokens/s over the best fixed size")
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.legend(ncols=2, **ABOVE)
    return figure


def _briefly(load: Mapping[str, Any]) -> str:
    """The title of a load; of one that changes its first, most and last rows."""
    levels = load.get("levels")
    return f"{levels[0]} to {max(levels)} to {levels[-1]}" if levels else title(load)


def latencies(loads: Mapping[str, Any], factor: float, unit: str) -> Figure:
    """Time per output token against throughput: a curve for each policy, a point for each number of rows."""
    by_rows = closed(loads)
    figure, (middle, tail) = draw(6.0, rows=2, sharex=True)
    curves: list[tuple[str, list[Any], dict[str, Any]]] = [
        (BEST, [load["best_fixed"] for load in by_rows.values()], {"color": FIXED, "ls": "-"})
    ]
    for (name, group), style in zip(_who(loads), itertools.cycle(_styles()), strict=False):
        if group == POLICIES:
            curves.append((name, [load[POLICIES][name] for load in by_rows.values()], style))
    for name, entries, style in curves:
        for axes, which in ((middle, "p50"), (tail, "p99")):
            points = [(entry["tokens_per_second"], factor * entry["tpot"][which]) for entry in entries if entry["tpot"]]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=short(name), **style)
            axes.set_ylabel(f"{unit} per token, {which}")
    tail.set_xlabel("tokens/s of the engine; points: rows at once")
    middle.legend(ncols=2, **ABOVE)
    return figure


def acceptance(loads: Mapping[str, Any]) -> Figure:
    """Acceptance by position at the smallest and the largest number of rows."""
    by_rows = closed(loads) or dict(enumerate(loads.values()))
    ends = list(dict.fromkeys((min(by_rows), max(by_rows))))
    figure, axes = draw(1.2 + 2.6 * len(ends), rows=len(ends), sharex=True, squeeze=False)
    for (one,), rows in zip(axes, ends, strict=True):
        load = by_rows[rows]
        shown = [(BEST, load["best_fixed"], {"color": FIXED, "ls": "-"})]
        shown += [
            (name, load[POLICIES][name], style)
            for name, style in zip(load[POLICIES], itertools.cycle(_styles()), strict=False)
        ]
        for name, entry, style in shown:
            values = entry["acceptance_by_position"]
            one.plot(range(1, len(values) + 1), values, marker="o", ms=4, label=short(name), **style)
        one.set_ylim(0, 1.02)
        one.set_ylabel(f"accepted,\n{title(load)}")
    axes[-1][0].set_xlabel("position in the draft")
    axes[-1][0].locator_params(axis="x", integer=True)
    axes[0][0].legend(ncols=2, **ABOVE)
    return figure


def rows_over_time(load: Mapping[str, Any]) -> Figure:
    """Rows and tokens over time while a load changes, of one seed."""
    figure, (rows, tokens) = draw(5.0, rows=2, sharex=True)
    best = called(load["best_fixed"])
    colours = itertools.cycle(_styles())
    for name, course in load["rows_over_time"].items():
        style = {"color": FIXED, "ls": "-"} if name == best else next(colours)
        said = f"{BEST}: {best}" if name == best else short(name)
        rows.step(course["time"], course["rows"], where="pre", lw=1.2, **style)
        tokens.plot(course["time"], course["tokens"], label=said, **style)
    rows.set_ylabel("rows that run")
    tokens.set_ylabel("tokens so far")
    tokens.set_xlabel("seconds")
    tokens.legend(frameon=False, fontsize=10)
    return figure


def _who(loads: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Policies, then bounds: name and group."""
    first = next(iter(loads.values()))
    return [(name, group) for group in (POLICIES, BOUNDS) for name in first[group]]


def _styles() -> list[dict[str, Any]]:
    """Of lines, as many as can be told apart; the colour of the best fixed size is not among them."""
    return [{"color": colour, "ls": line} for line in LINES for colour in DOMAINS if colour != FIXED]
