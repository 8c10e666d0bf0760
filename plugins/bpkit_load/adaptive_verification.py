"""vLLM's adaptive verification: the drafted tokens of all rows that are most likely to stand, as many as pay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bpkit.export.prices import PassPrices, StepPrices, priced
from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSize
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_load.acceptance_fit import AcceptanceFit, log_odds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Survivals = NDArray[np.float64]

COUNTS = ("accepted", "tested")
"""What a row and the memory keep, by position."""

COST_CONTEXT, KEPT_PRICES = 256, 256
"""Tables of prices are made once for so many context lengths, and so many are kept: some 100 kB each for 64 rows."""

Counts = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class AdaptiveVerificationConfig(PolicyConfig):
    """Options of `adaptive_verification`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "when": ("after", "before"),
        "discount": (0.9, 0.95, 0.98),
        "weight": (2.0, 8.0, 32.0),
    }

    block_size: BlockSize = None
    when: Literal["after", "before"] = Field(
        default="after",
        description="after: cut drafts of `block_size`, as vLLM does; before: draft no more than is to be verified",
    )
    signal: Literal["position", "probability"] = Field(
        default="position",
        description="what tells the chance of a token: its row and position; or the drafter's probability, as in vLLM",
    )
    discount: float = Field(default=0.95, gt=0, le=1, description="weight of a row's past after each step")
    weight: float = Field(
        default=8.0, gt=0, description="drafted tokens that the rate of all rows counts for in a row's"
    )
    memory_discount: float = Field(default=0.99, gt=0, le=1, description="weight of all rows' past after each step")
    prior: float = Field(default=0.7, ge=0, le=1, description="acceptance rate to expect before any is seen")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further position, in plain steps, where there is no cost model"
    )
    fit_every: int = Field(default=100, ge=1, description="steps between two fits of `signal=probability`")
    first_fits: int = Field(
        default=3, ge=0, description="fits before which whole drafts are verified, so that it learns"
    )

    @model_validator(mode="after")
    def _draft_is_known(self) -> AdaptiveVerificationConfig:
        if (self.when, self.signal) == ("before", "probability"):
            raise ValueError("signal=probability is known only after the draft: leave out when=before")
        return self


class AdaptiveVerificationMemory(PolicyMemory):
    """Discounted counts of all rows by position in the draft: how often it was tested, and how often accepted.

    Attributes:
        fit: with `signal=probability`.
    """

    accepted: Counts = []
    tested: Counts = []
    fit: AcceptanceFit | None = None


class AdaptiveVerification(RememberingPolicy[AdaptiveVerificationMemory]):
    """Of all rows' drafted tokens the k with the highest chance of being reached and accepted; k pays best.

        survival(r, i) = a(r, 1) a(r, 2) ... a(r, i)         chance that token i of row r stands
        k = argmax of (rows + sum of the k largest survivals) / cost(k)
        a(r, i) = (accepted(r, i) + weight A(i)) / (tested(r, i) + weight)

    A token's survival is at most that of the one before it, so the k largest are beginnings of drafts. Tokens that tie
    are taken or left together, so that no row's place matters. A(i) is the rate of position i over all rows, from
    counts that fade by `memory_discount` a step, leaning on position i - 1 with the same weight, and A(1) on `prior`; a
    row's own counts fade by `discount`. cost(k) is draft + verify + rest, with the widest row and rows + k positions.

    vLLM drafts `block_size - 1` tokens for every row and cuts after the draft, so drafting is always paid for; with
    `when="before"` the same rule says how much to draft, and k = 0 drafts nothing. With `signal="probability"` a(r, i)
    is an `AcceptanceFit` of the drafter's probability. docs/policies/load.md says what differs.
    """

    Config = AdaptiveVerificationConfig
    Memory = AdaptiveVerificationMemory
    joint = True
    config: AdaptiveVerificationConfig

    @property
    def wants(self) -> frozenset[Feature]:  # type: ignore[override]
        """The drafter's probabilities, if chances go by them."""
        config = getattr(self, "config", None)  # the base class asks for `wants` before the options are there
        by_probability = config is not None and config.signal == "probability"
        return frozenset({Feature.DRAFT_PROBABILITY}) if by_probability else frozenset()

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        most = min(self.config.block_size or decoder.trained_block_size, decoder.max_block_size)
        self.cost, self.block_size = cost, max([1, *priced(cost, range(2, most + 1))])
        self.width = self.block_size - 1
        self._prices: dict[tuple[int, int], _Prices] = {}

    def known(self) -> AdaptiveVerificationMemory:
        """The memory, which may be of shorter or longer drafts, for drafts up to the longest."""
        lists = {name: getattr(self.memory, name) for name in COUNTS}
        if all(len(known) == self.width for known in lists.values()):
            return self.memory
        counts = {name: [*known[: self.width], *[0.0] * (self.width - len(known))] for name, known in lists.items()}
        return AdaptiveVerificationMemory(**counts, fit=self.memory.fit)

    # Decisions

    def begin(self, context: Context) -> State:
        import torch  # here, so that options can be listed without it

        kept = ("odds",) if self.config.signal == "probability" else COUNTS
        return {name: torch.zeros(context.batch_size, self.width, dtype=torch.float64) for name in kept}

    def select(self, state: State, context: Context) -> Tensor:
        if self.config.when == "after" or not self.width:
            return context.full(self.block_size)
        return 1 + self._worth_verifying(self.survivals(state), context, context.full(self.width))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if self.config.when == "before" or not self.width:
            return draft.draft_length
        if self.config.signal == "probability":
            import torch  # here, so that options can be listed without it

            odds = log_odds(draft[Feature.DRAFT_PROBABILITY].numpy(), self.width)
            state["odds"] = torch.from_numpy(odds)
            if self.acceptance.fits < self.config.first_fits:
                return draft.draft_length
        return self._worth_verifying(self.survivals(state), draft.context, draft.draft_length)

    def _worth_verifying(self, survival: Survivals, context: Context, limit: Tensor) -> Tensor:
        """Drafted tokens to verify: int64 [batch], up to `limit` and what may still be generated."""
        most = limit.minimum(context.remaining - 1).clamp(min=0)
        prices = self.prices(int(context.context_length.max()), context.running)
        return context.position.new_tensor(most_tokens_per_second(survival, most.numpy(), prices))

    def survivals(self, state: State) -> Survivals:
        """Chance that each token of a draft stands: float64 [batch, width]."""
        import numpy as np  # here, so that options can be listed without it

        if self.config.signal == "probability":
            chances: NDArray[Any] = self.acceptance.chances(state["odds"].numpy())
        else:
            weight = self.config.weight
            accepted, tested = (state[name].numpy() for name in COUNTS)
            chances = (accepted + weight * np.array(self.rates())) / (tested + weight)
        found: Survivals = np.cumprod(chances, axis=1)
        return found

    @property
    def acceptance(self) -> AcceptanceFit:
        """The fit in the memory, or a new one where there is none for drafts of this length."""
        fit = self.memory.fit
        if fit is None or len(fit.weight) != self.width:
            fit = self.memory.fit = AcceptanceFit.fresh(self.width)
        return fit

    def rates(self) -> list[float]:
        """A(1) .. A(width) of the formula, of all rows."""
        known, rate, weight, found = self.known(), self.config.prior, self.config.weight, []
        for hits, tries in zip(known.accepted, known.tested, strict=True):
            rate = (hits + weight * rate) / (tries + weight)
            found.append(rate)
        return found

    def prices(self, context_length: int, rows: int) -> _Prices:
        """What steps of so many rows cost at about this context length."""
        key = context_length // COST_CONTEXT, rows
        if key not in self._prices:
            if len(self._prices) >= KEPT_PRICES:
                self._prices.pop(next(iter(self._prices)))
            at = key[0] * COST_CONTEXT + COST_CONTEXT // 2
            step = StepPrices(self.cost, self.config.slope, at, rows)
            self._prices[key] = _Prices(step, self.block_size, drafted=self.config.when == "after")
            if self.config.signal == "probability":
                self._prices[key].always += step.of("features", self.block_size)
        return self._prices[key]

    # Learning

    def observe(self, state: State, step: Step) -> None:
        import torch  # here, so that options can be listed without it

        place, accepted = torch.arange(self.width), step.num_accepted
        tested = (accepted + 1).minimum(step.verify_length)  # what follows the first wrong token was not tested
        if self.config.signal == "probability":
            odds, fit = state["odds"].numpy(), self.acceptance
            fit.add(odds, *((place < count[:, None]).numpy() for count in (accepted, tested)))
            if fit.steps >= self.config.fit_every:
                fit.fit()
            return
        known, kept = self.known(), self.config.memory_discount
        for name, count in zip(COUNTS, (accepted, tested), strict=True):
            counted = place < count[:, None]
            state[name] = state[name] * self.config.discount + counted
            new = counted.sum(dim=0).tolist()
            setattr(known, name, [kept * old + more for old, more in zip(getattr(known, name), new, strict=True)])
        self.memory = known


class _Prices:
    """What a step of some rows costs by what it verifies.

    Args:
        drafted: whether all rows have drafted whole blocks, whatever is verified; else they draft what is verified.
    """

    def __init__(self, step: StepPrices, block_size: int, *, drafted: bool) -> None:
        self.rows, self.always = step.rows, step.of("rest", 1) + (step.of("draft", block_size) if drafted else 0.0)
        self.verify = PassPrices(step, "verify", 1, block_size)
        self.draft = None if drafted else PassPrices(step, "draft", 2, block_size)

    def of(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of verifying none, one, ... all of some drafted tokens: float64 [tokens + 1].

        Args:
            places: of the tokens in their drafts, from 0: int64 [tokens].
        """
        import numpy as np  # here, so that options can be listed without it

        sizes = np.ones(len(places) + 1, np.int64)
        np.maximum.accumulate(places + 2, out=sizes[1:])
        verified = np.arange(self.rows, self.rows + len(places) + 1)
        seconds = self.verify.of(sizes, verified) + self.always
        if self.draft is not None:  # a row that drafts has its anchor in the block
            seconds[1:] += self.draft.of(sizes[1:], verified[1:] - self.rows + np.cumsum(places == 0))
        return seconds


def most_tokens_per_second(survival: Survivals, most: NDArray[np.int64], prices: _Prices) -> list[int]:
    """Drafted tokens of each row to verify, so that all rows together have the most expected tokens over cost.

    Args:
        survival: chance that a token of a draft stands, not increasing along a row: float64 [batch, width].
        most: tokens that a row has, or may verify: int64 [batch].
    """
    import numpy as np  # here, so that options can be listed without it

    rows, width = survival.shape
    there = np.arange(width) < most[:, None]
    chances = np.where(there, survival, -1.0).ravel()
    order = np.argsort(-chances, kind="stable")[: int(there.sum())]
    best = chances[order]
    tokens = np.concatenate(([0.0], best)).cumsum() + rows
    worth = tokens / prices.of(order % width)
    worth[1:-1][best[1:] == best[:-1]] = -math.inf  # not through a tie
    count = int(worth.argmax())
    if not count:
        return [0] * rows
    taken: list[int] = (there & (survival >= best[count - 1])).sum(axis=1).tolist()
    return taken
