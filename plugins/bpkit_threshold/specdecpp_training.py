"""How the head of SpecDec++ learns: each drafted token is an example, its label whether it is accepted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.learn import TrainedPolicy
from bpkit.learn.training.policy_module import PolicyModule, Replay, TrainingOptions
from bpkit.policy import PolicyError
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature
from bpkit_threshold.specdecpp import SpecDecPP
from bpkit_threshold.specdecpp_networks import AcceptanceHead


class SpecDecPPOptions(TrainingOptions):
    """Training options of `specdecpp`.

    Published: 3 blocks, a rejection weight of 6, a mixing ratio of 0.15, and 3 epochs over 40 000 answers. What becomes
    of token mixing on a trace, docs/policies/thresholds.md says.
    """

    epochs: int = Field(default=3, ge=1, description="passes over the drafted tokens, at most")
    batch_size: int = Field(default=512, ge=1, description="drafted tokens a step, on each device")
    learning_rate: float = Field(default=2e-4, gt=0, description="of AdamW, at its peak")
    weight_decay: float = Field(default=0.05, ge=0, description="of AdamW")
    blocks: int = Field(default=3, ge=0, description="residual blocks of the head")
    rejection_weight: float = Field(
        default=6.0, gt=0, description="what a refused token weighs in the loss against an accepted one"
    )
    mixing: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="token k of a draft weighs (1 - mixing)^(k - 1): the ratio of token mixing",
    )
    after_rejection: bool = Field(
        default=False,
        description="learn also from tokens after the first refused one, labelled by the target's text, as published",
    )


class SpecDecPPModule(PolicyModule):
    """Binary cross-entropy in which refused tokens weigh more."""

    Options = SpecDecPPOptions
    features = frozenset({Feature.DRAFT_HIDDEN})
    policy: SpecDecPP
    options: SpecDecPPOptions

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """`hidden` float16 [tokens, drafter hidden], `accepted` float32 [tokens], `depth` int16 [tokens] in the draft,
        from 0, and `sizes` int16 [tokens, traced sizes].

        Half precision, because there are many. Of an autoregressive drafter a smaller block is part of a larger one, so
        that only the largest is read.
        """
        columns = slice(-1, None) if self.spec.work.may_end_early else slice(None)
        labels = drafted_tokens(prompt)
        wanted = (labels.known if self.options.after_rejection else labels.reached)[:, columns]
        depth = np.broadcast_to(np.arange(wanted.shape[-1], dtype=np.int16), wanted.shape)
        hidden = prompt.drafts.features[Feature.DRAFT_HIDDEN][:, columns]
        return {
            "hidden": torch.from_numpy(hidden[wanted]).half(),
            "accepted": torch.from_numpy(labels.accepted[:, columns][wanted]),
            "depth": torch.from_numpy(depth[wanted]),
            "sizes": torch.from_numpy(prompt.drafts.block_sizes).short().expand(int(wanted.sum()), -1),
        }

    def prepare(self, data: dict[str, Tensor]) -> None:
        """Facts: `hidden_size` of the drafter, `blocks`, and `block_size`, for where the option is left open."""
        if not len(data["hidden"]):
            raise PolicyError("no training prompt has a drafted token to learn from: the outputs are too short")
        self.block_sizes = data["sizes"][0].tolist()
        trained = self.spec.trained_block_size
        block_drafter = not self.spec.work.may_end_early and trained in self.block_sizes
        self.facts = {
            "hidden_size": data["hidden"].shape[1],
            "blocks": self.options.blocks,
            "block_size": trained if block_drafter else max(self.block_sizes),
        }
        self.tuned: dict[str, Any] = {}
        self.networks = nn.ModuleDict(self.policy.build(self.facts))
        head = self.networks["head"]
        assert isinstance(head, AcceptanceHead)
        rejection = self.options.rejection_weight
        with torch.no_grad():  # the best constant to begin with
            accepted = data["accepted"].double().mean().clamp(1e-3, 1 - 1e-3)
            head.output.bias.fill_(float((accepted / (rejection * (1 - accepted))).log()))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.networks["head"](batch["hidden"].float())
        mixture = (1 - self.options.mixing) ** batch["depth"].float()
        return weighted_loss(logits, batch["accepted"], mixture, rejection_weight=self.options.rejection_weight)

    def finished(self, **options: Any) -> TrainedPolicy:
        """As everybody's; while it trains, with the threshold that suits the current weights."""
        return super().finished(**{**self.tuned, **options})

    def on_validation_epoch_end(self) -> None:
        # Weights of two epochs are compared at a threshold that suits each: chances shift while the head learns.
        if self.replay is not None:
            self.tuned = self.fastest(self.replay, {"threshold": self.policy.config.grid["threshold"]})
        super().on_validation_epoch_end()

    def choose(self, replay: Replay) -> None:
        """Threshold, and what else of the grid is open, together: what is fastest on validation prompts."""
        self.tuned = {}
        self.set_options(**self.fastest(replay, {**self.policy.config.grid, "block_size": tuple(self.block_sizes)}))


class DraftedTokens(NamedTuple):
    """What became of every drafted token of a trace; arrays are [rows, sizes, width].

    Attributes:
        known: whether there is a token of the output to compare with, other than the last, which no step accepts.
        reached: whether, further, all tokens before it in the draft were accepted.
        accepted: float32, 1 or 0; in sampled traces the chance that it matches, which is the same with less noise.
    """

    known: NDArray[np.bool_]
    reached: NDArray[np.bool_]
    accepted: NDArray[np.float32]


def drafted_tokens(prompt: PromptTrace) -> DraftedTokens:
    """Labels for each drafted token, from the target's text."""
    drafts = prompt.drafts
    rows, _, width = drafts.tokens.shape
    place = np.arange(1, rows + 1)[:, None] + np.arange(width)  # in the output: [rows, width]
    inside = place < prompt.output_length - 1
    text = prompt.output_tokens[np.where(inside, place, 0)][:, None]
    drafted = np.arange(width) < drafts.draft_length[..., None]
    known = inside[:, None] & drafted
    matches = (drafts.tokens == text) & known
    reached = known & (np.arange(width) <= drafts.num_accepted[..., None])
    accepted = matches.astype(np.float32)
    if drafts.match_probability is not None:
        accepted = np.where(np.isfinite(drafts.match_probability), drafts.match_probability, accepted)
    return DraftedTokens(known, reached, accepted)


def weighted_loss(logits: Tensor, accepted: Tensor, mixture: Tensor, *, rejection_weight: float) -> Tensor:
    """Mean of -(y log p + w (1 - y) log(1 - p)), each token weighing `mixture`, over all weights: a scalar.

    Args:
        logits: of p. accepted: y, in 0 .. 1. mixture: of each token, above 0. rejection_weight: w.
    """
    refused = rejection_weight * (1 - accepted)
    losses = accepted * F.softplus(-logits) + refused * F.softplus(logits)
    return (mixture * losses).sum() / (mixture * (accepted + refused)).sum()
