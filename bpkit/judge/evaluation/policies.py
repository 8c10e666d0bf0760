"""A policy on the test prompts, once or in several orders; `docs/evaluation.md` says what is tuned before, and how."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bpkit.judge.evaluation.candidate import Candidate, DecisionTime, PolicyReplay
from bpkit.judge.evaluation.setup import Setup
from bpkit.judge.statistics import Ints, Totals
from bpkit.policy import PolicyError
from bpkit.progress import Progress
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.cost import NamedCost
from bpkit.trace.records import PromptTrace, Taken
from bpkit.trace.store.manifest import TraceError
from bpkit.types import DecoderSpec

EXHAUSTIVE, A_ROUND = 1500, 900
"""Replays up to which everything is tried, and replays of each round of successive halving beyond."""
KEPT = 3
"""One of so many is kept from round to round."""
FEWEST = 12
"""Prompts in the first round, at least."""


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    Attributes:
        candidate: with the chosen options.
        candidates: combinations that were tried. prompts: of the last round.
        method: `as given` if there was nothing to choose, `exhaustive` or `successive halving`.
    """

    candidate: Candidate
    candidates: int = 1
    prompts: int = 0
    method: str = "as given"

    def as_json(self) -> dict[str, Any]:
        options = self.candidate.options
        return {
            "chosen": {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
            "candidates": self.candidates,
            "prompts": self.prompts,
            "method": self.method,
        }


@dataclass(frozen=True)
class PolicyResult:
    """What a policy did with the test prompts under one cost model.

    Attributes:
        replays: one, or one for each prompt order if the policy has a memory.
        order_seeds: of those orders; empty without a memory.
        fallbacks: faults that were mended, all orders together, int64 [prompts].
        taken: the steps of each prompt, one entry for each order.
    """

    tuned: Tuned
    replays: list[Totals]
    order_seeds: list[int]
    decision: DecisionTime
    fallbacks: Ints
    taken: list[list[Taken]]


def judge_policy(setup: Setup, policy: PolicyLike, title: str, *, orders: int, tune: bool) -> dict[str, PolicyResult]:
    """Tune a policy's options and replay the test prompts, in `orders` orders if it has a memory: by cost model."""
    candidate = Candidate(policy).fitted(setup.summary.sizes)
    tuned = {name: Tuned(candidate) for name in setup.costs}
    if tune:
        tuned = tune_options(
            candidate, setup.spec, setup.costs, setup.validation, seed=setup.trace_seed, progress=setup.progress
        )
    candidates = [choice.candidate for choice in tuned.values()]
    together: dict[int, list[str]] = {}  # cost models under which the same options were chosen
    for name, choice in tuned.items():
        together.setdefault(candidates.index(choice.candidate), []).append(name)
    count = len(setup.test)
    seeds = [setup.seed + i for i in range(orders)] if candidates[0].remembers else []
    places = [random.Random(seed).sample(range(count), count) for seed in seeds] or [list(range(count))]
    setup.progress.start(f"replaying {title}", len(together) * len(places) * count)
    found: dict[str, PolicyResult] = {}
    for number, names in together.items():
        costs = {name: setup.costs[name] for name in names}
        replays = []
        for order in places:
            replays.append(PolicyReplay(candidates[number], setup.spec, costs, setup.trace_seed))
            for place in order:
                replays[-1].run(setup.test[place])
                setup.progress.tick()
        for name in names:
            done = [replay.prompts(name) for replay in replays]
            decision = DecisionTime.measured([one for prompts in done for one in prompts], setup.costs[name])
            fallbacks = np.sum([[one.fallbacks for one, _ in prompts] for prompts in done], axis=0)
            taken: list[list[Taken]] = [[one for one, _ in same] for same in zip(*done, strict=True)]
            totals = [decision.totals(prompts) for prompts in done]
            found[name] = PolicyResult(tuned[name], totals, seeds, decision, fallbacks, taken)
    return found


def tune_options(
    candidate: Candidate,
    spec: DecoderSpec,
    costs: Mapping[str, NamedCost],
    prompts: Sequence[PromptTrace],
    *,
    seed: int | None = None,
    progress: Progress,
) -> dict[str, Tuned]:
    """Choose options under each cost model.

    Args:
        prompts: for validation, in an order that mixes the domains.
        seed: of the trace.

    Raises:
        PolicyError, TraceError: the trace cannot serve the policy with any of its options.
    """
    traced = {size for drafts in prompts[0].sources for size in drafts.block_sizes.tolist()}
    variations = candidate.variations(sorted(traced))
    if len(variations) == 1:
        return {name: Tuned(candidate) for name in costs}
    # One that knows no cost model is replayed once for all of them.
    together = [costs] if candidate.knows_no_cost(spec) else [{name: cost} for name, cost in costs.items()]
    chosen: dict[str, Tuned] = {}
    for some in together:
        chosen |= _try_in_rounds(variations, spec, some, prompts, seed, progress)
    return chosen


def rounds(candidates: int, prompts: int) -> list[tuple[int, int]]:
    """How many candidates are kept after each round, and on how many prompts they were tried by then.

    >>> rounds(4, 100)
    [(1, 100)]
    >>> rounds(91, 400)
    [(31, 12), (11, 41), (4, 122), (2, 347), (1, 400)]
    """
    if candidates * prompts <= EXHAUSTIVE:
        return [(1, prompts)]
    plan, done = [], 0
    while candidates > 1 and done < prompts:
        # Candidates keep what they were tried on: a round adds prompts.
        done = min(prompts, done + max(A_ROUND // candidates, FEWEST))
        candidates = math.ceil(candidates / KEPT) if done < prompts and candidates > KEPT else 1
        plan.append((candidates, done))
    return plan


def _try_in_rounds(
    candidates: list[Candidate],
    spec: DecoderSpec,
    costs: Mapping[str, NamedCost],
    prompts: Sequence[PromptTrace],
    seed: int | None,
    progress: Progress,
) -> dict[str, Tuned]:
    """Each cost model keeps its own best, and all that any of them keeps run on."""
    plan = rounds(len(candidates), len(prompts))
    most = [len(candidates), *(min(len(candidates), kept * len(costs)) for kept, _ in plan)]
    ends = [0, *(until for _, until in plan)]
    runs = sum(count * (end - start) for count, (start, end) in zip(most, pairwise(ends), strict=False))
    progress.start(f"tuning {candidates[0].spec}", runs)
    left = {name: list(range(len(candidates))) for name in costs}
    replays: dict[int, PolicyReplay] = {}
    refused: dict[int, Exception] = {}
    for start, (keep, end) in zip(ends, plan, strict=False):
        for number in sorted(set().union(*left.values())):
            try:
                if number not in replays:
                    replays[number] = PolicyReplay(candidates[number], spec, costs, seed)
                for prompt in prompts[start:end]:
                    replays[number].run(prompt)
                    progress.tick()
            except (PolicyError, TraceError) as error:
                refused[number] = error  # a combination may ask for what was not traced; others need not
        for name, cost in costs.items():
            rates = {}
            for number in left[name]:
                if number not in refused:
                    done = replays[number].prompts(name)
                    rates[number] = DecisionTime.measured(done, cost).totals(done).rate
            if not rates:
                raise next(reversed(refused.values()))
            left[name] = sorted(rates, key=rates.__getitem__, reverse=True)[:keep]
    method = "exhaustive" if len(plan) == 1 else "successive halving"
    return {name: Tuned(candidates[left[name][0]], len(candidates), ends[-1], method) for name in costs}
