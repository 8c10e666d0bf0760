"""SpecDec++ (Huang, Guo and Wang 2024, 2405.19715): a trained head says when some drafted token will be refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bpkit.export.core import Export
from bpkit.learn.trained import TrainedConfig, TrainedPolicy
from bpkit.policy import State
from bpkit.policy.stop_rules import trusted_length, trusted_whole
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature

if TYPE_CHECKING:
    from torch import Tensor, nn


class SpecDecPPConfig(TrainedConfig):
    """Options of `specdecpp`. Training chooses those of the grid that were left open."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "threshold": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995),
        "keep_last": (True, False),
        "block_size": tuple(range(2, 33)),
    }

    threshold: float = Field(
        default=0.7, ge=0, le=1, description="predicted chance of a rejection above which the draft stops"
    )
    keep_last: bool = Field(default=True, description="verify also the token at which the draft stops, as published")
    block_size: int | None = Field(
        default=None,
        ge=1,
        description="most positions to draft, anchor included; by default the trained block size, or of an "
        "autoregressive drafter the largest that was traced",
    )


class SpecDecPP(TrainedPolicy):
    """Stops a draft once the predicted chance that one of its tokens is refused exceeds `threshold`.

    A head on the drafter's last hidden state predicts p_k, the chance that drafted token k is accepted if all before
    it are. The draft stops at the first token k with

        1 - p_1 p_2 ... p_k > threshold.

    The paper takes drafting for a Markov decision process and shows that beyond some such threshold to stop is best.
    With an autoregressive drafter the rule ends the draft (`extend`). A block-diffusion drafter has drafted its block
    by then, and the rule trims what is verified (`truncate`). The token at which the draft stops has been drafted, and
    is verified (`keep_last`).

    Differences from the authors' program (github.com/Kaffaljidhmah2/SpecDec_pp):

    - p_k is read off the state that predicted token k, not off the state after reading it. Stopping at k takes no
      drafter pass for p_k, where theirs drafts one token more; a head cannot tell which token was drawn from a
      distribution, and with greedy drafts there is nothing to tell.
    - Each residual block has weights of its own, as in the paper. The program repeats one block.
    - One logit in the place of two under a softmax: the same function.
    - `block_size` bounds the draft from above; there is no lower bound (the published runs have 2 to 20 tokens).
    """

    name = "specdecpp"
    Config = SpecDecPPConfig
    trainer = "bpkit_threshold.specdecpp_training:SpecDecPPModule"
    wants = frozenset({Feature.DRAFT_HIDDEN})
    config: SpecDecPPConfig

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """The head for `facts`: `hidden_size` of the drafter, `blocks`, and a default `block_size`."""
        from bpkit_threshold.specdecpp_networks import AcceptanceHead

        return {"head": AcceptanceHead(int(facts["hidden_size"]), int(facts["blocks"]))}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        self.decoder = decoder
        self.block_size = min(self.config.block_size or int(self.facts["block_size"]), decoder.max_block_size)

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if Feature.DRAFT_HIDDEN not in features:
            return {}
        return {"accepted": self.networks["head"](features[Feature.DRAFT_HIDDEN].float()).sigmoid()}

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return trusted_whole(draft, self._trusted(draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        length = trusted_length(draft, self._trusted(draft))
        return (length + 1).minimum(draft.draft_length) if self.config.keep_last else length

    def export(self) -> Export:
        """What is verified after each draft; with an autoregressive drafter also whether it goes on."""
        from bpkit_threshold.specdecpp_core import ExtendCore, TruncateCore, extend_core, truncate_core
        from bpkit_threshold.specdecpp_networks import AcceptanceHead

        head, config = self.networks["head"], self.config
        assert isinstance(head, AcceptanceHead)
        truncate = TruncateCore(head, config.threshold, keep_last=config.keep_last)
        cores = {"truncate": truncate_core(truncate, head.width)}
        if self.decoder.work.may_end_early:
            cores["extend"] = extend_core(ExtendCore(head, config.threshold), head.width)
        return Export(cores, sorted({1, self.block_size}), drafts=self.block_size)

    def _trusted(self, draft: Draft) -> Tensor:
        return 1 - self.predicted(draft)["accepted"].cumprod(dim=1) <= self.config.threshold  # bool [batch, width]
