"""What steps cost: tables of it, presets, and how it is measured."""

from __future__ import annotations

from bpkit.traces.cost.errors import CostError
from bpkit.traces.cost.files import read_cost, write_cost
from bpkit.traces.cost.measured import Cell, Measured
from bpkit.traces.cost.table import CostTable
from bpkit.traces.cost.variants import flat, linear

__all__ = ["Cell", "CostError", "CostTable", "Measured", "flat", "linear", "read_cost", "write_cost"]
