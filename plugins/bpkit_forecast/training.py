"""Training of `forecast`: both networks on every position and block size of the traces."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bpkit.learn.curves import CostCurves
from bpkit.learn.trained import TrainedPolicy
from bpkit.learn.training.hazards import hazard_labels, hazard_loss, mean_yields, visited
from bpkit.learn.training.policy_module import PolicyModule, Replay, TrainingOptions
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature
from bpkit_forecast.networks import Before
from bpkit_forecast.policy import VECTORS

OUTLOOK = 256
"""Held-out positions whose forecasts are kept."""


class ForecastOptions(TrainingOptions):
    """Training options of `forecast`."""

    epochs: int = Field(default=6, ge=1, description="passes over the training examples, at most")
    learning_rate: float = Field(default=5e-4, gt=0, description="of AdamW, at its peak")
    weight_decay: float = Field(default=0.05, ge=0, description="of AdamW")
    hidden: int = Field(default=128, ge=1, description="width of the network before the draft")
    dropout: float = Field(default=0.3, ge=0, lt=1, description="of the network before the draft, its inputs included")


class ForecastModule(PolicyModule):
    """Cross-entropy of the hazards: a token counts if all before it stood."""

    Options = ForecastOptions
    features = frozenset(VECTORS)
    options: ForecastOptions
    mean: Tensor
    scale: Tensor

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """A row for each position at which a draft may begin; half precision, because there are many."""
        drafts, rows = prompt.drafts, prompt.drafts.rows
        at_anchor = [prompt.features[name][:rows] for name in VECTORS]
        probability = drafts.features[Feature.DRAFT_PROBABILITY]
        entropy = drafts.features[Feature.DRAFT_ENTROPY]
        return {
            "x": torch.from_numpy(np.concatenate(at_anchor, axis=1)).half(),
            "accepted": torch.from_numpy(drafts.num_accepted.astype(np.int16)),
            "visited": torch.from_numpy(visited(drafts.num_accepted)),
            "left": torch.arange(rows - 1, -1, -1, dtype=torch.int16),  # most that can be accepted
            "probability": torch.from_numpy(np.nan_to_num(probability, nan=1.0)).half(),
            "entropy": torch.from_numpy(np.nan_to_num(entropy)).half(),
        }

    def prepare(self, data: dict[str, Tensor]) -> None:
        sizes = [int(size) for size in self.sizes]
        x = data["x"].float()
        self.facts = {
            "block_sizes": sizes,
            "inputs": x.shape[1],
            "hidden": self.options.hidden,
            "dropout": self.options.dropout,
            "yields": mean_yields(data["accepted"], data["visited"]),
            "outlook": [],  # known at the end
            "curves": dataclasses.asdict(CostCurves(self.cost, sizes).typical),
        }
        self.networks = nn.ModuleDict(self.policy.build(self.facts))
        self.register_buffer("mean", x.mean(dim=0))
        self.register_buffer("scale", 1 / (x.std(dim=0) + 1e-3))

    def calibrate(self, data: dict[str, Tensor]) -> None:
        """Facts: `outlook`, forecasts of some held-out positions, by which a policy sees whether choosing pays."""
        x = data["x"]
        chosen = x[torch.linspace(0, len(x) - 1, min(len(x), OUTLOOK)).long()].to(self.mean.device)
        with torch.no_grad():
            hazards = self.networks["before"].eval()((chosen.float() - self.mean) * self.scale)
        stands = hazards.sigmoid().cumprod(dim=-1).cpu()  # [rows, sizes, width]
        inside = torch.arange(stands.shape[2]) < torch.tensor(self.facts["block_sizes"])[:, None] - 1
        self.facts["outlook"] = [[round(v, 3) for v in row] for row in (stands * inside).sum(dim=-1).tolist()]

    def finished(self, **options: Any) -> TrainedPolicy:
        """As everybody's; the standardisation of inputs becomes part of the first layer."""
        policy = super().finished(**options)
        cast("Before", policy.networks["before"]).take_raw_inputs(self.mean.cpu(), self.scale.cpu())
        return policy

    def choose(self, replay: Replay) -> None:
        """The rate with the most tokens per second on validation prompts, unless it was given."""
        config = self.policy.config
        if "rate" not in config.model_fields_set:
            rates = {rate: replay(self.finished(rate=rate)) for rate in config.grid["rate"]}
            self.set_options(rate=max(rates, key=rates.__getitem__))

    @property
    def sizes(self) -> range:
        """Block sizes of the traces: every one up to the largest."""
        return range(2, self.spec.max_block_size + 1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        stands, counts = self._labels(batch)
        before = self.networks["before"]((batch["x"].float() - self.mean) * self.scale)
        calibration = self.networks["after"]
        after = calibration(batch["probability"].float(), batch["entropy"].float(), calibration.bias)
        return hazard_loss(before, stands, counts) + hazard_loss(after, stands, counts)

    def _labels(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Whether each token stands, and whether that is known and all before it stood: [batch, sizes, width]."""
        return hazard_labels(batch["accepted"], batch["left"], self.sizes)
