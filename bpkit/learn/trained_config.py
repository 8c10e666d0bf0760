"""Options that every policy with trained weights has. Imports no torch, so that such policies can be listed."""

from __future__ import annotations

from pydantic import Field

from bpkit.policy import PolicyConfig


class TrainedConfig(PolicyConfig):
    """Base of the options of policies with weights, `bpkit.learn.trained.TrainedPolicy`.

    A policy whose options derive from this class is one that `bpkit train NAME` trains.
    """

    weights: str | None = Field(
        default=None, description="folder of a trained policy; by default the one that ships for this pair"
    )
