"""Options of `forecast`."""

from __future__ import annotations

from pydantic import Field

from bpkit.learn.learned_config import LearnedConfig


class ForecastConfig(LearnedConfig):
    """Options of `forecast`."""

    truncate: bool = Field(
        default=False,
        description="also read the draft's confidences and verify only what pays; worth it where verifying is dear",
    )
    grid = {"rate": (0.7, 0.85, 1.0), "truncate": (False, True)}
