"""LDLP combined with a threshold: AdaEAGLE-DDD of the same paper (2412.18910, section 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from bpkit.export.core import Export
from bpkit.policy import State
from bpkit.policy.stop_rules import trusted_length, trusted_whole
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature
from bpkit_mlp.ldlp import Ldlp, LdlpConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bpkit_mlp.networks import ResidualMLP


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
        wished = self.config.block_size or decoder.trained_block_size
        self.whole = max(size for size in self.usable(decoder) if size <= max(wished, 2))

    def select(self, state: State, context: Context) -> Tensor:
        forecast = state["forecast"] = self.forecast(context)
        if self.config.keep == "longer":
            return context.full(self.whole)
        return self.block_size_for(forecast)

    def extend(self, state: State, draft: Draft) -> Tensor:
        trusted = trusted_whole(draft, self._trusted(draft))
        if self.config.keep == "shorter":
            return trusted
        forecast: Tensor = state["forecast"]
        return trusted | (draft.draft_length < forecast)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        trusted = trusted_length(draft, self._trusted(draft))
        forecast: Tensor = state["forecast"]
        if self.config.keep == "longer":
            return trusted.maximum(forecast).minimum(draft.draft_length)
        return trusted.minimum(forecast)

    def export(self) -> Export:
        """The forecast before each draft, and what is verified after it."""
        from bpkit_mlp.cores import LengthCore, TrustCore, WholeCore, length_core, standard_of, trust_core

        longer = self.config.keep == "longer"
        given = standard_of(self.networks), cast("ResidualMLP", self.networks["mlp"]), self.block_sizes
        core = WholeCore(*given, self.whole) if longer else LengthCore(*given)
        cores = {
            "select": length_core(core, int(self.facts["hidden_size"])),
            "truncate": trust_core(TrustCore(self.config.threshold, longer=longer)),
        }
        return Export(cores, self.sizes)

    def _trusted(self, draft: Draft) -> Tensor:
        return draft[Feature.DRAFT_PROBABILITY].cumprod(dim=1) >= self.config.threshold  # bool [batch, width]
