"""How long decisions take."""

from __future__ import annotations

from bpkit.bench.latency.measure import (
    LatencySettings,
    agreement,
    bench_latency,
)

__all__ = [
    "LatencySettings",
    "agreement",
    "bench_latency",
]
