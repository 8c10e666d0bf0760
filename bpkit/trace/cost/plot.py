"""A picture of a cost table: what drafts, target passes and whole steps cost by size, as the staircases they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bpkit.trace.cost.table import CostTable

MOST_CONTEXTS = 4
COLOURS = ("#88ccee", "#4477aa", "#225588", "#112244")


def plot_cost(cost: CostTable, path: Path) -> None:
    """Write the picture; the suffix says the format. Needs matplotlib."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    figure = Figure(figsize=(15 if cost.rows else 11, 4.2), layout="constrained")
    phases, pays, *of_rows = figure.subplots(1, 3 if cost.rows else 2, width_ratios=(3, 2, 2) if cost.rows else (3, 2))
    sizes = range(1, min(cost.largest_width, cost.largest_block_size or cost.largest_width) + 1)
    _phases(phases, cost, sizes)
    _break_even(pays, cost, sizes)
    for axes in of_rows:
        _by_rows(axes, cost, sizes)
    for axes in (phases, pays, *of_rows):
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{cost.name}: {cost.description}" if len(cost.description) < 100 else cost.name, fontsize=10)
    figure.savefig(path, dpi=150)


def _phases(axes: Any, cost: CostTable, sizes: range) -> None:
    """Drafts by block size, target passes by width, and a whole step at the context length in the middle."""
    scale, unit = _unit(cost)
    plain, widths = cost.verify[1], range(1, cost.largest_width + 1)
    contexts = sorted(plain) if isinstance(plain, dict) else [0]
    contexts = contexts[:: -(-len(contexts) // MOST_CONTEXTS)]  # no more than can be told apart

    def draw(places: range, seconds: Callable[[int], float], colour: str, label: str) -> None:
        values = [scale * seconds(place) for place in places]
        axes.step(places, values, where="pre", marker=".", color=colour, label=label)

    for colour, context in zip(COLOURS, contexts, strict=False):
        label = f"verify, context {context}" if len(contexts) > 1 else "verify"
        draw(widths, partial(cost.seconds, "verify", context_length=context), colour, label)
    draw(sizes, partial(cost.seconds, "draft", context_length=0), "#ee6677", "draft")
    draw(sizes, cost.step, "#333333", "step of a fixed block size")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="block size; positions verified", ylabel=unit)


def _break_even(axes: Any, cost: CostTable, sizes: range) -> None:
    """The acceptance length that a fixed block size needs, against what it could yield at most."""
    least = [cost.break_even(size) for size in sizes]
    axes.step(sizes, least, where="pre", marker=".", color="#333333")
    axes.plot(sizes, sizes, ":", color="#bbbbbb", label="all drafted tokens stand")
    axes.set_ylim(0, 1.15 * max(least))
    axes.set(xlabel="block size", ylabel="acceptance length from which it pays")


def _by_rows(axes: Any, cost: CostTable, sizes: range) -> None:
    """Steps of several rows that all have one block size, for all rows together."""
    scale, unit = _unit(cost)
    rows = [1, *sorted(cost.rows)]
    shown = sorted({1, 4, 8, sizes[-1]} & set(sizes))
    for colour, size in zip(COLOURS, shown, strict=False):
        steps = [scale * cost.step(size, rows=count) for count in rows]
        axes.plot(rows, steps, marker=".", color=colour, label=f"block size {size}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="rows", ylabel=f"{unit}, all rows together")


def _unit(cost: CostTable) -> tuple[int, str]:
    return (1000, "ms") if cost.unit == "seconds" else (1, cost.unit)
