"""Policies judged on a simulated server, at each load against the fixed size that is best there."""

from __future__ import annotations

from bpkit.judge.load.run import LoadRuns, evaluate_load
from bpkit.judge.load.setup import LoadCase, LoadSetup

__all__ = ["LoadCase", "LoadRuns", "LoadSetup", "evaluate_load"]
