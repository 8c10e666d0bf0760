"""Replay: the live loop and the same policies, over a trace instead of models."""

from __future__ import annotations

from bpkit.trace.replay.decode import (
    Fill,
    Replayed,
    Replayer,
    offered,
    with_features,
)

__all__ = [
    "Fill",
    "Replayed",
    "Replayer",
    "offered",
    "with_features",
]
