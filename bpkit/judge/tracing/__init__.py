"""How fast traces are made."""

from __future__ import annotations

from bpkit.judge.tracing.measure import (
    bench_tracing,
)

__all__ = [
    "bench_tracing",
]
