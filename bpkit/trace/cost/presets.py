"""Cost models that nobody measured: from published figures, by name, or made from another to compare with it."""

from __future__ import annotations

from bpkit.trace.cost.gpus import H100_8B, H100_MOE, H200_4B
from bpkit.trace.cost.named import NamedCost
from bpkit.trace.cost.table import CostTable, Padding, RowsTable

_DFLASH = CostTable(
    name="dflash-h200-qwen3-4b",
    description=(
        "Derived: a step at block size 16 takes 6.54 / 4.91 = 1.33 plain steps (T=0; at T=1 the published "
        "5.69 / 4.24 = 1.34 agree). Assumed: a target pass costs the same at any width up to 16, so that "
        "all of the 0.33 is drafting, and a draft costs the same at any block size; neither was published. "
        "With nothing to save by a smaller block, the largest is the best fixed size."
    ),
    source=(
        "DFlash, arXiv 2602.06036: Qwen3-4B with its block-size-16 drafter on an H200, speed-up 4.91x at "
        "acceptance length 6.54 (T=0), 4.24x at 5.69 (T=1)"
    ),
    unit="plain steps",
    draft={16: 6.54 / 4.91 - 1},  # acceptance length / speed-up is a step in plain steps
    verify={1: 1.0, 16: 1.0},
)
PRESETS: dict[str, NamedCost] = {cost.name: cost for cost in (_DFLASH, H200_4B, H100_8B, H100_MOE)}
"""By name."""


def flat(cost: NamedCost) -> CostTable:
    """Every step costs the same, what verifying one position does, of however many rows it is.

    Then tokens/s and acceptance length coincide. Both derived models price as many rows as `cost` does, and prompts as
    it does.
    """
    return _derived(cost, "flat", 0.0, "Every step costs what a target pass over one position does; drafts are free.")


def linear(cost: NamedCost, slope: float = 0.1) -> CostTable:
    """A target pass over v positions costs `1 + slope * (v - 1)` times one over a single position; drafts are free.

    The positions of all rows count together, those that are padding do not.
    """
    said = f"A target pass over v positions costs 1 + {slope:g} (v - 1) times one over a single position."
    return _derived(cost, "linear", slope, f"{said} Drafts are free.")


def _derived(model: NamedCost, name: str, slope: float, description: str) -> CostTable:
    cost: CostTable = model.table()
    plain = cost.seconds("verify", 1, cost.middle_context)
    widths = range(1, max(cost.largest_width, cost.largest_block_size or 1) + 1)

    def verify(rows: int) -> dict[int, float | dict[int, float]]:
        return {v: plain * (1 + slope * (rows * v - 1)) for v in widths}

    most = cost.largest_rows  # numbers of rows in between lie on the line
    padding = Padding(verify=slope * plain)
    return CostTable(
        name=name,
        description=f"{description} One position: as in {cost.name!r}.",
        unit=cost.unit,
        verify=verify(1),
        prefill=cost.prefill,
        rows={most: RowsTable(verify=verify(most), padding=padding)} if most > 1 else {},
    )
