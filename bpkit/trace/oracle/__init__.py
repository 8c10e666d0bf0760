"""Oracles: the least time that any choice could have taken, and where a policy's time goes beyond it."""

from __future__ import annotations

from bpkit.trace.oracle.paths import (
    Expectation,
    Hindsight,
    Path,
    best_fixed,
    fixed_path,
    hindsight,
    oracle_distributions,
    oracle_prompt,
    oracle_step,
    oracle_step_truncate,
    walk,
)

__all__ = [
    "Expectation",
    "Hindsight",
    "Path",
    "best_fixed",
    "fixed_path",
    "hindsight",
    "oracle_distributions",
    "oracle_prompt",
    "oracle_step",
    "oracle_step_truncate",
    "walk",
]
