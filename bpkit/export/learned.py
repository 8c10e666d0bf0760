"""A `bpkit.learn.learned.LearnedPolicy` as a network that decides by itself, for export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from bpkit.export.core import Core, Port
from bpkit.export.gains import GainsCore, cost_ports, gain_ports, over_plain
from bpkit.types import Feature

if TYPE_CHECKING:
    from bpkit.learn.learned_network import Forecaster

MEANINGS = {
    Feature.LAST_HIDDEN: "final-norm hidden state that predicted the anchor",
    Feature.TARGET_FEATURES: "the layers that the drafter reads",
    Feature.ANCHOR_EMBEDDING: "the target's embedding of the anchor",
    Feature.ANCHOR_LOG_PROBABILITY: "log-probability of the anchor by the raw logits, in nats",
    Feature.ANCHOR_ENTROPY: "entropy of that distribution, in nats",
}
ONE_NUMBER = (Feature.ANCHOR_LOG_PROBABILITY, Feature.ANCHOR_ENTROPY)
"""Features that are one number of each row, without an axis for it."""


class LearnedCore(GainsCore):
    """The size that gains most, from features and cost curves."""

    def __init__(self, forecaster: Forecaster, facts: dict[str, Any], columns: list[int], config: Any) -> None:
        super().__init__()
        self.forecaster = forecaster
        self.register_buffer("columns", torch.tensor(columns))
        self.weigh(facts, columns, config)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, `step_seconds`, `typical_step_seconds`. Returns what `GainsCore.decide` returns."""
        *features, step, typical = inputs
        rho, floor = self.going(typical)
        x = torch.cat([value if value.ndim == 2 else value[:, None] for value in features], dim=1)
        tokens = self.forecaster(x)[:, cast("Tensor", self.columns)]
        return self.decide(over_plain(tokens, step, rho), typical, rho, floor)


def learned_core(forecaster: Forecaster, facts: dict[str, Any], columns: list[int], config: Any) -> Core:
    """With its ports. Arguments as in `GainsCore.weigh`."""
    sizes = 1 + len(columns)
    features = {Feature(name): width for name, width in facts["inputs"].items()}
    ports = [
        Port(str(name), ("batch",) if name in ONE_NUMBER else ("batch", width), "float32", MEANINGS[name])
        for name, width in features.items()
    ]
    core = LearnedCore(forecaster, facts, columns, config)
    return Core("select", core, inputs=(*ports, *cost_ports(sizes)), outputs=gain_ports(sizes))
