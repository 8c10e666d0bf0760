"""Source and block size of each draft by expected tokens over cost, from what sources offer and what stood before."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bpkit.files import faults
from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.sizes import BlockSizesWithNoDraft
from bpkit.types import Context, CostModel, DecoderSpec, Feature, Plan, Step, of_source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.float64]

COST_CONTEXT = 64
"""Costs are looked up once for so many context lengths: they change slowly, and a lookup costs a decision's time."""
LONGEST_MATCH, MOST_SUPPORT, SHARES = 8, 2, (0.4, 0.6, 0.8)
"""Longer matches and more support count as these; bounds between ranges of shares."""
SUREST = 0.999
"""Chances are kept below, so that their odds are finite."""
NAMES = ("accepted", "tested")
OF_AN_OFFER = (Feature.SOURCE_OFFER, Feature.SOURCE_MATCH, Feature.SOURCE_SHARE, Feature.SOURCE_SUPPORT)
Option = tuple[float, int, int]
"""Expected tokens, block size and source."""
Clue = tuple[int, ...]
"""What is known of an offer: length of its match, range of its share, support."""


class PortfolioConfig(PolicyConfig):
    """Options of `portfolio`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"discount": (0.8, 0.9, 0.95), "weight": (8.0, 16.0, 32.0)}

    block_sizes: BlockSizesWithNoDraft = Field(
        default=tuple(range(1, 17)), description="sizes to choose from: a list, or text such as 1-8+16; 1 is always one"
    )
    discount: float = Field(default=0.9, gt=0, le=1, description="weight of a request's past after each of its steps")
    weight: float = Field(default=16.0, gt=0, description="drafted tokens that what is known more broadly counts for")
    memory_discount: float = Field(
        default=0.999, gt=0, le=1, description="weight of what all requests taught after each step"
    )
    prior: float = Field(default=0.6, gt=0, lt=1, description="acceptance rate to expect before any is seen")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further position, in plain steps, where there is no cost model"
    )


class PortfolioMemory(BaseModel):
    """Discounted counts by source, clue and position: how often it was tested, and how often it stood."""

    model_config = ConfigDict(extra="forbid")

    accepted: list[Any]
    tested: list[Any]


class Portfolio(Policy):
    """Before every draft, the source s and block size b with the largest E[tokens](s, b) / cost(s, b).

        E[tokens](s, b) = 1 + sum over k < b of (a_1 a_2 ... a_k)
        cost(s, b) = draft_s(b) + catch_up_s(positions that wait) + verify(b) + rest

    a_k is the chance that position k of the source's draft stands if all before it do. It is counted at three levels:
    of the source, of its offers with this length of match, and of those that also have this share of occurrences and
    this support by other sources. Each leans on the one before it with `weight` tokens, the first on position k - 1,
    and that on `prior`. These counts are of all requests and fade by `memory_discount` a step. A request that accepts
    more, or less, of a source than they say shifts the odds of its chances: by the odds of what it accepted over the
    odds of what was expected, both discounted by `discount` and leaning on the expected with `weight` tokens.

    An offer is compared with what the step yields whether it was drafted or not, so that free sources need no
    exploring. No draft is worth 1 / plain step. Without a cost model a step costs 1 + slope (b - 1) plain steps.

    Rows that run together share passes as wide as the widest of them. Where the cost model prices so many rows, they
    are decided together: for each width every row takes what promises most within it, and the width with the most
    tokens of all rows over the cost of the step is chosen. Catching up is left out there.
    """

    Config = PortfolioConfig
    wants = frozenset(OF_AN_OFFER)
    joint = True
    config: PortfolioConfig
    levels: Sequence[Counts] = ()

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.sources = decoder.sources
        try:
            self.models = [] if cost is None else [of_source(cost, place) for place in range(len(self.sources))]
        except ValueError as error:
            raise PolicyError(f"policy 'portfolio': {error}") from None
        self.sizes = [
            [b for b in self.config.block_sizes if 1 < b <= source.max_block_size and self._priced(place, b)]
            for place, source in enumerate(self.sources)
        ]
        self.width = max((sizes[-1] - 1 for sizes in self.sizes if sizes), default=1)
        self.levels = [_zeros(shape) for shape in self._shapes()]
        self._costs: dict[tuple[int, int], StepCosts] = {}

    def _priced(self, source: int, block_size: int) -> bool:
        """Whether the cost model, if there is one, has costs for this block size."""
        if not self.models:
            return True
        try:
            self.models[source].seconds("draft", block_size, 1)
            self.models[0].seconds("verify", block_size, 1)
        except ValueError:  # a table ends somewhere
            return False
        return True

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the counts of each level: accepted and tested, sources, clues, positions."""
        clues = (LONGEST_MATCH + 1, len(SHARES) + 1, MOST_SUPPORT + 1)
        return [(2, len(self.sources), *clues[:known], self.width) for known in (0, 1, 3)]

    # Decisions

    def begin(self, context: Context) -> State:
        rows, like = (context.batch_size, len(self.sources)), context.position
        first = [[source.work.first(n - 1) for source in self.sources] for n in context.context_length.tolist()]
        odds = like.new_zeros((*rows, 3)).double()  # discounted tokens: accepted, expected, tested
        return {"waiting": like.new_tensor(first), "odds": odds, **_known(context)}

    def select(self, state: State, context: Context) -> Plan:
        state.update(_known(context))
        rows = [*zip(*_offers(state), state["odds"].tolist(), strict=True)]
        options = [self._options(*row) for row in rows]
        lengths, waiting = context.context_length.tolist(), state["waiting"].tolist()
        costs = [self.costs(length, context.running) for length in lengths]
        longest = costs[lengths.index(max(lengths))]
        if len(rows) > 1 and longest.of_rows:
            best = _together(options, longest, [source.work.free for source in self.sources])
        else:
            best = [_alone(*row) for row in zip(options, costs, waiting, strict=True)]
        sizes, sources = (context.position.new_tensor(column) for column in zip(*best, strict=True))
        return Plan(sizes, sources)

    def _options(self, offer: Sequence[int], clue: Sequence[Clue], odds: Sequence[Sequence[float]]) -> list[Option]:
        """What one row may draft, and the tokens to expect of it."""
        found = [(1.0, 1, 0)]
        for source, sizes in enumerate(self.sizes):
            most = min(offer[source], self.width)
            if not most or not sizes:
                continue
            chances = _shifted(self.chances(source, clue[source], most), odds[source], self.config.weight)
            tokens = [*accumulate(accumulate(chances, mul), initial=1.0)]
            found += [(tokens[size - 1], size, source) for size in sizes if size - 1 <= most]
        return found

    def chances(self, source: int, clue: Clue, count: int) -> list[float]:
        """a_1 .. a_count of the formula, of all requests."""
        weight, rate, found = self.config.weight, self.config.prior, []
        match, share, support = clue
        broad, narrow, own = self.levels
        counts = (broad[:, source], narrow[:, source, match], own[:, source, match, share, support])
        for columns in zip(*(level[:, :count].T.tolist() for level in counts), strict=True):
            (hits, tries), *finer = columns
            rate = leaning = (hits + weight * rate) / (tries + weight)
            for hits, tries in finer:
                leaning = (hits + weight * leaning) / (tries + weight)
            found.append(min(leaning, SUREST))
        return found

    def costs(self, length: int, running: int) -> StepCosts:
        """What steps cost a row at about this context length, beside so many that run."""
        key = length // COST_CONTEXT, running
        if key not in self._costs:
            at = key[0] * COST_CONTEXT + COST_CONTEXT // 2
            try:
                self._costs[key] = StepCosts(self.models, self.config.slope, self.sizes, at, running)
            except (AttributeError, ValueError):  # it has no figures for so many rows
                self._costs[key] = StepCosts(self.models, self.config.slope, self.sizes, at)
        return self._costs[key]

    # Learning

    def observe(self, state: State, step: Step) -> None:
        for level in self.levels:
            level *= self.config.memory_discount
        odds = (state["odds"] * self.config.discount).tolist()
        waiting, (offer, clue) = state["waiting"].tolist(), _offers(state)
        counted: list[tuple[int, Clue, int, int]] = []  # after all rows, so that none depends on another's place
        drafts = zip(
            *(getattr(step, name).tolist() for name in ("source", "draft_length", "verify_length")), strict=True
        )
        for row, ((source, length, verified), stood) in enumerate(zip(drafts, step.num_accepted.tolist(), strict=True)):
            agreed = [-1] * len(offer[row]) if step.offer_agreed is None else step.offer_agreed[row].tolist()
            for place, of_place in enumerate(self.sources):
                drafted = place == source and length > 0
                if agreed[place] >= 0:  # offers are tested up to what follows the first token that differs
                    told = agreed[place], min(agreed[place] + 1, offer[row][place], stood + 1)
                else:
                    told = (stood, min(stood + 1, verified)) if drafted else (0, 0)
                tested = min(told[1], self.width)
                accepted = min(told[0], tested)
                if tested:
                    expected = sum(self.chances(place, clue[row][place], tested))
                    shown = zip(odds[row][place], (accepted, expected, tested), strict=True)
                    odds[row][place] = [was + more for was, more in shown]
                    counted.append((place, clue[row][place], accepted, tested))
                work, waited = of_place.work, waiting[row][place]
                after = work.after_draft(length, stood) if drafted else work.after_no_draft(waited, stood + 1)
                waiting[row][place] = after
        for known in counted:
            self._count(*known)
        state["odds"], state["waiting"] = state["odds"].new_tensor(odds), state["waiting"].new_tensor(waiting)

    def _count(self, source: int, clue: Clue, accepted: int, tested: int) -> None:
        """Count positions of one source in one row."""
        for level, at in zip(self.levels, ((), clue[:1], clue), strict=True):
            level[(0, source, *at)][:accepted] += 1
            level[(1, source, *at)][:tested] += 1

    def state_dict(self) -> dict[str, Any]:
        """The counts of the finest level, which the others are sums of; empty if nothing was learned."""
        if not self.levels or not self.levels[-1].any():
            return {}
        return {name: self.levels[-1][i].tolist() for i, name in enumerate(NAMES)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Raises PolicyError if it is of other sources or sizes."""
        import numpy as np  # here, so that options can be listed without it

        if not self.levels:
            raise PolicyError("a Portfolio takes up a memory after `bind`, which says what sources and sizes there are")
        loaded = np.zeros(self._shapes()[-1])
        if state:
            try:
                memory = PortfolioMemory.model_validate(state)
                loaded = np.array([memory.accepted, memory.tested], np.float64)
            except (ValidationError, ValueError, TypeError) as error:
                why = faults(error) if isinstance(error, ValidationError) else error
                raise PolicyError(f"this is no memory of Portfolio ({why})") from None
        if loaded.shape != self.levels[-1].shape or not (np.isfinite(loaded) & (loaded >= 0)).all():
            raise PolicyError(
                f"this is no memory of this Portfolio: counts of shape {list(loaded.shape)}, where {len(self.sources)} "
                f"source(s) and {self.width} positions need {list(self.levels[-1].shape)}, none of them negative"
            )
        self.levels = [loaded.sum((2, 3, 4)), loaded.sum((3, 4)), loaded]


def _alone(options: Sequence[Option], costs: StepCosts, waiting: Sequence[int]) -> tuple[int, int]:
    """Block size and source with the most tokens over cost, for a row that pays for its own positions alone."""
    best, worth = (1, 0), 1 / costs.steps[0, 1]
    for tokens, size, source in options[1:]:
        rate = tokens / (costs.steps[source, size] + costs.catch_up(source, waiting[source]))
        if rate > worth:
            best, worth = (size, source), rate
    return best


def _together(rows: Sequence[Sequence[Option]], costs: StepCosts, free: Sequence[bool]) -> list[tuple[int, int]]:
    """The same for rows that share passes as wide as the widest: the width with the most tokens of all over the step.

    Within a width each row takes what promises most. A draft of a model costs its pass, so widths are tried without
    models, too.
    """
    best, worth = [(1, 0)] * len(rows), 0.0
    for width in sorted({size for options in rows for _, size, _ in options}):
        for models in (False, True):
            picked = [
                max((o for o in options if o[1] <= width and (models or free[o[2]] or o[1] == 1)), key=_promise)
                for options in rows
            ]
            rate = sum(tokens for tokens, _, _ in picked) / costs.of_all([(size, source) for _, size, source in picked])
            if rate > worth:
                best, worth = [(size, source) for _, size, source in picked], rate
    return best


def _promise(option: Option) -> tuple[float, int]:
    """Expected tokens; of equals the smaller block."""
    return option[0], -option[1]


class StepCosts:
    """What steps cost a row at one context length, where all rows that run do the same.

    Attributes:
        steps: by source and block size, without catching up; (0, 1) is a step without a draft.
        of_rows: whether they are shares of what the cost model says of so many rows.

    Raises:
        AttributeError, ValueError: the cost model does not price so many rows.
    """

    def __init__(
        self, models: Sequence[CostModel], slope: float, sizes: Sequence[Sequence[int]], at: int, rows: int = 1
    ) -> None:
        self._at, self._slope, self._rows = at, slope, rows
        self._models, self.of_rows = models, rows > 1 and len(models) > 0
        self.steps = {(source, size): self._step(source, size) for source, own in enumerate(sizes) for size in own}
        self.steps[0, 1] = self._step(0, 1)

    def of_all(self, drafts: Sequence[tuple[int, int]]) -> float:
        """A step of all rows, of which each has a block size and a source. With figures of so many rows only."""
        sizes: dict[int, list[int]] = {}
        for size, source in drafts:
            if size > 1:
                sizes.setdefault(source, []).append(size)
        widths = [size for size, _ in drafts]
        seconds = self._of_all(0, "verify", max(widths), sum(widths)) + self._of_all(0, "rest", 1, len(drafts))
        return seconds + sum(self._of_all(source, "draft", max(own), sum(own)) for source, own in sizes.items())

    def _of_all(self, source: int, phase: str, size: int, positions: int) -> float:
        of_rows: Any = self._models[source]
        return float(of_rows.batch_seconds(phase, size, self._at, self._rows, positions))

    def catch_up(self, source: int, waiting: int) -> float:
        """What a draft takes longer for positions that wait."""
        return self._seconds(source, "catch_up", waiting) if waiting else 0.0

    def _step(self, source: int, size: int) -> float:
        if not self._models:
            return 1 + self._slope * (size - 1)
        draft = self._seconds(source, "draft", size) if size > 1 else 0.0
        return draft + self._seconds(0, "verify", size) + self._seconds(0, "rest", 1)

    def _seconds(self, source: int, phase: str, size: int) -> float:
        """A row's share of a phase."""
        if not self._models:
            return 0.0
        if self._rows == 1:
            return self._models[source].seconds(phase, size, self._at)
        return self._of_all(source, phase, size, self._rows * size) / self._rows


def _zeros(shape: tuple[int, ...]) -> Counts:
    import numpy as np  # here, so that options can be listed without it

    return np.zeros(shape)


def _known(context: Context) -> State:
    """What is known of the sources' offers: each [batch, sources]."""
    return {str(name): context[name] for name in OF_AN_OFFER}


def _offers(state: State) -> tuple[list[list[int]], list[list[Clue]]]:
    """Tokens on offer, and what is known of the offer, by row and source."""
    offer, *parts = (state[name].tolist() for name in OF_AN_OFFER)
    return offer, [[*map(_clue, *row)] for row in zip(*parts, strict=True)]


def _clue(match: int, share: float, support: int) -> Clue:
    return min(match, LONGEST_MATCH), bisect_right(SHARES, share), min(support, MOST_SUPPORT)


def _shifted(chances: Sequence[float], odds: Sequence[float], weight: float) -> list[float]:
    """Chances with the odds shifted by how much more or less was accepted than expected."""
    accepted, expected, tested = odds
    share = expected / tested if tested else 0.5
    stands = (accepted + weight * share) / (expected + weight * share)
    falls = (tested - accepted + weight * (1 - share)) / (tested - expected + weight * (1 - share))
    shift = stands / falls
    return [chance * shift / (1 - chance + chance * shift) for chance in chances]
