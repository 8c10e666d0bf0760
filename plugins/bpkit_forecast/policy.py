"""The policy `forecast`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from bpkit.export.core import Export
from bpkit.learn.trained import TrainedPolicy
from bpkit.policy import PolicyConfig, PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature
from bpkit_forecast.config import ForecastConfig
from bpkit_forecast.networks import After, Before, Calibrated, Prepared
from bpkit_forecast.plan import Plan

VECTORS = (Feature.TARGET_FEATURES, Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN)


class Forecast(TrainedPolicy):
    """Drafts the block that gains most at the speed that decoding goes at anyway.

    A step of block size b yields 1 + sum_k S_b(k) tokens, S_b(k) the chance that drafted token k and all before it
    stand, and takes C(b) seconds. In the long run tokens per second are highest if every step maximises

        E[tokens] - rho * C(b),

    where rho is the speed itself: a second spent here is rho tokens not decoded elsewhere (the average-reward
    criterion; Howard 1960, "Dynamic programming and Markov processes"). rho is taken as `rate` times the speed of the
    best fixed size, which follows from the cost model and the mean yields in training, so that one set of weights
    serves any device.

    - `select` forecasts S before the draft, from the target's hidden states at the position that decided the anchor
      (the layers that the drafter reads, and the last) and the anchor's embedding, by a network that learned from every
      position and block size of a trace. Block size 1 is one of the choices. Where the forecasts kept from training say
      that asking gains less than the time it takes (`decision`), the best fixed size is drafted without asking.
    - `truncate`, if the option is set, reads the drafter's calibrated confidences, which know more, and verifies up to
      where a token's chance to stand is no longer worth its cost: the same rule, with the draft already paid for.

    Without a cost model (`cost` None) steps are taken to cost what they did where the policy was trained.
    """

    Config: ClassVar[type[PolicyConfig]] = ForecastConfig
    name = "forecast"
    trainer = "bpkit_forecast.training:ForecastModule"
    wants = frozenset(VECTORS)
    config: ForecastConfig

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        if self.config.truncate:
            more = {Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY}
            self.wants = type(self).wants | more  # type: ignore[misc]

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        sizes, width = len(facts["block_sizes"]), max(facts["block_sizes"]) - 1
        before = Before(facts["inputs"], sizes, width, facts["hidden"], facts["dropout"])
        return {"before": before, "after": After(sizes, width)}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        self.decoder = decoder
        trained = self.facts["block_sizes"]
        usable = [size for size in trained if size <= decoder.max_block_size]
        if not usable:
            raise PolicyError(
                f"policy 'forecast' was trained for block sizes {trained}; this decoder drafts none of them"
            )
        config = self.config
        self.plan = Plan(
            self.facts,
            usable,
            cost,
            rate=config.rate,
            margin=config.margin,
            decision=config.decision,
            device=decoder.device,
        )
        self.columns = {size: column for column, size in enumerate(trained)}
        self.before = Prepared(cast("Before", self.networks["before"]), self.plan.columns)
        self.after = Calibrated(cast("After", self.networks["after"]))
        if not self.plan.asks:
            self.wants -= frozenset(VECTORS)  # type: ignore[misc]

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if VECTORS[0] not in features:
            return {}
        stands = self.before([features[name] for name in VECTORS])  # [batch, usable sizes, width]
        return {"tokens": self.plan.expected(stands)}

    def select(self, state: State, context: Context) -> Tensor:
        if not self.plan.asks:
            return context.full(self.plan.sizes[self.plan.floor])
        tokens = self.predicted(context)["tokens"]
        return context.position.new_tensor(self.plan.best_sizes(tokens, context.context_length))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if not self.config.truncate:
            return draft.draft_length
        rows = zip(
            draft.block_size.tolist(),
            draft.draft_length.tolist(),
            draft[Feature.DRAFT_PROBABILITY].tolist(),
            draft[Feature.DRAFT_ENTROPY].tolist(),
            draft.context.context_length.tolist(),
            strict=True,
        )
        return draft.draft_length.new_tensor([self._length(*row) for row in rows])

    def _length(
        self, block_size: int, draft_length: int, probability: list[float], entropy: list[float], context_length: int
    ) -> int:
        """Drafted tokens to verify, of one row."""
        place = self.columns.get(block_size, -1)
        stands = self.after(place, probability[:draft_length], entropy[:draft_length])
        return self.plan.best_length(stands, context_length)

    def export(self) -> Export:
        """`select`, and `truncate` if the option is set."""
        from bpkit_forecast.cores import SelectCore, TruncateCore, select_core, truncate_core

        hidden, sizes = self.decoder.hidden_size, self.plan.sizes
        layers = (self.facts["inputs"] - 2 * hidden) // hidden
        before, after = cast("Before", self.networks["before"]), cast("After", self.networks["after"])
        made = {"select": select_core(SelectCore(before, self.facts, self.plan.columns, self.config), hidden, layers)}
        if self.config.truncate:
            core = TruncateCore(after, self.facts, self.plan.columns, self.config)
            made["truncate"] = truncate_core(core, 1 + len(sizes), max(sizes))
        return Export(made, [1, *sizes], self.plan.curves)
