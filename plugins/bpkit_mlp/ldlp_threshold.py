"""LDLP combined with a threshold: AdaEAGLE-DDD of the same paper (2412.18910, section 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bpkit.export.core import Core, Export, Port, decision, given, margin
from bpkit.policy import State
from bpkit.policy.stop_rules import trusted_whole
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature
from bpkit_mlp.blockpilot import MARGIN
from bpkit_mlp.ldlp import Ldlp, LdlpConfig

if TYPE_CHECKING:
    from torch import Tensor


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
