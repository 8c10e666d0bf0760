"""Where a policy's time goes under load that a server that knows does not take, step by step.

By the plan of that server (`bpkit.trace.oracle.clairvoyant`), an allocation of a step has a value Q(sizes, widths):
what its rows' steps are worth, less rate * cost. In each step that the policy takes, with the rows and positions that
its choices have led to, it falls short of the best allocation by

    max Q - Q(b, v)  =  (max over v' of Q(b, v') - Q(b, v))  +  (max Q - max over v' of Q(b, v'))
                         verified otherwise                     drafted otherwise

neither of which is negative. Each is split again: into what other rows would have made of the same sum of positions,
and into what the sum itself costs,

    best - Q  =  (bound at the sum - Q)  +  (best - bound at the sum)
                  by row                     too much or too little

with the least bound of all allocations, and mixtures of them, that have the policy's sum of draft sizes or of verified
positions: min over tolls of [max (Q - toll * positions) + toll * sum]. A value over the rate is in seconds.

What deciding takes, with features, counts beside them. `elsewhere` is the rest of the difference to the server's time:
what positions are worth beyond what the plan takes them for, which rows meet in a step because of what was chosen
before, what a stateful target reads again and, under a plan that knows chances, luck. `not_knowable` is the difference
between a server that knows the noise and one that knows its chances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bpkit.decode.clock import price
from bpkit.trace.load import Load
from bpkit.trace.oracle.allocation import Allocation, StepPrice, allocate, draft_sizes
from bpkit.trace.oracle.clairvoyant import ENOUGH, Known, pace, step_price, waits_after
from bpkit.trace.oracle.plan import Float64, Int64
from bpkit.trace.oracle.regret import NotTraced
from bpkit.trace.records import PromptTrace
from bpkit.trace.server import ServerClock, ServerReplayer
from bpkit.types import CostModel, Prefill, Record, Step, Work

KINDS_UNDER_LOAD = tuple(
    f"{what}_{how}" for what in ("drafted", "verified") for how in ("by_row", "too_much", "too_little")
)
"""Of regret."""
HALVINGS = 6
"""Of a toll."""
HIGHEST_TOLL = 2.0
"""Tokens for a position, beyond which it can hardly be worth."""


def split_of_regret(
    replayer: ServerReplayer,
    prompts: Sequence[PromptTrace],
    places: Sequence[int],
    load: Load,
    known: Known,
    knows_noise: Known | None = None,
) -> dict[str, float]:
    """Serve requests, and say where the time goes.

    Args:
        replayer: of the policy in question. prompts, places, load: as of `ServerReplayer.serve`.
        known: a server with these requests and this cost model that the policy is compared with.
        knows_noise: another that knows more.

    Returns:
        Shares of the policy's time, of steps in which no request was missing: by `KINDS_UNDER_LOAD`, `deciding` and
        `elsewhere`, which sum to `together`, where `known` is faster; and of `knows_noise`, how much of the policy's
        time it is faster than `known`, as `not_knowable`, which is then part of `together`, too.

    Raises:
        NotTraced: drafts that the policy ended at a length that was not traced.
        ValueError: drafts came from further sources.
    """
    regrets = LoadRegrets(known, places, replayer.cost)
    served = replayer.serve(prompts, places, load, regrets.add)
    steps = served.full or len(served.time)
    decided = float(served.decisions[:steps].sum() + np.sum(regrets.features[:steps]))
    seconds = float((served.seconds + served.decisions)[:steps].sum())
    tokens = float(served.tokens[:steps].sum())
    found = dict(zip(KINDS_UNDER_LOAD, np.array(regrets.seconds[:steps]).sum(axis=0).tolist(), strict=True))
    found["deciding"] = decided
    together = seconds - pace(known.served) * tokens
    found["elsewhere"] = together - sum(found.values())
    if knows_noise is not None:
        found["not_knowable"] = (pace(known.served) - pace(knows_noise.served)) * tokens
        together += found["not_knowable"]
    found["together"] = together
    return {name: value / seconds for name, value in found.items()}


class LoadRegrets:
    """Regret of each step, in seconds.

    Attributes:
        seconds: by kinds. features: what features cost.
    """

    def __init__(self, known: Known, places: Sequence[int], cost: CostModel) -> None:
        self.known, self.places, self.cost = known, np.asarray(places), cost
        self.outcomes, self.work = known.oracle.outcomes, known.oracle.spec.work
        self.seconds: list[list[float]] = []
        self.features: list[float] = []
        self.waiting: dict[int, int] = {}

    def add(self, record: Record, clock: ServerClock) -> None:
        """A record of the loop."""
        if isinstance(record, Prefill):
            for row in record.row_ids:
                self.waiting[row] = self.work.first(self.known.oracle.prompts[self.places[row]].prompt_length)
            return
        self.features.append(clock.charged.total - price(self.cost, _without_features(clock.work)).total)
        step = self._step(record, clock.work.context_length)
        self.seconds.append([tokens / step.rate for tokens in step.split()])
        after = waits_after(self.work, [self.waiting[row] for row in record.row_ids], record)
        self.waiting.update(zip(record.row_ids, after, strict=True))

    def _step(self, record: Step, longest: int) -> _Valued:
        if record.source.any():
            raise ValueError("regret under load is told of drafts from the first source only, and others drafted")
        places = self.places[list(record.row_ids)]
        at = self.outcomes.rows_of(places, record.position)
        waiting, plan = max(self.waiting[row] for row in record.row_ids), self.known.plan
        owed = plan.owed(self.work, waiting, self.outcomes.fewest_left(places, record.position))
        costs = step_price(self.cost, self.outcomes.width, longest, len(at), waiting, owed)
        worth = self.outcomes.worth(at, plan.value(len(at)))
        drafted, verified = record.draft_length.numpy(), record.verify_length.numpy()
        missing = ~np.isfinite(worth[np.arange(len(at)), drafted, verified])
        if missing.any():
            length = int(drafted[missing][0])
            raise NotTraced(f"a draft ended after {length} tokens, and block size {length + 1} is not traced")
        return _Valued(worth, costs, plan.rate(len(at)), drafted, verified)


@dataclass(frozen=True)
class _Valued:
    """A step and what was chosen."""

    worth: Float64
    price: StepPrice
    rate: float
    drafted: Int64
    verified: Int64

    def split(self) -> list[float]:
        """Regret in tokens by `KINDS_UNDER_LOAD`."""
        rows = np.arange(len(self.drafted))
        own = float(self.worth[rows, self.drafted, self.verified].sum())
        own -= self.rate * self.price.at(self.drafted, self.verified)
        kept = np.full_like(self.worth, -np.inf)
        kept[rows, self.drafted] = self.worth[rows, self.drafted]
        widths = _Best(kept, self.price, self.rate)
        sizes = _Best(self.worth, self.price, self.rate)
        at_widths = max(own, widths.free.value)
        at_sizes = max(at_widths, sizes.free.value)
        drafts = sizes.with_sum(0, int(draft_sizes(self.drafted).sum()), at_widths, at_sizes)
        return [*drafts, *widths.with_sum(1, int(self.verified.sum()) + len(rows), own, at_widths)]


class _Best:
    """The best allocation of a step, and bounds at other sums."""

    def __init__(self, worth: Float64, price: StepPrice, rate: float) -> None:
        self.worth, self.price, self.rate = worth, price, rate
        self.free = self._with((0.0, 0.0))

    def _with(self, toll: tuple[float, float]) -> Allocation:
        return allocate(self.worth, self.price, self.rate, toll=toll, slack=ENOUGH * len(self.worth))

    def with_sum(self, place: int, total: int, own: float, best: float) -> list[float]:
        """What is lost by row, by too large a sum, and by too small a one.

        Args:
            place: 0 of draft sizes, 1 of verified positions. total: the sum that was chosen.
            own, best: value of what was chosen, and of the best.
        """
        if best <= own:
            return [0.0, 0.0, 0.0]
        much = total - _sums(self.free)[place]
        bound, low, high = best, 0.0, -HIGHEST_TOLL if much > 0 else HIGHEST_TOLL
        for _ in range(HALVINGS if much else 0):
            middle = (low + high) / 2
            found = self._with((middle, 0.0) if place == 0 else (0.0, middle))
            bound = min(bound, found.bound + middle * total)
            if bound <= own:
                bound = own
                break
            further = _sums(found)[place] < total if much > 0 else _sums(found)[place] > total
            low, high = (middle, high) if further else (low, middle)
        in_sum = best - bound
        return [bound - own, in_sum if much > 0 else 0.0, in_sum if much <= 0 else 0.0]


def _sums(chosen: Allocation) -> tuple[int, int]:
    """Positions of drafts and of the target."""
    return int(draft_sizes(chosen.drafted).sum()), int(chosen.verified.sum()) + len(chosen.verified)


def _without_features(work: Work) -> Work:
    others = tuple(replace(made, features=False) for made in work.others)
    return replace(work, features=False, others=others)
