"""Policies with weights: what they are, their folders, and how they are trained.

    from bpkit.learn import LearnedConfig, LearnedPolicy, TrainedConfig, TrainedPolicy

None of these names imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpkit.learn.config import LearnedConfig, TrainedConfig
    from bpkit.learn.learned import LearnedPolicy
    from bpkit.learn.trained import TrainedPolicy

__all__ = ["LearnedConfig", "LearnedPolicy", "TrainedConfig", "TrainedPolicy"]

_HOMES = {
    "LearnedConfig": "config",
    "TrainedConfig": "config",
    "LearnedPolicy": "learned",
    "TrainedPolicy": "trained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
