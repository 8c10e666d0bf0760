"""How long decisions take."""

from __future__ import annotations

from bpkit.judge.latency.measure import (
    LatencySettings,
    agreement,
    bench_latency,
)

__all__ = [
    "LatencySettings",
    "agreement",
    "bench_latency",
]
