"""The policy `forecast`."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from bpkit.export.core import Core, Export, Port, decision, given, margin
from bpkit.learn import LearnedConfig, LearnedPolicy
from bpkit.policy import PolicyConfig, State
from bpkit.types import CostModel, DecoderSpec, Draft, Feature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bpkit_forecast.networks import After

VECTORS = (Feature.TARGET_FEATURES, Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN)


class ForecastConfig(LearnedConfig):
    """Options of `forecast`."""

    truncate: bool = Field(
        default=False,
        description="also read the draft's confidences and verify only what pays; worth it where verifying is dear",
    )
    grid = {"rate": (0.7, 0.85, 1.0), "truncate": (False, True)}


class Forecast(LearnedPolicy):
    """Drafts the block that gains most at the speed that decoding goes at anyway.

    A step of block size b yields 1 + sum_k S_b(k) tokens, S_b(k) the chance that drafted token k and all before it
    stand, and takes C(b) seconds. Every step maximises E[tokens] - rho * C(b), rho being what a second is worth
    (`bpkit.learn.gains`).

    - `select` forecasts S before the draft, from the target's hidden states at the position that decided the anchor
      (the layers that the drafter reads, and the last) and the anchor's embedding, by a network that learned from every
      position and block size of a trace. Block size 1 is one of the choices. Where the forecasts kept from training say
      that asking gains less than the time it takes (`decision`), the best fixed size is drafted without asking.
    - `truncate`, if the option is set, reads the drafter's calibrated confidences, which know more, and verifies up to
      where a token's chance to stand is no longer worth its cost: the same rule, with the draft already paid for.

    Without a cost model (`cost` None) steps are taken to cost what they did where the policy was trained.
    """

    Config: ClassVar[type[PolicyConfig]] = ForecastConfig
    name, deciding = "forecast", "before"
    trainer = "bpkit_forecast.training:ForecastModule"
    wants = frozenset(VECTORS)
    config: ForecastConfig

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.reads = VECTORS  # the order in which its weights have them
        if self.config.truncate:
            self.wants = self.wants | {Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY}  # type: ignore[misc]

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """Both networks for `facts`: `block_sizes`, `inputs` (numbers in the vectors together), `hidden`, `dropout`."""
        from bpkit_forecast.networks import After, Before

        sizes = facts["block_sizes"]
        before = Before(facts["inputs"], sizes, facts["hidden"], facts["dropout"])
        return {"before": before, "after": After(len(sizes), max(sizes) - 1)}

    def widths(self) -> Mapping[str, int]:
        hidden = self.decoder.hidden_size
        return {name: hidden if name != VECTORS[0] else self.facts["inputs"] - 2 * hidden for name in VECTORS}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        from bpkit.export.inputs import CurveRows
        from bpkit_forecast.networks import Truncation

        self.verify_seconds = CurveRows(self.gains.curves, attrgetter("verify"))
        after = cast("After", self.networks["after"]).cpu()  # of numbers that are on the host
        self.truncation = Truncation(after, self.facts, self.gains.columns, self.config.rate)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if not self.config.truncate:
            return draft.draft_length
        verify = self.verify_seconds(draft.context.context_length)
        confidence = draft[Feature.DRAFT_PROBABILITY], draft[Feature.DRAFT_ENTROPY]
        gains = self.truncation.gains(*confidence, draft.block_size, draft.draft_length, verify, self.gains.rho)
        return gains.argmax(dim=1)

    def export(self) -> Export:
        """`select`, and `truncate` if the option is set."""
        cores, sizes = {"select": self.select_core()}, self.gains.sizes
        if self.config.truncate:
            cores["truncate"] = Core(
                "truncate",
                self.truncation,
                inputs=(
                    *map(given, (Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, "block_size", "draft_length")),
                    given("verify_seconds", max(sizes)),
                    given("typical_step_seconds", 1 + len(sizes)),
                ),
                outputs=(
                    decision("truncate"),
                    Port("gains", ("batch", "kept"), "float32", "tokens gained by verifying 0, 1, ... of the draft"),
                    margin("how far the choice is ahead of the next, in tokens"),
                ),
            )
        return Export(cores, [1, *sizes], self.gains.curves)
