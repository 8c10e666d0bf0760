"""A picture of a cost table: what drafts, target passes and whole steps cost by size, as the staircases they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpkit.trace.cost.table import CostTable

MOST_CONTEXTS = 4
COLOURS = ("#88ccee", "#4477aa", "#225588", "#112244")


def plot_cost(cost: CostTable, path: Path) -> None:
    """Write the picture; the suffix says the format. Needs matplotlib."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    phases, pays = figure.subplots(1, 2, width_ratios=(3, 2))
    scale, unit = (1000, "ms") if cost.unit == "seconds" else (1, cost.unit)
    _phases(phases, cost, scale, unit)
    _break_even(pays, cost)
    figure.suptitle(f"{cost.name}: {cost.description}" if len(cost.description) < 100 else cost.name, fontsize=10)
    figure.savefig(path, dpi=150)


def _phases(axes: Any, cost: CostTable, scale: float, unit: str) -> None:
    """Drafts by block size, target passes by width, and a whole step at the context length in the middle."""
    widths = list(range(1, cost.largest_width + 1))
    contexts = _contexts(cost)
    for colour, context in zip(COLOURS, contexts, strict=False):
        passes = [scale * cost.seconds("verify", width, context) for width in widths]
        label = f"verify, context {context}" if len(contexts) > 1 else "verify"
        axes.step(widths, passes, where="pre", marker=".", color=colour, label=label)
    sizes = _sizes(cost)
    drafts = [scale * cost.seconds("draft", size, 0) for size in sizes]
    axes.step(sizes, drafts, where="pre", marker=".", color="#ee6677", label="draft")
    steps = [scale * cost.step(size) for size in sizes]
    axes.step(sizes, steps, where="pre", marker=".", color="#333333", label="step of a fixed block size")
    axes.set_ylim(bottom=0)
    _label(axes, "block size; positions verified", unit)


def _break_even(axes: Any, cost: CostTable) -> None:
    """The acceptance length that a fixed block size needs, against what it could yield at most."""
    sizes = _sizes(cost)
    axes.step(sizes, [cost.break_even(size) for size in sizes], where="pre", marker=".", color="#333333")
    axes.plot(sizes, sizes, ":", color="#bbbbbb", label="all drafted tokens stand")
    axes.set_ylim(0, 1.15 * max(cost.break_even(size) for size in sizes))
    _label(axes, "block size", "acceptance length from which it pays")


def _label(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _sizes(cost: CostTable) -> list[int]:
    """Block sizes that have both a draft and a target pass."""
    return list(range(1, min(cost.largest_width, cost.largest_block_size or cost.largest_width) + 1))


def _contexts(cost: CostTable) -> list[int]:
    """Context lengths of plain steps that were measured, no more than can be told apart."""
    plain = cost.verify[1]
    known = sorted(plain) if isinstance(plain, dict) else [0]
    return known[:: -(-len(known) // MOST_CONTEXTS)]
