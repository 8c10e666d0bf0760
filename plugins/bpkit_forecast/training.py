"""Training of `forecast`: both networks on every position and block size of the traces."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bpkit.learn import TrainedPolicy
from bpkit.learn.networks import Standard
from bpkit.learn.training.learned import LearnedModule, LearnedOptions, hazard_labels, hazard_loss
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature
from bpkit_forecast.networks import Before
from bpkit_forecast.policy import VECTORS


class ForecastOptions(LearnedOptions):
    """Training options of `forecast`."""

    learning_rate: float = Field(default=5e-4, gt=0, description="of AdamW, at its peak")
    hidden: int = Field(default=128, ge=1, description="width of the network before the draft")
    dropout: float = Field(default=0.3, ge=0, lt=1, description="of the network before the draft, its inputs included")


class ForecastModule(LearnedModule):
    """Cross-entropy of the hazards: a token counts if all before it stood."""

    Options = ForecastOptions
    features = frozenset(VECTORS)
    options: ForecastOptions

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """Those of every `LearnedPolicy`, with the drafter's confidences."""
        found = prompt.drafts.features
        return {
            **super().examples(prompt),
            "probability": torch.from_numpy(np.nan_to_num(found[Feature.DRAFT_PROBABILITY], nan=1.0)).half(),
            "entropy": torch.from_numpy(np.nan_to_num(found[Feature.DRAFT_ENTROPY])).half(),
        }

    def prepare(self, data: dict[str, Tensor]) -> None:
        """Facts: those of `bpkit.learn.gains.Gains`, and what the networks are built from."""
        x = super().inputs(data)
        self.facts = {
            **self.facts_of_gains(data),
            "inputs": x.shape[1],
            "hidden": self.options.hidden,
            "dropout": self.options.dropout,
        }
        self.networks = nn.ModuleDict(self.policy.build(self.facts))
        self.standard = Standard(x.shape[1])
        self.standard.mean.copy_(x.mean(dim=0))
        self.standard.scale.copy_(x.std(dim=0) + 1e-3)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        stands, counts = hazard_labels(batch["accepted"], batch["left"], self.facts["block_sizes"])
        before, after = cast("Before", self.networks["before"]), self.networks["after"]
        doubt = after(batch["probability"].float(), batch["entropy"].float(), after.bias)
        return hazard_loss(before.logits(self.inputs(batch)), stands, counts) + hazard_loss(doubt, stands, counts)

    def inputs(self, data: dict[str, Any]) -> Tensor:
        """Standardised: float32 [rows, inputs]."""
        standardised: Tensor = self.standard(super().inputs(data))
        return standardised

    def finished(self, **options: Any) -> TrainedPolicy:
        """As everybody's; the standardisation of inputs becomes part of the first layer."""
        policy = super().finished(**options)
        cast("Before", policy.networks["before"]).take_raw_inputs(self.standard)
        return policy
