"""Options of policies with weights. Imports neither torch nor the Hub's client, so that they can be listed quickly."""

from __future__ import annotations

from pydantic import Field

from bpkit.policy import PolicyConfig


class TrainedConfig(PolicyConfig):
    """Base of the options of policies with weights, `bpkit.learn.TrainedPolicy`.

    A policy whose options derive from this class is one that `bpkit train NAME` trains.
    """

    weights: str | None = Field(
        default=None, description="folder of a trained policy; by default the one that ships for this pair"
    )


class LearnedConfig(TrainedConfig):
    """Base of the options of `bpkit.learn.LearnedPolicy`; `rate` and `margin` are settled by training."""

    rate: float = Field(
        default=0.85,
        gt=0,
        description="what a second is worth, as a share of the tokens/s of the best fixed size; below 1: larger blocks",
    )
    margin: float = Field(
        default=0.0, ge=0, description="tokens that a size must promise above the best fixed size to be preferred"
    )
    decision: float = Field(
        default=5e-5,
        ge=0,
        description="seconds that a decision takes; where choosing is expected to gain less, the best fixed size is "
        "taken without asking",
    )
    grid = {"rate": (0.7, 0.85, 1.0), "margin": (0.0, 0.1)}
