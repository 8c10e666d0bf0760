"""Sweeps over block sizes, however they were measured: what they say, and what chance alone would."""

from __future__ import annotations

from bpkit.judge.sweep.read import (
    Sweep,
    read_sweep,
)

__all__ = [
    "Sweep",
    "read_sweep",
]
