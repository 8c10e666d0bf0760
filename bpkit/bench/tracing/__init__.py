"""How fast traces are made."""

from __future__ import annotations

from bpkit.bench.tracing.measure import (
    bench_tracing,
)

__all__ = [
    "bench_tracing",
]
