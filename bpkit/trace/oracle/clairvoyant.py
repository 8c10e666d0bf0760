"""A server that knows: the best drafts and widths of all rows in each step, by what is true or by its chances.

`clairvoyant` knows what every row would accept. `knows_distributions` knows only with which chance drafted tokens match
(traces made at temperatures above 0), chooses sizes and widths before the noise is drawn, and sees what came of it. In
greedy traces nothing is left to chance, and the first is meant.

Each step is the allocation of the largest worth less rate * cost (`bpkit.trace.oracle.allocation`), with the cost as
`bpkit.decode.clock.price` says, and the rate in tokens per second of such steps in the long run: served with one rate,
the tokens per second that this gives are the next, until they stay the same. What a position is worth is a number of
tokens: its own or, in a second plan, by what lies ahead of the row (`bpkit.trace.oracle.worth`). What waits for the
drafter is paid by the next draft of any row; plans differ in whether a step that does not draft goes on owing it. The
fastest of these plans is taken.

It is a strong plan and not a bound: what rows accept now decides where they meet later, and no plan here looks at rows
together for longer than a step. `Known.least_seconds` is a bound, of `clairvoyant` for every policy.

What is left out of a step's choice, though not of its time: what the drafter will have to read of the tokens that this
step yields, and what a stateful target reads again. Drafts come from the first source.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpkit.decode.clock import asked
from bpkit.policy import Policy, State
from bpkit.trace.load import Load
from bpkit.trace.oracle.allocation import Allocation, StepPrice, allocate, phase_price
from bpkit.trace.oracle.plan import Float64
from bpkit.trace.oracle.worth import Outcomes, charges_of, outcomes, seconds_alone, shares, widest
from bpkit.trace.records import PromptTrace
from bpkit.trace.server import Served, ServerReplayer
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Step

ROUNDS = 6
"""Of serving with a rate, at most."""
SAME_RATE = 1e-3
"""Change of the tokens per second below which the rate stays."""
ENOUGH = 1e-3
"""Part of a step's tokens that its allocation may be below its bound by; it is where the search is cut off, too."""
HOPELESS = 1.02
"""A plan that takes so much longer than the best one, in its second round or later, is given up."""
STEPS_OF_A_RATE = 16
"""Steps of some number of rows that are enough for a rate of their own."""

Rates = tuple[Float64, Float64]
"""Numbers of rows, rising, and tokens per second in steps of so many; in between on the line."""


class Worths:
    """What every step of requests is worth to their rows, in tokens; all prompts' tables one behind the other.

    Args:
        known: what comes of the drafts of each prompt.
        positions: what the positions of each are worth, float64 [output length + 1].
    """

    def __init__(self, known: Sequence[Outcomes], positions: Sequence[Float64], width: int) -> None:
        tables = [each.worths(worth, width) for each, worth in zip(known, positions, strict=True)]
        self.of_steps = np.concatenate([table for table, _ in tables])
        self.block_sizes = np.concatenate([sizes for _, sizes in tables])
        self.starts = np.cumsum([0, *(len(sizes) for _, sizes in tables)])


@dataclass(frozen=True)
class LoadPlan:
    """How steps are chosen.

    Attributes:
        worths: of steps.
        rates: what a second is worth.
        owes: whether what waits for the drafter is owed by steps that do not draft, too.
    """

    worths: Worths
    rates: Rates
    owes: bool

    def rate(self, rows: int) -> float:
        """Tokens that a second is worth in a step of so many rows."""
        return float(np.interp(rows, *self.rates))


class Allocating(Policy):
    """The joint policy that follows a plan.

    Args:
        places: of each request, which prompt it asks for; its number is its row id.

    Attributes:
        unproven: tokens by which allocations were below their bounds, where the search was cut off.
    """

    wants = frozenset()
    joint = True

    def __init__(self, plan: LoadPlan, places: Sequence[int]) -> None:
        super().__init__()
        self.plan, self.places = plan, np.asarray(places)
        self.unproven = 0.0
        self.chosen: Allocation | None = None

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        assert cost is not None
        self.work, self.cost = decoder.work, cost

    def begin(self, context: Context) -> State:
        prompts = (context.context_length - context.position).tolist()
        return {"waiting": torch.tensor([self.work.first(length) for length in prompts])}

    def select(self, state: State, context: Context) -> Tensor:
        at = self.rows_of(context.row_ids, context.position)
        rows, worths = len(at), self.plan.worths
        price = step_price(
            self.cost,
            worths.of_steps.shape[1] - 1,
            int(context.context_length.max()),
            rows,
            int(state["waiting"].max()),
            self.work.after_no_draft(int(state["waiting"].max())) if self.plan.owes else 0,
        )
        self.chosen = allocate(worths.of_steps[at], price, self.plan.rate(rows), slack=ENOUGH * rows)
        self.unproven += max(0.0, self.chosen.bound - self.chosen.value)
        return torch.from_numpy(worths.block_sizes[at, self.chosen.drafted])

    def rows_of(self, row_ids: Sequence[int], position: Tensor) -> Any:
        """Where the tables have the steps of rows at positions: int64 [rows]."""
        return self.plan.worths.starts[self.places[list(row_ids)]] + position.numpy() - 1

    def truncate(self, state: State, draft: Draft) -> Tensor:
        assert self.chosen is not None
        return torch.minimum(torch.from_numpy(self.chosen.verified), draft.draft_length)

    def observe(self, state: State, step: Step) -> None:
        anyone = bool((step.draft_length > 0).any())
        waiting = [
            self.work.after_draft(length, accepted)
            if length
            else self.work.after_no_draft(0 if anyone else before, accepted + 1)
            for before, length, accepted in zip(
                state["waiting"].tolist(), step.draft_length.tolist(), step.num_accepted.tolist(), strict=True
            )
        ]
        state["waiting"].copy_(torch.tensor(waiting))


def step_price(cost: CostModel, width: int, at: int, rows: int, waiting: int, owed: int) -> StepPrice:
    """What a step costs in which `waiting` positions wait for the drafter.

    Args:
        width: the longest draft there is.
        owed: positions that wait if nothing is drafted and whose price counts then, too.
    """
    price = asked(cost, rows)
    rest = price("rest", 1, at, 0)
    return StepPrice(
        phase_price(cost, "draft", width, at, rows),
        phase_price(cost, "verify", width, at, rows),
        rest + (price("catch_up", owed, at, 0) if owed else 0.0),
        rest + price("catch_up", waiting, at, 0),
    )


@dataclass(frozen=True)
class Known:
    """What a server did that knew.

    Attributes:
        served: by the fastest plan. plan: which that was.
        least_seconds: of all steps together, that no policy can undercut where what stands is known, and no policy on
            average where chances are (as for `oracle_distributions`).
        unproven: share of the tokens by which allocations may be below the best ones of their steps.
    """

    served: Served
    plan: LoadPlan
    least_seconds: float
    unproven: float


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
        self.width = widest(prompts, largest)
        self.known = [outcomes(prompt, spec.work, largest, knows_noise=knows_noise) for prompt in prompts]
        self.tokens = int(sum(prompts[place].decided_by_steps for place in places))
        self.rows = max(load.most(begun) for begun in range(len(places) + 1))

    @cached_property
    def alone(self) -> list[Float64]:
        """Seconds that remain to each prompt by itself, under the charges that bound best."""
        begins = min(prompt.prompt_length for prompt in self.prompts) + 1
        ends = max(prompt.prompt_length + prompt.output_length for prompt in self.prompts)
        rows = min(self.rows, len(self.places))
        tried = [
            [seconds_alone(each, share) for each in self.known]
            for charges in charges_of(self.cost, self.width, rows, (begins + ends) // 2)
            for share in [shares(self.cost, self.width, rows, (begins, ends), charges)]
        ]
        return max(tried, key=self.least_seconds)

    def least_seconds(self, alone: Sequence[Float64]) -> float:
        """Of all requests together."""
        return float(sum(alone[place][1] for place in self.places))

    def by_what_is_ahead(self) -> list[Float64]:
        """Worth of positions by seconds that remain: float64 [output length + 1] each. All together are the tokens."""
        tokens = self.tokens / self.least_seconds(self.alone)
        return [tokens * (left[1] - left) for left in self.alone]

    def by_tokens(self) -> list[Float64]:
        """Worth of positions by their number."""
        return [np.arange(prompt.output_length + 1.0) for prompt in self.prompts]

    def serve(self, plan: LoadPlan) -> tuple[Served, Allocating]:
        """Serve the requests by a plan."""
        policy = Allocating(plan, self.places)
        replayer = ServerReplayer(self.spec, policy, self.cost, strict=True, **self.options)
        return replayer.serve(self.prompts, self.places, self.load), policy

    def best(self) -> Known:
        """The fastest plan, by rates that it attains itself."""
        least = self.least_seconds(self.alone)
        rates = np.array([1.0]), np.array([self.tokens / least])
        found: list[tuple[float, Served, LoadPlan, float]] = []
        for positions, owes in itertools.product((self.by_what_is_ahead(), self.by_tokens()), (True, False)):
            worths = Worths(self.known, positions, self.width)
            for left in range(ROUNDS, 0, -1):
                plan = LoadPlan(worths, rates, owes)
                served, policy = self.serve(plan)
                found.append((float(served.seconds.sum()), served, plan, policy.unproven / self.tokens))
                rates = attained(served)
                if _same(rates, plan.rates):
                    break
                if left < ROUNDS and found[-1][0] > HOPELESS * min(found, key=_seconds)[0]:
                    break
            rates = attained(min(found, key=_seconds)[1])
        _, served, plan, unproven = min(found, key=_seconds)
        return Known(served, plan, least, unproven)


def _seconds(found: tuple[float, Served, LoadPlan, float]) -> float:
    return found[0]


def _same(rates: Rates, before: Rates) -> bool:
    """Whether rates have settled."""
    return bool((np.abs(rates[1] / np.interp(rates[0], *before) - 1) < SAME_RATE).all())


def attained(served: Served) -> Rates:
    """Tokens per second by number of rows, of numbers with enough steps; all together if there is none."""
    steps, seconds, tokens = (
        np.bincount(served.rows, weights) for weights in (None, served.seconds, served.tokens.astype(np.float64))
    )
    often = np.flatnonzero((steps >= STEPS_OF_A_RATE) & (seconds > 0))
    if not len(often):
        return np.array([1.0]), np.array([served.tokens.sum() / served.seconds.sum()])
    return often.astype(np.float64), tokens[often] / seconds[often]


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
