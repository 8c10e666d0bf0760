"""TurboSpec's goodput: one acceptance rate for all rows, and the block size with the most tokens per second for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from bpkit.export.prices import StepPrices, priced
from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSizesWithNoDraft
from bpkit.types import Context, CostModel, DecoderSpec, Step

if TYPE_CHECKING:
    from torch import Tensor

COST_CONTEXT = 64
"""Costs are looked up once for so many context lengths: they change slowly, and a lookup costs a decision's time."""

Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TurboSpecConfig(PolicyConfig):
    """Options of `turbospec`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "discount": (0.8, 0.9, 0.95, 0.98, 0.995),
        "prior": (0.5, 0.7, 0.8),
    }

    block_sizes: BlockSizesWithNoDraft = Field(
        default=tuple(range(1, 17)), description="sizes to choose from: a list, or text such as 1-8+16; 1 is always one"
    )
    discount: float = Field(default=0.95, gt=0, le=1, description="weight of the past after each step")
    prior: float = Field(default=0.7, ge=0, le=1, description="acceptance rate to expect before any is seen")
    prior_weight: float = Field(default=2.0, gt=0, description="drafted tokens that the prior counts for")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further position, in plain steps, where there is no cost model"
    )


class TurboSpecMemory(PolicyMemory):
    """Discounted counts over all rows: drafted tokens that were tested, and that were accepted."""

    accepted: Count = 0.0
    tested: Count = 0.0


class TurboSpec(RememberingPolicy[TurboSpecMemory]):
    """Before every draft, for all rows, the block size b with the largest goodput.

        goodput(b) = rows (1 - a^b) / (1 - a) / cost(b, rows)
        a = (accepted + w prior) / (tested + w),    w = prior_weight

    a is one acceptance rate: of all rows and positions, over the last steps (counts fade by `discount` a step). tested
    counts drafted tokens up to the first that was refused. cost(b, rows) is draft + verify + rest of so many rows, at
    the longest row's context length; where the cost model does not price so many, each row pays what it would alone.

    TurboSpec, before called SmartSpec (2406.14066). docs/policies/load.md says what differs; `goodput` is the same
    objective for each row, with a rate for each position.
    """

    Config = TurboSpecConfig
    Memory = TurboSpecMemory
    wants = frozenset()
    joint = True
    config: TurboSpecConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.cost = cost
        self.sizes = [1, *priced(cost, (b for b in self.config.block_sizes if b <= decoder.max_block_size))]
        self._costs: dict[tuple[int, int], list[float]] = {}

    @property
    def rate(self) -> float:
        """The acceptance rate a."""
        known, weight = self.memory, self.config.prior_weight
        return (known.accepted + weight * self.config.prior) / (known.tested + weight)

    def select(self, state: State, context: Context) -> Tensor:
        costs = self.costs(int(context.context_length.max()), context.running)
        worth = [tokens / cost for tokens, cost in zip(self.tokens(self.rate), costs, strict=True)]
        return context.full(self.sizes[worth.index(max(worth))])

    def tokens(self, rate: float) -> list[float]:
        """Expected tokens of a row, by `sizes`: 1 + a + a^2 + ... + a^(b - 1)."""
        if rate == 1:
            return [float(size) for size in self.sizes]
        return [(1 - rate**size) / (1 - rate) for size in self.sizes]

    def costs(self, context_length: int, rows: int) -> list[float]:
        """What a step of each of `sizes` costs a row, beside so many that run."""
        key = context_length // COST_CONTEXT, rows
        if key not in self._costs:
            at = key[0] * COST_CONTEXT + COST_CONTEXT // 2
            prices = StepPrices(self.cost, self.config.slope, at, rows)
            self._costs[key] = [prices.step(size) / rows for size in self.sizes]
        return self._costs[key]

    def observe(self, state: State, step: Step) -> None:
        tested = (step.num_accepted + 1).minimum(
            step.verify_length
        )  # what follows the first wrong token was not tested
        known, kept = self.memory, self.config.discount
        known.accepted = kept * known.accepted + int(step.num_accepted.sum())
        known.tested = kept * known.tested + int(tested.sum())
