"""What steps cost: tables of it, presets, and how it is measured."""

from __future__ import annotations

from bpkit.trace.cost.errors import CostError
from bpkit.trace.cost.files import read_cost, write_cost
from bpkit.trace.cost.measured import Cell, Measured
from bpkit.trace.cost.table import CostTable
from bpkit.trace.cost.variants import flat, linear

__all__ = ["Cell", "CostError", "CostTable", "Measured", "flat", "linear", "read_cost", "write_cost"]
