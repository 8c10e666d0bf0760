"""Training of any `bpkit.learn.LearnedPolicy`: on every position and block size of the traces.

Networks learn hazards: of each drafted token whether it stands, if all before it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.curves import TYPICAL_CONTEXT, CostCurves
from bpkit.learn.learned import LearnedPolicy
from bpkit.learn.networks import Forecaster, joined
from bpkit.learn.training.policy_module import PolicyModule, Replay, TrainingOptions
from bpkit.policy import PolicyError
from bpkit.trace.records import PromptTrace

OUTLOOK = 256
"""Held-out positions whose forecasts are kept."""
HALF = 65504.0
"""Largest number in half precision."""
AT_ONCE = 4096


class LearnedOptions(TrainingOptions):
    """Training options of every `LearnedPolicy`."""

    epochs: int = Field(default=6, ge=1, description="passes over the training positions, at most")
    weight_decay: float = Field(default=0.05, ge=0, description="of AdamW")
    dropout: float = Field(default=0.3, ge=0, lt=1, description="share of the network's inputs that are left out")


class LearnedModule(PolicyModule):
    """Cross-entropy of what stands: a token counts if all before it stood."""

    Options = LearnedOptions
    policy: LearnedPolicy
    options: LearnedOptions

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """A row for each position at which a draft may begin; features in half precision, because there are many."""
        drafts, rows = prompt.drafts, prompt.drafts.rows
        features = {
            str(name): torch.from_numpy(prompt.features[name][:rows].reshape(rows, -1).clip(-HALF, HALF)).half()
            for name in self.policy.reads
        }
        return {
            **features,
            "accepted": torch.from_numpy(drafts.num_accepted.astype(np.int16)),
            "visited": torch.from_numpy(visited(drafts.num_accepted)),
            "left": torch.arange(rows - 1, -1, -1, dtype=torch.int16),  # most that can be accepted
            "sizes": torch.from_numpy(drafts.block_sizes.astype(np.int16)).expand(rows, -1),
        }

    def prepare(self, data: dict[str, Tensor]) -> None:
        """Facts: those of gains, and `inputs`, how many numbers each feature is."""
        if not len(data["left"]):
            raise PolicyError("no training prompt has a position to learn from: the outputs are too short")
        self.facts = {
            **self.facts_of_gains(data),
            "inputs": {str(name): data[str(name)].shape[1] for name in self.policy.reads},
        }
        sizes = self.facts["block_sizes"]
        self.networks = nn.ModuleDict(self.policy.build(self.facts))
        forecaster, shares = cast("Forecaster", self.networks["forecaster"]), torch.zeros(2, sizes[-1] - 1)
        for start in range(0, len(data["left"]), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            stands, counts = hazard_labels(data["accepted"][rows], data["left"][rows], sizes)
            shares += torch.stack([(stands * counts).sum(dim=(0, 1)), counts.sum(dim=(0, 1))])
        forecaster.fit(self.inputs(data), shares[0], shares[1])
        forecaster.dropout = self.options.dropout

    def facts_of_gains(self, data: dict[str, Tensor]) -> dict[str, Any]:
        """What `bpkit.learn.gains.Gains` reads; the outlook is known at the end."""
        sizes = [int(size) for size in data["sizes"][0]]
        return {
            "block_sizes": sizes,
            "yields": mean_yields(data["accepted"], data["visited"]),
            "outlook": [],
            "curves": dataclasses.asdict(CostCurves(self.cost, sizes)(TYPICAL_CONTEXT)),
        }

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        stands, counts = hazard_labels(batch["accepted"], batch["left"], self.facts["block_sizes"])
        forecaster = cast("Forecaster", self.networks["forecaster"])
        return hazard_loss(forecaster.hazards(self.inputs(batch))[:, None], stands, counts)

    def calibrate(self, data: dict[str, Tensor]) -> None:
        """Facts: `outlook`, forecasts of some held-out positions, by which a policy sees whether choosing pays."""
        rows = len(data["left"])
        chosen = torch.linspace(0, rows - 1, min(rows, OUTLOOK)).long()
        x = self.inputs({name: value[chosen].to(self.device) for name, value in data.items()})
        with torch.no_grad():
            tokens = self.networks[self.policy.deciding].eval()(x).cpu()
        self.facts["outlook"] = [[round(value, 3) for value in row] for row in tokens.tolist()]

    def choose(self, replay: Replay) -> None:
        """Rate, then margin, with the most tokens per second on validation prompts, unless they were given."""
        for name in ("rate", "margin"):
            config = self.policy.config
            if name in config.grid:
                values = dict.fromkeys((getattr(config, name), *config.grid[name]))
                self.set_options(**self.fastest(replay, {name: values}))

    def inputs(self, data: dict[str, Any]) -> Tensor:
        """float32 [rows, inputs]."""
        return joined([data[str(name)] for name in self.policy.reads])


def hazard_labels(accepted: Tensor, left: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Whether each token stands, and whether that is known and all before it stood.

    Args:
        accepted: of each position and block size, integer [batch, sizes].
        left: most that can be accepted at each position, because the output ends: integer [batch].
        sizes: the block sizes.

    Returns:
        Both float32 [batch, sizes, width], `width` the longest draft.
    """
    accepted, left = accepted.long()[..., None], left.long()[:, None, None]
    place = torch.arange(max(sizes) - 1, device=accepted.device)
    length = torch.tensor(list(sizes), device=accepted.device)[:, None] - 1
    stands = place < accepted
    first_that_fell = (place == accepted) & (accepted < left)
    return stands.float(), ((stands | first_that_fell) & (place < length)).float()


def hazard_loss(logits: Tensor, stands: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that count: all of one shape, or `logits` one that expands to it."""
    losses = F.binary_cross_entropy_with_logits(logits.expand_as(stands), stands, reduction="none")
    mean: Tensor = (losses * counts).sum() / counts.sum().clamp(min=1)
    return mean


def visited(accepted: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where steps of each block size begin if that size is kept throughout: int32 [rows, sizes] -> bool of that shape.

    >>> visited(np.array([[1], [9], [0], [0]]))[:, 0].tolist()
    [True, False, True, True]
    """
    found = np.zeros(accepted.shape, np.bool_)
    for column in range(accepted.shape[1]):
        row, steps = 0, (accepted[:, column] + 1).tolist()
        while row < len(steps):
            found[row, column] = True
            row += steps[row]
    return found


def mean_yields(accepted: Tensor, visits: Tensor) -> list[float]:
    """Tokens per step of each size over the steps that it would take, both [rows, sizes]: no mean over positions."""
    accepted, visits = accepted.double(), visits.double()
    return (((1 + accepted) * visits).sum(dim=0) / visits.sum(dim=0)).tolist()
