"""The best allocation of one step: how much each of its rows drafts and verifies, by what that is worth to each.

Rows share padded passes, so that a step costs by its longest draft, by its most verified tokens, and by the positions
of all rows together. Of every pair of a longest draft and a most verified, the best that rows could do with them is
bounded from above: each position is charged its part of a price, and each row then chooses for itself (Lagrange). Pairs
are looked at by falling bounds until none can be better than the best allocation found. Where prices are linear in
positions the bound is attained, but for the row that has to draft or to verify as much as the pair says. Where they are
not (a roofline, a mixture of experts), what is left between bound and best allocation is searched through: of each row
the choices that lose no more than that, and of partial sums those that lose least at equal positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bpkit.decode.clock import asked
from bpkit.trace.cost.table import CostTable
from bpkit.trace.oracle.plan import Float64, Int64
from bpkit.types import CostModel

NEAR = 1e-9
"""What is rounding, as part of a step's worth."""
HALVINGS = 24
"""Of the price of a position, in search of the one that bounds best."""
MOST_SUMS = 2000
"""Partial sums that are told apart, at most; beyond, what is left between bound and allocation is said."""


@dataclass(frozen=True)
class PhasePrice:
    """Seconds of one phase of all rows, by its size without the anchor and by positions of all rows.

    Attributes:
        sizes: whose prices are told apart, each with all down to the one before: int64 [classes].
        base: at no positions, by class, where each position adds `slope`: float64 [classes].
        table: by class and positions, infinite where so many cannot be, [classes, positions + 1]; None where linear.
        of: class of each size, int64 [width + 1].
    """

    sizes: Int64
    base: Float64
    slope: float
    table: Float64 | None
    of: Int64

    def at(self, size: int, positions: int) -> float:
        """Seconds at a size that is the largest of a row."""
        place = self.of[size]
        if self.table is not None:
            return float(self.table[place, positions])
        return float(self.base[place] + self.slope * positions)

    def priced(self, place: int, positions: Int64) -> Float64:
        """Seconds of a class at many numbers of positions."""
        if self.table is not None:
            return np.asarray(self.table[place, positions])
        return np.asarray(self.base[place] + self.slope * positions)

    def left(self, place: int, charge: float) -> Float64:
        """Seconds of a class by positions that remain when each is charged so much; of a line, what all leave."""
        if self.table is None:  # and `charge` is the slope
            return self.base[place : place + 1]
        return np.asarray(self.table[place] - charge * np.arange(self.table.shape[1]))

    def least(self, charge: float) -> Float64:
        """Seconds that remain at least when each position is charged so much, by class."""
        if self.table is None:  # and `charge` is the slope
            return self.base
        return np.asarray((self.table - charge * np.arange(self.table.shape[1])).min(axis=1))

    @cached_property
    def charges(self) -> list[float]:
        """Charges to begin with: the slope, or those at the ends of it and between."""
        if self.table is None:
            return [self.slope]
        low, high = self.slopes
        return [low] if high - low <= NEAR * abs(high) else [low, (low + high) / 2, high]

    @cached_property
    def slopes(self) -> tuple[float, float]:
        """The smallest and the largest."""
        assert self.table is not None
        with np.errstate(invalid="ignore"):
            steps = np.diff(self.table, axis=1)
        steps = steps[np.isfinite(steps)]
        return float(steps.min(initial=np.inf)), float(steps.max(initial=-np.inf))


def phase_price(cost: CostModel, phase: str, largest: int, at: int, rows: int) -> PhasePrice:
    """What a phase of so many rows costs: of `draft`, by drafted tokens, of `verify`, by drafted tokens verified.

    Raises:
        ValueError: as of `bpkit.decode.clock.price`; what a cost model raises where it has no figure.
    """
    least, sizes = int(phase == "draft"), np.arange(largest + 1)
    wide = sizes + 1
    # Of a draft at least one row makes it, and others perhaps none; the target verifies every row's anchor.
    low, high = (wide, rows * wide) if least else (wide + rows - 1, rows * wide)
    if least and largest == 0:
        return _linear(np.zeros(1), 0.0)
    priced = sizes[least:]
    positions = np.arange(rows * wide[-1] + 1)
    there = (positions >= low[:, None]) & (positions <= high[:, None])
    if least:
        there[0] = positions == 0
    if rows == 1 or isinstance(cost, CostTable):  # lines that are cut off at 0
        full, less = (_prices(cost, phase, wide[priced], at, rows, high[priced] - one) for one in (0, int(rows > 1)))
        slope = float((full - less).max())
        base = np.concatenate([np.zeros(least), full - slope * high[priced]])
        if (base + slope * low >= 0)[least:].all():
            return _linear(base, slope)
        table = np.where(there, np.maximum(base[:, None] + slope * positions, 0.0), np.inf)
    else:
        table, (size, count) = np.full(there.shape, np.inf), np.nonzero(there)
        drafted = size >= least
        table[there] = 0.0
        table[size[drafted], count[drafted]] = _prices(cost, phase, wide[size[drafted]], at, rows, count[drafted])
    return _classes(table, least)


def _linear(base: Float64, slope: float) -> PhasePrice:
    """Without classes: of sizes that cost the same the smallest would be as good, and all are looked at together."""
    sizes = np.arange(len(base))
    return PhasePrice(sizes, base, slope, None, sizes)


def _classes(table: Float64, least: int) -> PhasePrice:
    """Sizes that cost the same at all positions that they share are one."""
    of = np.arange(len(table))
    for size in range(least + 1, len(table)):
        both = np.isfinite(table[size - 1]) & np.isfinite(table[size])
        same = both.any() and np.allclose(table[size - 1][both], table[size][both], rtol=1e-12, atol=0)
        of[size] = of[size - 1] if same else of[size - 1] + 1
    ends = np.flatnonzero(np.diff(of, append=of[-1] + 1))
    joined = np.stack([table[of == place].min(axis=0) for place in range(len(ends))])
    return PhasePrice(ends, np.zeros(len(ends)), 0.0, joined, of)


def _prices(cost: CostModel, phase: str, sizes: Int64, at: int, rows: int, positions: Int64) -> Float64:
    array = getattr(cost, "array", None)
    if array is not None:
        return np.asarray(array(phase, sizes, at, rows, positions) if rows > 1 else array(phase, sizes, at), np.float64)
    price = asked(cost, rows)
    found = [price(phase, size, at, count) for size, count in zip(sizes.tolist(), positions.tolist(), strict=True)]
    return np.array(found, np.float64)


@dataclass(frozen=True)
class StepPrice:
    """Seconds of a step.

    Attributes:
        draft, verify: by longest draft, and by most drafted tokens verified.
        no_draft, drafts: of all else, in a step without a draft and in others.
    """

    draft: PhasePrice
    verify: PhasePrice
    no_draft: float
    drafts: float

    def at(self, drafted: Int64, verified: Int64) -> float:
        """Seconds if rows draft and verify so many tokens, int64 [rows] each."""
        longest, most = int(drafted.max()), int(verified.max())
        positions = int(draft_sizes(drafted).sum()), int(verified.sum()) + len(verified)
        phases = self.draft.at(longest, positions[0]) + self.verify.at(most, positions[1])
        return phases + self.rest(longest)

    def rest(self, longest: int) -> float:
        """Seconds of all else."""
        return self.drafts if longest else self.no_draft


def draft_sizes(drafted: Int64) -> Int64:
    """Of drafts by their tokens: one more, and 0 of none."""
    return np.where(drafted > 0, drafted + 1, 0)


@dataclass(frozen=True)
class Allocation:
    """How much each row drafts and verifies.

    Attributes:
        drafted, verified: tokens, int64 [rows].
        value: worth of what it yields less that of its time, in tokens.
        bound: no allocation has a larger value. It is the value, but for rounding, unless the search was cut off.
    """

    drafted: Int64
    verified: Int64
    value: float
    bound: float


def allocate(
    worth: Float64, price: StepPrice, rate: float, *, toll: tuple[float, float] = (0.0, 0.0), slack: float = 0.0
) -> Allocation:
    """The allocation of largest value.

    Args:
        worth: tokens that a row's step is worth by tokens drafted and verified, float64 [rows, width + 1, width + 1];
            minus infinity where that cannot be. No draft, [0, 0], always can.
        rate: tokens that a second is worth.
        toll: tokens that are charged for each position of drafts and of the target on top.
        slack: tokens; an allocation whose value is so near to its bound is good enough.
    """
    return _Search(worth, price, rate, toll, slack).found()


class _Pair(NamedTuple):
    """A longest draft and a most verified, by their classes."""

    draft: int
    verify: int


@dataclass(frozen=True)
class _Choices:
    """What rows may choose within a pair.

    Attributes:
        worth: of each row and choice, minus infinity where it cannot be, float64 [rows, choices].
        drafted, verified: tokens. size, width: positions. All [choices], as are these:
        drafts, verifies: whether it is as large as the pair says.
    """

    worth: Float64
    drafted: Int64
    verified: Int64
    size: Int64
    width: Int64
    drafts: NDArray[np.bool_]
    verifies: NDArray[np.bool_]

    def charged(self, seconds: tuple[float, float], rate: float) -> Float64:
        """The worth, with positions of drafts and of the target charged so many seconds."""
        if seconds == (0.0, 0.0):
            return self.worth
        return self.worth - rate * (seconds[0] * self.size + seconds[1] * self.width)


class _Search:
    def __init__(self, worth: Float64, price: StepPrice, rate: float, toll: tuple[float, float], slack: float) -> None:
        width = np.arange(worth.shape[1])
        self.sizes, self.widths = draft_sizes(width), width + 1
        self.price, self.rate = price, rate
        self.phases = (price.draft, price.verify)
        tolls = toll[0] * self.sizes[:, None] + toll[1] * self.widths
        self.worth = worth - tolls if tolls.any() else worth
        self.there: NDArray[np.bool_] = np.asarray(np.isfinite(worth).any(axis=0))
        self.rows = np.arange(len(worth))
        self.near = NEAR * (
            1 + float(np.abs(self.worth[:, self.there]).max(initial=0, where=worth[:, self.there] > -np.inf))
        )
        self.enough = max(slack, self.near * len(worth))
        self.best: tuple[float, Int64, Int64] = (-np.inf, np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.bound = -np.inf
        charges = [(a, b) for a in price.draft.charges for b in price.verify.charges]
        self.charge = charges[-1]
        self.left = self._bounds(charges[0])
        for charge in charges[1:]:
            np.minimum(self.left, self._bounds(charge), out=self.left)

    def _bounds(self, charge: tuple[float, float]) -> Float64:
        """Upper bounds of all pairs, if positions are charged so many seconds."""
        draft, verify = self.phases
        cost = charge[0] * self.sizes[:, None] + charge[1] * self.widths
        worth = self.worth - self.rate * cost if cost.any() else self.worth
        most = np.maximum.accumulate(worth, axis=1).take(draft.sizes, axis=1)
        rows = np.maximum.accumulate(most, axis=2).take(verify.sizes, axis=2).sum(axis=0)
        rest = np.where(draft.sizes > 0, self.price.drafts, self.price.no_draft)
        time = (draft.least(charge[0]) + rest)[:, None] + verify.least(charge[1])
        return np.asarray(rows - self.rate * time, np.float64)

    def found(self) -> Allocation:
        linear = all(phase.table is None for phase in self.phases)
        while True:
            pair = _Pair(*map(int, np.unravel_index(self.left.argmax(), self.left.shape)))
            left = float(self.left[pair])
            if left <= self.best[0] + self.enough:
                value, drafted, verified = self.best
                return Allocation(drafted, verified, value, max(self.bound, value, left))
            self.left[pair] = -np.inf
            choices = self._choices(pair)
            self.bound = max(self.bound, self._linear(choices) if linear else self._curved(pair, choices))

    def _choices(self, pair: _Pair) -> _Choices:
        draft, verify = self.phases
        longest, most = int(draft.sizes[pair.draft]), int(verify.sizes[pair.verify])
        drafted, verified = np.nonzero(self.there[: longest + 1, : most + 1])
        return _Choices(
            self.worth[:, drafted, verified],
            drafted,
            verified,
            self.sizes[drafted],
            self.widths[verified],
            draft.of[drafted] == pair.draft,
            verify.of[verified] == pair.verify,
        )

    def _try(self, choices: _Choices, chosen: Int64) -> float:
        """Value of an allocation, which is kept if it is the best."""
        drafted, verified = choices.drafted[chosen], choices.verified[chosen]
        value = float(choices.worth[self.rows, chosen].sum()) - self.rate * self.price.at(drafted, verified)
        if value > self.best[0] + self.near:
            self.best = (value, drafted, verified)
        return value

    # Prices that are linear in positions

    def _linear(self, choices: _Choices) -> float:
        """The best allocation with this longest draft and most verified, each attained by some row."""
        worth = choices.charged((self.price.draft.slope, self.price.verify.slope), self.rate)
        free = worth.argmax(axis=1)
        chosen, losses = [], []
        for must in (choices.drafts, choices.verifies, choices.drafts & choices.verifies):
            kept = np.where(must, worth, -np.inf)
            chosen.append(kept.argmax(axis=1))
            losses.append(worth[self.rows, free] - kept[self.rows, chosen[-1]])
        draft, verify, both = losses
        one, other = _two_rows(draft, verify)
        alone = int(both.argmin())
        if one == other or both[alone] <= draft[one] + verify[other]:
            loss, free[alone] = both[alone], chosen[2][alone]
        else:
            loss, free[one], free[other] = draft[one] + verify[other], chosen[0][one], chosen[1][other]
        return self._try(choices, free) if np.isfinite(loss) else -np.inf  # where no row can

    # Prices that are not

    def _curved(self, pair: _Pair, choices: _Choices) -> float:
        """A bound of the best allocation with this pair, which is attained but for what is cut off."""
        bound, charge = self._charge(pair, choices)
        if bound <= self.best[0] + self.enough or not self._sums(choices, charge, bound):
            return bound
        return -np.inf

    def _charge(self, pair: _Pair, choices: _Choices) -> tuple[float, tuple[float, float]]:
        """The lowest bound by charges of positions, and the charges, by halving; allocations on the way are tried."""
        limits = [p.slopes if p.table is not None else (p.slope, p.slope) for p in self.phases]
        curved = [place for place, (low, high) in enumerate(limits) if high - low > NEAR * abs(high)]
        bound, charge = np.inf, self.charge  # of the pair before
        for place in 2 * curved or [0]:
            low, high = limits[place]
            now, ends = list(charge), dict[bool, Int64]()
            for _ in range(HALVINGS):
                new, more, free = self._at(pair, choices, (now[0], now[1]), place)
                ends[more] = free
                if new < bound:
                    bound, charge = new, (now[0], now[1])
                if bound <= self.best[0] + self.enough or not curved:
                    break
                low, high = (now[place], high) if more else (low, now[place])
                now[place] = (low + high) / 2
            else:
                self._between(pair, choices, ends)
        self.charge = charge
        return bound, charge

    def _at(self, pair: _Pair, choices: _Choices, charge: tuple[float, float], place: int) -> tuple[float, bool, Int64]:
        """The bound at a charge, whether the charge of this phase has to rise, and what rows choose."""
        worth = choices.charged(charge, self.rate)
        free = worth.argmax(axis=1)
        self._try(choices, free)
        time, cheapest = self.price.rest(int(self.price.draft.sizes[pair.draft])), 0
        for which, phase in enumerate(self.phases):
            left = phase.left(pair[which], charge[which])
            at = int(left.argmin())
            time += float(left[at])
            cheapest = at if which == place else cheapest
        used = (choices.size, choices.width)[place][free].sum()
        return float(worth[self.rows, free].sum()) - self.rate * time, bool(used > cheapest), free

    def _between(self, pair: _Pair, choices: _Choices, ends: dict[bool, Int64]) -> None:
        """Try what lies between the choices at a charge that is too low and at one that is too high.

        Row after row goes over from one to the other; the row that goes over chooses freely.
        """
        if len(ends) < 2:
            return
        many, few = ends[True], ends[False]

        def over(values: Float64 | Int64) -> Float64 | Int64:
            """Sums without row k, where those before it have gone over: [rows, 1]."""
            one, other = (values[end] if values.ndim == 1 else values[self.rows, end] for end in (many, few))
            before = np.concatenate([[0], np.cumsum(one)[:-1]])
            return np.asarray(before + other[::-1].cumsum()[::-1] - other)[:, None]

        positions = [over(values) + values for values in (choices.size, choices.width)]
        value = over(choices.worth) + choices.worth
        for phase, place, count in zip(self.phases, pair, positions, strict=True):
            value = value - self.rate * phase.priced(place, count.astype(np.int64))
        row, choice = np.unravel_index(int(value.argmax()), value.shape)
        chosen = np.where(self.rows < row, many, few)
        chosen[row] = choice
        self._try(choices, chosen)

    def _sums(self, choices: _Choices, charge: tuple[float, float], bound: float) -> bool:
        """Search all that is not worse than the bound by more than the best allocation is; whether it was possible."""
        worth = choices.charged(charge, self.rate)
        loss = worth.max(axis=1)[:, None] - worth
        spare = bound - self.best[0] + self.near
        curved = [phase.table is not None for phase in self.phases]
        flags = choices.drafts + 2 * choices.verifies
        keys = np.stack([choices.size * curved[0], choices.width * curved[1], flags], axis=1)
        sums = _Sums()
        for row in loss:
            near = np.flatnonzero(row <= spare)
            if not sums.add(near, row[near], keys[near], spare):
                return False
        for chosen in sums.complete():
            self._try(choices, chosen)
        return True


class _Sums:
    """Sums over rows of loss, positions, and whether some row is as large as it has to be; least loss of equals."""

    def __init__(self) -> None:
        self.loss, self.keys = np.zeros(1), np.zeros((1, 3), np.int64)
        self.trail: list[tuple[Int64, Int64]] = []

    def add(self, choices: Int64, loss: Float64, keys: Int64, spare: float) -> bool:
        """One more row, with its choices; False if there are too many sums."""
        if len(self.loss) * len(choices) > 20 * MOST_SUMS:
            return False
        total = (self.loss[:, None] + loss).ravel()
        kept = np.flatnonzero(total <= spare)
        before, choice = np.divmod(kept, len(choices))
        old, new = self.keys[before], keys[choice]
        sums = np.concatenate([old[:, :2] + new[:, :2], old[:, 2:] | new[:, 2:]], axis=1)
        order = np.lexsort((total[kept], *sums.T))
        sums = sums[order]
        first = np.ones(len(sums), np.bool_)
        first[1:] = (sums[1:] != sums[:-1]).any(axis=1)
        order = order[first]
        self.loss, self.keys = total[kept][order], sums[first]
        self.trail.append((before[order], choices[choice[order]]))
        return len(order) <= MOST_SUMS

    def complete(self) -> Iterator[Int64]:
        """Choices of all rows, of the sums in which some row is as large as the pair says."""
        for place in np.flatnonzero(self.keys[:, 2] == 3).tolist():
            chosen, at = [], place
            for before, choice in reversed(self.trail):
                chosen.append(int(choice[at]))
                at = int(before[at])
            yield np.array(chosen[::-1], np.int64)


def _two_rows(one: Float64, other: Float64) -> tuple[int, int]:
    """Two different rows of least sum, one by each; the same row twice if there is only one."""
    first, second = int(one.argmin()), int(other.argmin())
    if first != second or len(one) == 1:
        return first, second
    without_one, without_other = one.copy(), other.copy()
    without_one[first] = without_other[second] = np.inf
    next_one, next_other = int(without_one.argmin()), int(without_other.argmin())
    if one[next_one] + other[second] < one[first] + other[next_other]:
        return next_one, second
    return first, next_other
