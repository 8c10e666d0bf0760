"""What steps cost: tables of it, formulas, presets, and how it is measured."""

from __future__ import annotations

from bpkit.trace.cost.figures import CostError
from bpkit.trace.cost.files import read_cost, write_cost
from bpkit.trace.cost.named import NamedCost
from bpkit.trace.cost.packed import PackedCost
from bpkit.trace.cost.presets import flat, linear
from bpkit.trace.cost.roofline import Roofline
from bpkit.trace.cost.table import CostTable, RowsTable

__all__ = [
    "CostError",
    "CostTable",
    "NamedCost",
    "PackedCost",
    "Roofline",
    "RowsTable",
    "flat",
    "linear",
    "read_cost",
    "write_cost",
]
