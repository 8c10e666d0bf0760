"""What steps cost: tables of it, presets, and how it is measured."""

from __future__ import annotations

from bpkit.trace.cost.files import read_cost, write_cost
from bpkit.trace.cost.presets import flat, linear
from bpkit.trace.cost.table import CostError, CostTable

__all__ = ["CostError", "CostTable", "flat", "linear", "read_cost", "write_cost"]
