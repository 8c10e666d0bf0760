"""AdaEAGLE's LDLP (Zhang et al. 2024, 2412.18910): forecast what will be accepted, and draft that much.

Alone, and with a threshold on the drafter's probabilities (AdaEAGLE-DDD, section 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bpkit.export.core import Core, Export, Port, decision, given, margin
from bpkit.learn import TrainedConfig, TrainedPolicy
from bpkit.policy import State
from bpkit.policy.stop_rules import trusted_whole
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature
from bpkit_mlp.blockpilot import MARGIN

if TYPE_CHECKING:
    from torch import Tensor, nn

DEPTH = 3
"""Layers before the output, as published."""


class LdlpConfig(TrainedConfig):
    """Options of `ldlp`; all but `weights` are settled by training."""

    width: int | None = Field(default=None, ge=1, description="neurons of each layer; by default the hidden size")
    normalise: Literal["none", "standard"] = Field(
        default="none", description="of the input: none, or by the training positions' mean and deviation"
    )


class Ldlp(TrainedPolicy):
    """A three-layer residual MLP on two vectors, all that is known where a draft begins, gives the draft length.

    The vectors are the embedding of the anchor and the target's final hidden state that predicted it. The output is
    rounded and kept within 0 (no draft) and the largest draft length that was traced.
    """

    name = "ldlp"
    Config = LdlpConfig
    trainer = "bpkit_mlp.ldlp_training:LdlpModule"
    wants = frozenset({Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN})
    config: LdlpConfig

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """The networks for `facts`: `hidden_size` of the target, `sizes` (block sizes that were traced, ascending)."""
        from bpkit.learn.networks import Standard
        from bpkit_mlp.networks import ResidualMLP

        hidden = int(facts["hidden_size"])
        mlp = ResidualMLP(2 * hidden, self.config.width or hidden, 1, depth=DEPTH)
        return {"standard": Standard(2 * hidden), "mlp": mlp} if self.config.normalise == "standard" else {"mlp": mlp}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        import torch
        from torch import nn

        from bpkit.learn.quick import quick
        from bpkit_mlp.networks import Length

        self.sizes = sizes = self.usable(decoder)
        # A trace may have gaps; the next size above drafts all that the forecast asks for.
        enough = [next(size for size in sizes if size > length) for length in range(sizes[-1])]
        network = nn.Sequential(*self.networks.values())
        self.quick = quick(network, 2 * int(self.facts["hidden_size"]))
        self.decision = Length(network, torch.tensor(enough), self.whole(decoder))

    def whole(self, decoder: DecoderSpec) -> int | None:
        """The block size of every draft, if the forecast does not say it."""
        return None

    def usable(self, decoder: DecoderSpec) -> list[int]:
        """Block sizes to draft at, ascending: 1, and those that were traced and that the decoder can do."""
        traced = [int(size) for size in self.facts["sizes"] if 1 < size <= decoder.max_block_size]
        return [1, *traced]

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if Feature.LAST_HIDDEN not in features:
            return {}
        import torch

        vectors = features[Feature.ANCHOR_EMBEDDING], features[Feature.LAST_HIDDEN]
        return {"length": self.quick(torch.cat(vectors, dim=1).float())[:, 0]}

    def forecast(self, context: Context) -> Tensor:
        """Draft length that the network names, rounded and clipped: int64 [batch]."""
        return self.decision.forecast(self.predicted(context)["length"])

    def select(self, state: State, context: Context) -> Tensor:
        return self.decision.size_for(self.forecast(context))

    def export(self) -> Export:
        """The forecast before each draft."""
        return Export({"policy": self.select_core()}, self.sizes)

    def select_core(self) -> Core:
        """What `select` decides."""
        hidden = int(self.facts["hidden_size"])
        return Core(
            "select",
            self.decision,
            inputs=(given(Feature.ANCHOR_EMBEDDING, hidden), given(Feature.LAST_HIDDEN, hidden)),
            outputs=(
                decision("select"),
                Port("forecast", ("batch",), "int64", "drafted tokens that are expected to be accepted"),
                Port("length", ("batch",), "float32", "the same before rounding and clipping"),
                margin(MARGIN),
            ),
        )


class LdlpThresholdConfig(LdlpConfig):
    """Options of `ldlp_threshold`; the first three may be changed after training."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "threshold": (0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.8, 0.9),
        "keep": ("longer", "shorter"),
        "block_size": tuple(range(2, 33)),
    }

    threshold: float = Field(
        default=0.55, ge=0, le=1, description="least product of the drafter's probabilities at which the draft goes on"
    )
    keep: Literal["longer", "shorter"] = Field(
        default="longer",
        description="of the forecast and the threshold's length: the longer one (published), or the shorter one",
    )
    block_size: int | None = Field(
        default=None,
        ge=2,
        description="with keep=longer, positions to draft, anchor included; by default the trained block size",
    )


class LdlpThreshold(Ldlp):
    """The forecast names one length, the product of the drafter's probabilities another, as in `threshold`.

    - keep=longer, as published: drafting ends where the forecast is exceeded *and* the product is below the threshold.
      A block drafter cannot go on, so that it drafts `block_size` positions, and the longer length is verified.
    - keep=shorter: the forecast is drafted, and verified as far as the product holds.
    """

    name = "ldlp_threshold"
    Config = LdlpThresholdConfig
    wants = Ldlp.wants | {Feature.DRAFT_PROBABILITY}
    config: LdlpThresholdConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        from bpkit_mlp.networks import Trust

        self.trust = Trust(self.config.threshold, longer=self.config.keep == "longer")

    def whole(self, decoder: DecoderSpec) -> int | None:
        if self.config.keep == "shorter":
            return None
        wished = self.config.block_size or decoder.trained_block_size
        return max(size for size in self.usable(decoder) if size <= max(wished, 2))

    def begin(self, context: Context) -> State:
        return {"forecast": context.full(0)}

    def select(self, state: State, context: Context) -> Tensor:
        forecast = state["forecast"] = self.forecast(context)
        return self.decision.size_for(forecast)

    def extend(self, state: State, draft: Draft) -> Tensor:
        trusted = trusted_whole(draft, self._trust(draft) >= self.config.threshold)
        if self.config.keep == "shorter":
            return trusted
        forecast: Tensor = state["forecast"]
        return trusted | (draft.draft_length < forecast)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return self.trust.verify_length(self._trust(draft), draft.draft_length, state["forecast"])

    def export(self) -> Export:
        """The forecast before each draft, and what is verified after it."""
        truncate = Core(
            "truncate",
            self.trust,
            inputs=(
                given(Feature.DRAFT_PROBABILITY),
                given("draft_length"),
                Port("forecast", ("batch",), "int64", "of the last call of select.onnx"),
            ),
            outputs=(
                decision("truncate"),
                Port("trust", ("batch", "width"), "float32", "product of the probabilities so far"),
                margin(MARGIN),
            ),
        )
        return Export({"select": self.select_core(), "truncate": truncate}, self.sizes)

    def _trust(self, draft: Draft) -> Tensor:
        return self.trust.trust(draft[Feature.DRAFT_PROBABILITY])
