"""Expected tokens over cost: the block size that promises the most tokens per second, by what was accepted lately."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from bpkit.export.prices import priced
from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State, fade
from bpkit.sizes import BlockSizesWithNoDraft
from bpkit.types import Context, CostModel, DecoderSpec, Step

if TYPE_CHECKING:
    from torch import Tensor

COST_CONTEXT = 64
"""Costs are looked up once for so many context lengths: they change slowly, and a lookup costs a decision's time."""

COUNTS = ("accepted", "tested")
"""What a row keeps, by position."""

Counts = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class GoodputConfig(PolicyConfig):
    """Options of `goodput`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "discount": (0.8, 0.9, 0.95, 0.98, 0.995),
        "prior": (0.5, 0.7, 0.8),
        "across_requests": (False, True),
    }

    block_sizes: BlockSizesWithNoDraft = Field(
        default=tuple(range(1, 17)), description="sizes to choose from: a list, or text such as 1-8+16; 1 is always one"
    )
    discount: float = Field(default=0.95, gt=0, le=1, description="weight of the past after each step")
    prior: float = Field(default=0.7, ge=0, le=1, description="acceptance rate to expect before any is seen")
    prior_weight: float = Field(default=2.0, gt=0, description="drafted tokens that the prior counts for")
    across_requests: bool = Field(default=False, description="begin a request with what those before it learned")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further position, in plain steps, where there is no cost model"
    )


class GoodputMemory(PolicyMemory):
    """Discounted counts by position in the draft: how often it was tested, and how often accepted."""

    fading = frozenset(COUNTS)
    bounds = (0.0, math.inf)

    accepted: Counts = []
    tested: Counts = []


class Goodput(RememberingPolicy[GoodputMemory]):
    """Before every draft, the block size b with the largest E[tokens](b) / cost(b).

        E[tokens](b) = 1 + sum over k < b of (a_1 a_2 ... a_k)
        a_k = (accepted_k + w a_(k-1)) / (tested_k + w),    a_0 = prior,  w = prior_weight
        cost(b) = draft(b) + verify(b) + rest    of the cost model, at the row's context length

    a_k is the chance that position k stands if all before it do. tested_k counts the steps whose first k - 1 tokens
    were accepted and whose k-th was verified; all counts fade by `discount` a step. Costs are for one position waiting;
    without a cost model a step costs 1 + slope (b - 1) plain steps. Every row counts for itself.

    The objective is TurboSpec's goodput (2406.14066), the rates by position are those of proposals for vLLM;
    docs/policies/adaptive.md compares.
    """

    Config = GoodputConfig
    Memory = GoodputMemory
    wants = frozenset()
    config: GoodputConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.cost = cost
        self.sizes = [1, *priced(cost, (b for b in self.config.block_sizes if b <= decoder.max_block_size))]
        self.width = self.sizes[-1] - 1  # the longest draft
        self._costs: dict[int, list[float]] = {}

    def known(self) -> GoodputMemory:
        """The memory, which may be of shorter or longer drafts, for drafts up to the longest."""
        counts = {name: [*known[: self.width], *[0.0] * (self.width - len(known))] for name, known in self.memory}
        return GoodputMemory(**counts)

    def begin(self, context: Context) -> State:
        return self.known().rows(context)  # float64 [batch, longest draft]

    def select(self, state: State, context: Context) -> Tensor:
        lengths = context.context_length.tolist()
        if len(lengths) == 1:  # plain numbers take a fifth of the time of arrays
            rates = self.rates(*(state[name][0].tolist() for name in COUNTS))
            worth = self.worth(rates, self.costs(lengths[0]))
            return context.full(self.sizes[worth.index(max(worth))])
        import numpy as np  # here, so that options can be listed without it

        rates = self.rates(*([*np.ascontiguousarray(state[name].numpy().T)] for name in COUNTS))
        worth = self.worth(rates, [*np.array([self.costs(length) for length in lengths]).T])
        return context.position.new_tensor(np.array(self.sizes)[np.argmax(worth, axis=0)])

    # Of one row, or of all at once: each value below is a number, or an array with one for each row.

    def worth(self, rates: Sequence[Any], costs: Sequence[Any]) -> list[Any]:
        """Expected tokens over cost, by `sizes`, as `costs` are."""
        expected = [*accumulate(accumulate(rates, mul), initial=1.0)]  # tokens of a step, by drafted tokens
        return [expected[size - 1] / cost for size, cost in zip(self.sizes, costs, strict=True)]

    def rates(self, accepted: Sequence[Any], tested: Sequence[Any]) -> list[Any]:
        """a_1 .. a_width of the formula, from counts by position."""
        rate, weight, found = self.config.prior, self.config.prior_weight, []
        for hits, tries in zip(accepted, tested, strict=True):
            rate = (hits + weight * rate) / (tries + weight)
            found.append(rate)
        return found

    def costs(self, context_length: int) -> list[float]:
        """What a step of each of `sizes` costs at about this context length."""
        place = context_length // COST_CONTEXT
        if place not in self._costs:
            at = place * COST_CONTEXT + COST_CONTEXT // 2
            self._costs[place] = [self._step(size, at) for size in self.sizes]
        return self._costs[place]

    def _step(self, size: int, at: int) -> float:
        if self.cost is None:
            return 1 + self.config.slope * (size - 1)
        drafting = self.cost.seconds("draft", size, at) if size > 1 else 0.0
        return drafting + self.cost.seconds("verify", size, at) + self.cost.seconds("rest", 1, at)

    def observe(self, state: State, step: Step) -> None:
        import torch  # here, so that options can be listed without it

        place, accepted = torch.arange(self.width), step.num_accepted
        tested = (accepted + 1).minimum(step.verify_length)  # what follows the first wrong token was not tested
        for name, count in zip(COUNTS, (accepted, tested), strict=True):
            state[name] = state[name] * self.config.discount + (place < count[:, None])
        fade(state, self.config.discount)

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            self.memory = self.known().after(state)
