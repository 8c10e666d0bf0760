"""Tables made from another, to see what a judgement owes to its costs."""

from __future__ import annotations

from bpkit.trace.cost.table import CostTable


def flat(cost: CostTable) -> CostTable:
    """Every step costs the same, what verifying one position does: then tokens/s and acceptance length coincide."""
    return _derived(cost, "flat", 0.0, "Every step costs what a target pass over one position does; drafts are free.")


def linear(cost: CostTable, slope: float = 0.1) -> CostTable:
    """A target pass over v positions costs `1 + slope * (v - 1)` times one over a single position; drafts are free."""
    said = f"A target pass over v positions costs 1 + {slope:g} (v - 1) times one over a single position."
    return _derived(cost, "linear", slope, f"{said} Drafts are free.")


def _derived(cost: CostTable, name: str, slope: float, description: str) -> CostTable:
    plain = cost.seconds("verify", 1, cost.middle_context)
    widths = range(1, max(cost.largest_width, cost.largest_block_size or 1) + 1)
    verify: dict[int, float | dict[int, float]] = {v: plain * (1 + slope * (v - 1)) for v in widths}
    return CostTable(
        name=name, description=f"{description} One position: as in {cost.name!r}.", unit=cost.unit, verify=verify
    )
