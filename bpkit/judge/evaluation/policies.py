"""A policy on the test prompts, its options tuned on validation prompts: once, or in several orders."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from bpkit.judge.evaluation.candidate import Candidate
from bpkit.judge.evaluation.replays import NOTHING, DecisionTime, PolicyReplay, totals
from bpkit.judge.evaluation.setup import Setup, charged
from bpkit.judge.evaluation.tune import Tuned, tune_options
from bpkit.judge.statistics import Ints, Totals
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.records import Taken


@dataclass(frozen=True)
class PolicyResult:
    """What a policy did with the test prompts under one cost model.

    Attributes:
        replays: one, or one for each prompt order if the policy has a memory.
        order_seeds: of those orders; empty without a memory.
        charged: whether `decision` is in the seconds of `replays`.
        fallbacks: faults that were mended, all orders together, int64 [prompts].
        taken: the steps of each prompt, one entry for each order.
    """

    tuned: Tuned
    replays: list[Totals]
    order_seeds: list[int]
    decision: DecisionTime
    charged: bool
    fallbacks: Ints
    taken: list[list[Taken]]


def judge_policy(setup: Setup, policy: PolicyLike, title: str) -> dict[str, PolicyResult]:
    """Tune a policy's options and replay the test prompts, under each cost model."""
    candidate = Candidate(policy).fitted(setup.summary.sizes)
    tuned = {name: Tuned(candidate) for name in setup.costs}
    if setup.settings.tune:
        tuned = tune_options(
            candidate, setup.spec, setup.costs, setup.validation, seed=setup.trace_seed, progress=setup.progress
        )
    count = len(setup.test)
    remembers = next(iter(tuned.values())).candidate.remembers
    seeds = [setup.settings.seed + i for i in range(setup.settings.orders)] if remembers else []
    orders = [random.Random(seed).sample(range(count), count) for seed in seeds] or [list(range(count))]
    # Cost models under which the same options were chosen, together.
    together: list[tuple[Candidate, list[str]]] = []
    for name, choice in tuned.items():
        same = next((names for chosen, names in together if chosen == choice.candidate), None)
        if same is None:
            together.append((choice.candidate, [name]))
        else:
            same.append(name)
    setup.progress.start(f"replaying {title}", len(together) * len(orders) * count)
    found: dict[str, PolicyResult] = {}
    for chosen, names in together:
        costs = {name: setup.costs[name] for name in names}
        replays = []
        for order in orders:
            replays.append(PolicyReplay(chosen, setup.spec, costs, setup.trace_seed))
            for place in order:
                replays[-1].run(setup.test[place])
                setup.progress.tick()
        found |= {name: _result(setup, replays, seeds, tuned[name], name) for name in names}
    return found


def _result(setup: Setup, replays: list[PolicyReplay], seeds: list[int], tuned: Tuned, cost: str) -> PolicyResult:
    orders = [replay.prompts(cost) for replay in replays]
    decision = DecisionTime.measured([one for prompts in orders for one in prompts])
    in_seconds = charged(setup.costs[cost])
    return PolicyResult(
        tuned,
        [totals(prompts, decision if in_seconds else NOTHING) for prompts in orders],
        seeds,
        decision,
        in_seconds,
        np.sum([[one.fallbacks for one in prompts] for prompts in orders], axis=0),
        [[one.taken for one in same] for same in zip(*orders, strict=True)],
    )
