"""SpecDec++ (Huang, Guo and Wang 2024, 2405.19715): a trained head says when some drafted token will be refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from bpkit.export.core import Core, Export, Port, decision, given, margin
from bpkit.learn import TrainedConfig, TrainedPolicy
from bpkit.policy import State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bpkit_threshold.specdecpp_networks import AcceptanceHead, Risk


MANY = 128
"""Drafted tokens of all rows together from which on other products of matrices pay for being chosen."""


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
    is verified (`keep_last`). How the authors' program differs, docs/policies/thresholds.md says.
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
        self.risk = self._risk("truncate")

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if Feature.DRAFT_HIDDEN not in features:
            return {}
        hidden = features[Feature.DRAFT_HIDDEN].float()
        if hidden.shape[:-1].numel() < MANY:
            return {"log_accepted": self.risk.log_accepted(hidden)}
        from bpkit.decode.products import quick_products

        with quick_products(self.risk.head):
            return {"log_accepted": self.risk.log_accepted(hidden)}

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return self.risk.go_on(self._risk_of(draft), draft.draft_length)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return self.risk.verify_length(self._risk_of(draft), draft.draft_length)

    def _risk_of(self, draft: Draft) -> Tensor:
        return self.risk.risk(self.predicted(draft)["log_accepted"])  # float32 [batch, width]

    def export(self) -> Export:
        """What is verified after each draft; with an autoregressive drafter also whether it goes on."""
        cores = {"truncate": self._core("truncate")}
        if self.decoder.work.may_end_early:
            cores["extend"] = self._core("extend")
        return Export(cores, sorted({1, self.block_size}), drafts=self.block_size)

    def _core(self, method: Literal["truncate", "extend"]) -> Core:
        risk = self._risk(method)
        return Core(
            method,
            risk,
            inputs=(given(Feature.DRAFT_HIDDEN, risk.head.width), given("draft_length")),
            outputs=(
                decision(method),
                Port("risk", ("batch", "width"), "float32", "chance that one of the tokens so far is refused"),
                margin("distance of the nearest risk to the threshold"),
            ),
        )

    def _risk(self, method: Literal["truncate", "extend"]) -> Risk:
        from bpkit_threshold.specdecpp_networks import Risk

        head, config = cast("AcceptanceHead", self.networks["head"]), self.config
        return Risk(head, config.threshold, keep_last=config.keep_last, method=method)
