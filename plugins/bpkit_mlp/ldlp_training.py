"""How LDLP learns: each position of each output is an example, its label what stands of a long draft there."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from bpkit.learn.networks import Standard
from bpkit.learn.training.policy_module import PolicyModule, Replay, TrainingOptions
from bpkit.policy import PolicyError
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature
from bpkit_mlp.ldlp import Ldlp, LdlpThresholdConfig
from bpkit_mlp.networks import ResidualMLP


class LdlpOptions(TrainingOptions):
    """Training options of `ldlp` and `ldlp_threshold`; docs/policies/ldlp.md says which were published."""

    epochs: int = Field(default=10, ge=1, description="passes over the training positions, at most")
    batch_size: int = Field(default=128, ge=1, description="positions a step, on each device")
    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW, at its peak")
    penalty: float = Field(
        default=3.0, gt=0, description="what a token too few costs against a token too many; published: more than 1"
    )


class LdlpModule(PolicyModule):
    """Regression of the accepted length with an asymmetric L1 loss."""

    Options = LdlpOptions
    features = frozenset({Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN})
    policy: Ldlp
    options: LdlpOptions

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """`inputs` float32 [rows, 2 * hidden], `accepted` float32 [rows], and `sizes` int64 [rows, traced sizes]."""
        rows = torch.from_numpy(labelled_rows(prompt))
        parts = [torch.tensor(prompt.features[name]) for name in (Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN)]
        # Row t - 1 of a table is position t, whose anchor is output token t - 1.
        inputs = torch.cat([part[: prompt.drafts.rows] for part in parts], dim=1).float()
        accepted = torch.tensor(prompt.drafts.num_accepted[:, -1]).float()
        sizes = torch.tensor(prompt.drafts.block_sizes).long()
        return {"inputs": inputs[rows], "accepted": accepted[rows], "sizes": sizes.expand(int(rows.sum()), -1)}

    def prepare(self, data: dict[str, Tensor]) -> None:
        """Facts: `hidden_size` and `sizes`, the block sizes that were traced."""
        inputs, accepted = data["inputs"], data["accepted"]
        if not len(inputs):
            raise PolicyError("no training prompt has a position to learn from: the outputs are too short")
        self.facts = {"hidden_size": inputs.shape[1] // 2, "sizes": data["sizes"][0].tolist()}
        self.networks = nn.ModuleDict(self.policy.build(self.facts))
        if "standard" in self.networks:
            cast("Standard", self.networks["standard"]).fit(inputs)
        penalty = self.options.penalty
        with torch.no_grad():  # the best constant to begin with: the loss's own quantile
            bias = cast("ResidualMLP", self.networks["mlp"]).output.bias
            bias.fill_(float(accepted.double().quantile(penalty / (1 + penalty))))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        forecast = nn.Sequential(*self.networks.values())(batch["inputs"])[:, 0]
        return asymmetric_l1(forecast, batch["accepted"], self.options.penalty)

    def choose(self, replay: Replay) -> None:
        """With a threshold: the one that is fastest on validation prompts, as the authors chose theirs."""
        config = self.policy.config
        if not isinstance(config, LdlpThresholdConfig):
            return
        traced = set(self.facts["sizes"])
        values = {"threshold": config.grid["threshold"]}
        if config.keep == "longer":  # the other way round the forecast says how much to draft
            values["block_size"] = tuple(size for size in config.grid["block_size"] if size in traced)
        for name, tried in values.items():
            self.set_options(**self.fastest(replay, {name: tried}))


def labelled_rows(prompt: PromptTrace) -> NDArray[np.bool_]:
    """Positions whose label is what would have stood: bool [rows].

    Near the limit on new tokens fewer drafted tokens could stand than were drafted, whatever they were. An output that
    ended by itself has no such positions: nothing more was there to be accepted.
    """
    position = np.arange(1, prompt.drafts.rows + 1)
    cut = prompt.output_length >= prompt.max_new_tokens
    room = prompt.output_length - position - 1
    return ~(cut & (room < prompt.drafts.draft_length[:, -1]))


def asymmetric_l1(forecast: Tensor, accepted: Tensor, penalty: float) -> Tensor:
    """Mean of |forecast - accepted|, times `penalty` where the forecast is too low (AdaEAGLE, equation 4).

    This is the pinball loss: its minimiser is the quantile penalty / (1 + penalty) of what is accepted.

    Args:
        forecast, accepted: draft lengths, [batch].
    """
    missed = accepted - forecast
    return (missed.clamp(min=0) * penalty + (-missed).clamp(min=0)).mean()
