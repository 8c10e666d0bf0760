"""Expected tokens over cost: the block size that promises the most tokens per second, by what was accepted lately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Step
from bpkit_adaptive.sizes import BlockSizes

if TYPE_CHECKING:
    from torch import Tensor

COST_CONTEXT = 64
"""Costs are looked up once for so many context lengths: they change slowly, and a lookup costs a decision's time."""

Counts = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class GoodputConfig(PolicyConfig):
    """Options of `goodput`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "discount": (0.8, 0.9, 0.95, 0.98, 0.995),
        "prior": (0.5, 0.7, 0.8),
        "across_requests": (False, True),
    }

    block_sizes: BlockSizes = Field(
        default=tuple(range(1, 17)), description="sizes to choose from: a list, or text such as 1-8+16; 1 is always one"
    )
    discount: float = Field(default=0.95, gt=0, le=1, description="weight of the past after each step")
    prior: float = Field(default=0.7, ge=0, le=1, description="acceptance rate to expect before any is seen")
    prior_weight: float = Field(default=2.0, gt=0, description="drafted tokens that the prior counts for")
    across_requests: bool = Field(default=False, description="begin a request with what the last one learned")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further position, in plain steps, where there is no cost model"
    )


class Memory(BaseModel):
    """Discounted counts by position in the draft: how often it was tested, and how often accepted."""

    model_config = ConfigDict(extra="forbid")

    accepted: Counts
    tested: Counts


class Goodput(Policy):
    """Before every draft, the block size b with the largest E[tokens](b) / cost(b).

        E[tokens](b) = 1 + sum over k < b of (a_1 a_2 ... a_k)
        a_k = (accepted_k + w a_(k-1)) / (tested_k + w),    a_0 = prior,  w = prior_weight
        cost(b) = draft(b) + verify(b) + rest    of the cost model, at the row's context length

    a_k is the chance that position k stands if all before it do. tested_k counts the steps whose first k - 1 tokens
    were accepted and whose k-th was verified; all counts fade by `discount` a step. An untested position is
    taken to be as good as the one before it, so that longer drafts are tried when short ones are accepted whole; and as
    the counts fade the rates return to `prior`, so that no draft is not for ever.

    The objective is TurboSpec's goodput (2406.14066), which has one acceptance rate for all positions and chooses for
    the whole batch. Rates by position are those of proposals for vLLM (pull requests 44336 and 47111), which divide by
    a cost that grows by the same amount with each token. The costs here are those that `bpkit calibrate` measured, with
    one position waiting. Without a cost model a step costs 1 + slope (b - 1) plain steps.

    The rates are pooled over block sizes, although a block-diffusion drafter drafts other tokens at another size.
    Every row counts for itself.
    """

    Config = GoodputConfig
    wants = frozenset()
    config: GoodputConfig

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.memory: Memory | None = None

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.cost = cost
        drafted = [b for b in self.config.block_sizes if 1 < b <= decoder.max_block_size and _priced(cost, b)]
        self.sizes = [1, *drafted]
        self.width = self.sizes[-1] - 1  # the longest draft
        self._costs: dict[int, list[float]] = {}

    def begin(self, context: Context) -> State:
        import torch  # here, so that options can be listed without it

        counts = context.position.new_zeros((context.batch_size, self.width), dtype=torch.float64)
        state = {"accepted": counts, "tested": counts.clone()}  # float64 [batch, longest draft]
        if self.memory is not None:
            for name, known in (("accepted", self.memory.accepted), ("tested", self.memory.tested)):
                count = min(self.width, len(known))
                state[name][:, :count] = counts.new_tensor(known[:count])
        return state

    def select(self, state: State, context: Context) -> Tensor:
        rows = zip(state["accepted"].tolist(), state["tested"].tolist(), context.context_length.tolist(), strict=True)
        chosen = [self.best(self.rates(accepted, tested), self.costs(length)) for accepted, tested, length in rows]
        return context.full(chosen[0]) if len(chosen) == 1 else context.position.new_tensor(chosen)

    def rates(self, accepted: Sequence[float], tested: Sequence[float]) -> list[float]:
        """a_1 .. a_width of the formula."""
        rate, weight, found = self.config.prior, self.config.prior_weight, []
        for hits, tries in zip(accepted, tested, strict=True):
            rate = (hits + weight * rate) / (tries + weight)
            found.append(rate)
        return found

    def best(self, rates: Sequence[float], costs: Sequence[float]) -> int:
        """The block size with the most expected tokens over cost; the smallest of several. `costs` go with `sizes`."""
        expected, standing, length = 1.0, 1.0, 0
        chosen, most = 1, 0.0
        for size, cost in zip(self.sizes, costs, strict=True):
            while length < size - 1:
                standing *= rates[length]
                expected += standing
                length += 1
            if expected > most * cost:
                chosen, most = size, expected / cost
        return chosen

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
        accepted, tested = state["accepted"], state["tested"]
        accepted *= self.config.discount
        tested *= self.config.discount
        outcomes = zip(step.num_accepted.tolist(), step.verify_length.tolist(), strict=True)
        for row, (stood, verified) in enumerate(outcomes):
            if verified:
                accepted[row, :stood] += 1
                tested[row, : stood + (stood < verified)] += 1  # what follows the first wrong token was not tested

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            self.memory = Memory(**{name: rows.mean(dim=0).tolist() for name, rows in state.items()})

    def state_dict(self) -> dict[str, Any]:
        return self.memory.model_dump() if self.memory else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a memory. Raises PolicyError if it is none."""
        try:
            self.memory = Memory.model_validate(state) if state else None
        except ValidationError as error:
            raise PolicyError(f"this is no memory of goodput: {error}") from None


def _priced(cost: CostModel | None, block_size: int) -> bool:
    """Whether the cost model, if there is one, has costs for this block size."""
    if cost is None:
        return True
    try:
        cost.seconds("draft", block_size, 1)
        cost.seconds("verify", block_size, 1)
    except ValueError:  # a table ends somewhere
        return False
    return True
