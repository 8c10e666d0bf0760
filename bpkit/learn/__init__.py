"""Policies with weights: what they are, their folders, and how they are trained.

    from bpkit.learn import LearnedConfig, LearnedPolicy, TrainedConfig, TrainedPolicy

None of these names imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpkit.names import imported_late

if TYPE_CHECKING:
    from bpkit.learn.config import LearnedConfig, TrainedConfig
    from bpkit.learn.learned import LearnedPolicy
    from bpkit.learn.trained import TrainedPolicy

__all__ = ["LearnedConfig", "LearnedPolicy", "TrainedConfig", "TrainedPolicy"]

__getattr__ = imported_late(__name__, __all__, "config", "trained", "learned")
