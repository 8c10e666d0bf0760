"""A server that knows: the best drafts and widths of all rows in each step, by what is true or by its chances.

`clairvoyant` knows what every row would accept. `knows_distributions` knows only with which chance drafted tokens match
(traces made at temperatures above 0), chooses sizes and widths before the noise is drawn, and sees what came of it. In
greedy traces nothing is left to chance, and the first is meant.

Each step is the allocation of the largest worth less rate * cost (`bpkit.trace.oracle.allocation`), with the cost as
`bpkit.decode.clock.price` says, and the rate in tokens per second of such steps in the long run: served with one rate,
the tokens per second that this gives are the next, until they stay the same. What a row's step is worth goes by what
positions are worth: by what lies ahead of the row (`bpkit.trace.oracle.worth`) or, in a second plan, by their number.
What waits for the drafter is paid by the next draft of any row; plans differ in how much of that a step without a draft
is charged. The plan that gives the most tokens per second, as long as no request is missing, is taken.

It is a strong plan and not a bound: what rows accept now decides where they meet later, and no plan looks at rows
together for longer than a step. Against a search through every cycle of choices of two rows it takes 0.7% longer on
average, in most cases nothing. `Known.least_seconds` is a bound, and a low one where rows share padded passes.

What is left out of a step's choice, though not of its time: what the drafter will have to read of the tokens that this
step yields, and what a stateful target reads again. Drafts come from the first source.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.decode.clock import asked
from bpkit.policy import Policy, State
from bpkit.trace.load import Load
from bpkit.trace.oracle.allocation import Allocation, StepPrice, allocate, phase_price
from bpkit.trace.oracle.plan import Float64, Int64
from bpkit.trace.oracle.worth import (
    Outcomes,
    capped_shares,
    charges_of,
    expected,
    lower_shares,
    outcomes,
    seconds_left,
    widest,
)
from bpkit.trace.records import PromptTrace
from bpkit.trace.server import Served, ServerReplayer
from bpkit.types import Context, CostModel, DecoderSpec, Draft, DraftWork, Step

ROUNDS = 6
"""Of serving with a rate, at most."""
SAME_RATE = 1e-3
"""Change of the tokens per second below which the rate stays."""
ENOUGH = 1e-3
"""Part of a step's tokens that its allocation may be below its bound by; it is where the search is cut off, too."""
HOPELESS = 1.02
"""A plan that takes so much longer than the best one is given up."""
STEPS_OF_A_RATE = 4
"""Steps of about as many rows that are enough for a rate of their own."""

PATIENCE = (1.0, 2.0, 4.0, np.inf, 0.5, 0.0)
"""What is tried; see `LoadPlan`."""
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that values of positions are worked out for."""

Rates = tuple[Float64, Float64]
"""Numbers of rows, rising, and tokens per second in steps of so many; in between on the line."""


class JoinedOutcomes:
    """What comes of the drafts of all prompts, one behind the other.

    Attributes:
        starts: row of each prompt's position 1.
    """

    def __init__(self, known: Sequence[Outcomes]) -> None:
        self.known, self.width = known, known[0].next.shape[1] - 1
        self.starts = np.cumsum([0, *(len(each.next) for each in known)])
        self.block_sizes, self.there, self.reach, self.stop = (
            np.concatenate([getattr(each, name) for each in known])
            for name in ("block_sizes", "there", "reach", "stop")
        )
        # Positions of a prompt are its rows', and two more: before prefill, and the end.
        before = self.starts[:-1] + 2 * np.arange(len(known))
        self.next = np.concatenate([each.next + at for each, at in zip(known, before, strict=True)])
        self.position = np.concatenate(
            [np.arange(1, len(each.next) + 1) + at for each, at in zip(known, before, strict=True)]
        )

    def rows_of(self, places: NDArray[Any], position: Tensor) -> Int64:
        """Where the tables have the steps of rows, by their prompts' places and positions: int64 [rows]."""
        return np.asarray(self.starts[places] + position.numpy() - 1)

    def fewest_left(self, places: NDArray[Any], position: Tensor) -> int:
        """Tokens that the row has left that has fewest."""
        return int((np.diff(self.starts)[places] + 1 - position.numpy()).min())

    def worth(self, at: Int64, values: Float64) -> Float64:
        """What steps are worth, minus infinity where they cannot be: float64 [rows, width + 1, width + 1].

        Args:
            at: rows of the tables. values: of the positions of all prompts, one behind the other.
        """
        worth = expected(values[self.next[at]][:, None, :], self.reach[at], self.stop[at], axis=2)
        worth -= values[self.position[at]][:, None, None]
        worth[~self.there[at]] = -np.inf
        return worth


@dataclass(frozen=True)
class LoadPlan:
    """How steps are chosen.

    Attributes:
        values: of positions of all prompts in tokens, float64 [levels, positions], for steps of up to `levels` rows.
        rates: what a second is worth.
        patience: p, for what a step that does not draft is charged of catching up after it: where the next row ends,
            and another begins with all to catch up with, in k steps at `yields` tokens each, p * k parts of p * k + 1.
    """

    values: Float64
    levels: Int64
    rates: Rates
    patience: float
    yields: float = 1.0

    def rate(self, rows: int) -> float:
        """Tokens that a second is worth in a step of so many rows."""
        return float(np.interp(rows, *self.rates))

    def owed(self, work: DraftWork, waiting: int, left: int) -> tuple[float, int]:
        """What a step without a draft is charged, as in `step_price`.

        Args:
            left: tokens of the row that has fewest left.
        """
        steps = max(0.0, left / self.yields - 1)
        part = 1.0 if self.patience == np.inf else self.patience * steps / (self.patience * steps + 1)
        return part, work.after_no_draft(waiting)

    def value(self, rows: int) -> Float64:
        """Of positions in steps of so many rows."""
        return np.asarray(self.values[min(int(np.searchsorted(self.levels, rows)), len(self.levels) - 1)])


class Allocating(Policy):
    """The joint policy that follows a plan.

    Args:
        places: of each request, which prompt it asks for; its number is its row id.

    Attributes:
        unproven: tokens by which allocations were below their bounds, where the search was cut off.
    """

    wants = frozenset()
    joint = True

    def __init__(self, outcomes: JoinedOutcomes, plan: LoadPlan, places: Sequence[int]) -> None:
        super().__init__()
        self.outcomes, self.plan, self.places = outcomes, plan, np.asarray(places)
        self.unproven = 0.0
        self.chosen: Allocation | None = None

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        assert cost is not None
        self.work, self.cost = decoder.work, cost

    def begin(self, context: Context) -> State:
        prompts = (context.context_length - context.position).tolist()
        return {"waiting": torch.tensor([self.work.first(length) for length in prompts])}

    def select(self, state: State, context: Context) -> Tensor:
        places = self.places[list(context.row_ids)]
        at = self.outcomes.rows_of(places, context.position)
        waiting = int(state["waiting"].max())
        owed = self.plan.owed(self.work, waiting, self.outcomes.fewest_left(places, context.position))
        longest = int(context.context_length.max())
        price = step_price(self.cost, self.outcomes.width, longest, len(at), waiting, owed)
        worth, rate = self.outcomes.worth(at, self.plan.value(len(at))), self.plan.rate(len(at))
        self.chosen = allocate(worth, price, rate, slack=ENOUGH * len(at))
        self.unproven += max(0.0, self.chosen.bound - self.chosen.value)
        return torch.from_numpy(self.outcomes.block_sizes[at, self.chosen.drafted])

    def truncate(self, state: State, draft: Draft) -> Tensor:
        assert self.chosen is not None
        return torch.minimum(torch.from_numpy(self.chosen.verified), draft.draft_length)

    def observe(self, state: State, step: Step) -> None:
        after = waits_after(self.work, state["waiting"].tolist(), step)
        state["waiting"].copy_(torch.tensor(after))


def waits_after(work: DraftWork, waiting: Sequence[int], step: Step) -> list[int]:
    """Positions that wait for the drafter after a step, of each row."""
    anyone = bool((step.draft_length > 0).any())  # for whom all rows' are read
    counts = zip(waiting, step.draft_length.tolist(), step.num_accepted.tolist(), strict=True)
    return [
        work.after_draft(length, accepted) if length else work.after_no_draft(0 if anyone else before, accepted + 1)
        for before, length, accepted in counts
    ]


def step_price(
    cost: CostModel, width: int, at: int, rows: int, waiting: int, owed: tuple[float, int] = (0.0, 0)
) -> StepPrice:
    """What a step costs in which `waiting` positions wait for the drafter.

    Args:
        width: the longest draft there is.
        owed: part of the price of so many waiting positions that a step without a draft is charged.
    """
    price = asked(cost, rows)
    rest = price("rest", 1, at, 0)
    return StepPrice(
        phase_price(cost, "draft", width, at, rows),
        phase_price(cost, "verify", width, at, rows),
        rest + (owed[0] * price("catch_up", owed[1], at, 0) if owed[0] else 0.0),
        rest + price("catch_up", waiting, at, 0),
    )


@dataclass(frozen=True)
class Known:
    """What a server did that knew.

    Attributes:
        served: by the fastest plan. plan: which that was. oracle: whose.
        least_seconds: of all steps together, that no policy can undercut where what stands is known, and no policy on
            average where chances are (as for `oracle_distributions`).
        unproven: share of the tokens by which allocations may be below the best ones of their steps.
    """

    served: Served
    plan: LoadPlan
    least_seconds: float
    unproven: float
    oracle: LoadOracle


class LoadOracle:
    """Serves requests by plans. Arguments as of `ServerReplayer`, and:

    Args:
        knows_noise: whether what stands is known; otherwise its chances.

    Raises:
        ValueError: chances are asked for and not in the trace.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        cost: CostModel,
        prompts: Sequence[PromptTrace],
        places: Sequence[int],
        load: Load,
        *,
        knows_noise: bool,
        **options: Any,
    ) -> None:
        self.spec, self.cost, self.options = spec, cost, options
        self.prompts, self.places, self.load = prompts, places, load
        largest = spec.max_block_size
        width = widest(prompts, largest)
        known = [outcomes(prompt, spec.work, largest, width, knows_noise=knows_noise) for prompt in prompts]
        self.outcomes = JoinedOutcomes(known)
        self.tokens = int(sum(prompts[place].decided_by_steps for place in places))
        self.rows = min(max(load.most(begun) for begun in range(len(places) + 1)), len(places))
        begins = min(prompt.prompt_length for prompt in prompts) + 1
        self.contexts = begins, max(prompt.prompt_length + prompt.output_length for prompt in prompts)

    def least_seconds(self) -> float:
        """Of all requests together, that cannot be undercut."""
        at, width = sum(self.contexts) // 2, self.outcomes.width
        phases = [phase_price(self.cost, phase, width, at, self.rows) for phase in ("draft", "verify")]
        shares = [lower_shares(self.cost, width, self.rows, self.contexts, charges) for charges in charges_of(*phases)]
        return max(
            float(self._total([seconds_left(each, share.at) for each in self.outcomes.known])[0]) for share in shares
        )

    def _total(self, left: Sequence[Float64]) -> Float64:
        """Seconds of all requests, by kinds of shares."""
        often = np.bincount(self.places, minlength=len(left))
        return np.asarray(sum(count * each[1] for count, each in zip(often.tolist(), left, strict=True)))

    def by_what_is_ahead(self) -> tuple[Float64, Int64]:
        """Values of positions by seconds that remain; all requests together have as many tokens as there are."""
        levels = [level for level in LEVELS if level < self.rows] + [self.rows]
        of_levels = [capped_shares(self.cost, self.outcomes.width, n, sum(self.contexts) // 2) for n in levels]
        stacked = np.concatenate([shares.reshape(-1, *shares.shape[2:]) for shares in of_levels])
        share = np.ascontiguousarray(np.moveaxis(stacked, 0, 2))
        left = [seconds_left(each, lambda at: share) for each in self.outcomes.known]
        total, values, first = self._total(left), [], 0
        for shares in of_levels:
            kinds = total[first : first + shares.shape[0] * shares.shape[1]].reshape(shares.shape[:2])
            charge = int(kinds.min(axis=1).argmax())
            kind = first + charge * shares.shape[1] + int(kinds[charge].argmin())
            per_second = self.tokens / total[kind]
            values.append(np.concatenate([per_second * (each[1, kind] - each[:, kind]) for each in left]))
            first += kinds.size
        return np.stack(values), np.array(levels)

    def by_tokens(self) -> tuple[Float64, Int64]:
        """Values of positions by their number."""
        return np.concatenate([np.arange(p.output_length + 1.0) for p in self.prompts])[None], np.array([1])

    def serve(self, plan: LoadPlan) -> tuple[Served, Allocating]:
        """Serve the requests by a plan."""
        policy = Allocating(self.outcomes, plan, self.places)
        replayer = ServerReplayer(self.spec, policy, self.cost, strict=True, **self.options)
        return replayer.serve(self.prompts, self.places, self.load), policy

    def best(self) -> Known:
        """The fastest plan, by rates that it attains itself."""
        least = self.least_seconds()
        rates = np.array([1.0]), np.array([self.tokens / least])
        found: list[_Found] = []
        worths = self.by_what_is_ahead(), self.by_tokens()
        for patience, values in itertools.product(PATIENCE if self.spec.work.waits else PATIENCE[:1], worths):
            self._settle(LoadPlan(values[0], values[1], rates, patience), found)
        best = min(found)
        return Known(best.served, best.plan, least, best.unproven, self)

    def _settle(self, plan: LoadPlan, found: list[_Found]) -> None:
        """Serve with the rates of the best plan so far, and then with those that are attained."""
        others = bool(found)
        if others:
            plan = _at_pace_of(plan, min(found).served)
        for _ in range(ROUNDS):
            served, policy = self.serve(plan)
            new = _Found(pace(served), len(found), served, plan, policy.unproven / self.tokens)
            found.append(new)
            again = _at_pace_of(plan, served)
            hopeless = others and new.pace > HOPELESS * min(found).pace
            if hopeless or _same(again.rates, plan.rates):
                return
            plan = again


class _Found(NamedTuple):
    """A plan, with what came of it; the first of the fastest is the least."""

    pace: float
    number: int
    served: Served
    plan: LoadPlan
    unproven: float


def _at_pace_of(plan: LoadPlan, served: Served) -> LoadPlan:
    return replace(plan, rates=attained(served), yields=float(served.tokens.sum() / served.rows.sum()))


def _same(rates: Rates, before: Rates) -> bool:
    """Whether rates have settled."""
    return bool((np.abs(rates[1] / np.interp(rates[0], *before) - 1) < SAME_RATE).all())


def pace(served: Served) -> float:
    """Seconds per token, as long as no row is missing because no request is left."""
    steps = served.full or len(served.time)
    return float(served.seconds[:steps].sum() / served.tokens[:steps].sum())


def attained(served: Served) -> Rates:
    """Tokens per second by number of rows, about as many together, where there are enough steps."""
    level = np.searchsorted(LEVELS, served.rows)
    steps, seconds, tokens, rows = (
        np.bincount(level, np.asarray(of_steps, np.float64))
        for of_steps in (np.ones_like(level), served.seconds, served.tokens, served.rows)
    )
    often = np.flatnonzero(steps >= min(STEPS_OF_A_RATE, steps.max()))
    return rows[often] / steps[often], tokens[often] / seconds[often]


def clairvoyant(
    spec: DecoderSpec,
    cost: CostModel,
    prompts: Sequence[PromptTrace],
    places: Sequence[int],
    load: Load,
    **options: Any,
) -> Known:
    """Serve requests knowing what every row would accept.

    Args:
        prompts, places, load: as of `ServerReplayer.serve`.
        options: of `ServerReplayer`.
    """
    return LoadOracle(spec, cost, prompts, places, load, knows_noise=True, **options).best()


def knows_distributions(
    spec: DecoderSpec,
    cost: CostModel,
    prompts: Sequence[PromptTrace],
    places: Sequence[int],
    load: Load,
    **options: Any,
) -> Known:
    """Serve requests knowing the chance of every drafted token, but not the noise: sampled traces only.

    Raises:
        ValueError: the trace has no match probabilities.
    """
    return LoadOracle(spec, cost, prompts, places, load, knows_noise=False, **options).best()
