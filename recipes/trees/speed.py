"""Modelled tokens/s of policies on trees and on chains, against the best fixed chain, on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpkit.judge.evaluation import evaluate
from bpkit.judge.evaluation.candidate import Candidate, DecisionTime, PolicyReplay
from bpkit.learn.training.prompts import Prompts
from bpkit.progress import Progress
from bpkit.trace.cost import CostError, NamedCost
from bpkit.trace.records import PromptTrace
from bpkit.types import DecoderSpec

Methods = Mapping[str, Sequence[str]]
"""Specs of each method, one of which is chosen on validation prompts."""
CHAINS: Methods = {
    "goodput": ["goodput", "goodput:across_requests=true"],
    "threshold": [f"threshold:{least}" for least in (0.05, 0.1, 0.2, 0.3, 0.5)],
}
NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
"""Of the trees of `fixed`, the drafter's best ones; and from 8 on of those that `tree` chooses from."""
KEPT = ("tokens_per_second", "tokens_per_second_ratio", "acceptance_length", "gap_share", "fallbacks")


def on_trees(largest: int) -> Methods:
    """Methods on trees, of block sizes up to this one."""
    sizes = [nodes + 1 for nodes in NODES if nodes < largest]
    return {
        "fixed": [f"fixed:{size}" for size in sizes],
        "sequoia": ["sequoia"],
        "tree": ["tree", *(f"tree:block_size={size}" for size in sizes if size > 8 or size == sizes[-1])],
    }


@dataclass(frozen=True)
class SpeedCase:
    """What policies are judged on.

    Attributes:
        validation, test: prompts of traces with candidates, other ones.
        spec: of their decoder. trace_seed: of the noise.
        costs: what steps take, each under its own name.
        orders: of the test prompts, for policies with a memory.
    """

    validation: Sequence[PromptTrace]
    test: Sequence[PromptTrace]
    spec: DecoderSpec
    trace_seed: int | None
    costs: Sequence[NamedCost]
    orders: int
    seed: int
    progress: Progress


def speeds(case: SpeedCase, chains: Methods, trees: Methods) -> dict[str, Any]:
    """By cost model: the best fixed chain, and each method's tokens/s over its; plain JSON values.

    Args:
        chains, trees: further methods, or other specs for those that are there.

    Raises:
        PolicyError, TraceError: the traces cannot serve a policy.
        CostError: a cost model lacks a size.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind, methods, spec in (
        ("chains", {**CHAINS, **chains}, case.spec.with_branches(1)),
        ("trees", {**on_trees(case.spec.max_block_size), **trees}, case.spec),
    ):
        chosen = choose(case, methods, spec)
        specs = dict.fromkeys(one for of_cost in chosen.values() for one in of_cost.values())
        report = _evaluated(case, {one: one for one in specs}, spec)
        for cost, result in report["cost_models"].items():
            entry = found.setdefault(cost, {"decision_time_charged": result["decision_time_charged"]})
            entry[kind] = {name: {"policy": one, **_of_policy(result, one)} for name, one in chosen[cost].items()}
            entry["best_fixed_chain"] = result["overall"]["best_fixed"]
            entry["oracles"] = {name: _kept(of) for name, of in result["overall"]["oracle"].items()}
    return found


def choose(case: SpeedCase, methods: Methods, spec: DecoderSpec) -> dict[str, dict[str, str]]:
    """The spec of each method with the most tokens/s on validation prompts: by cost model and method.

    Specs that ask for sizes without a price, in any of the cost models, are passed over.
    """
    costs = {cost.name: cost for cost in case.costs}
    chosen: dict[str, dict[str, str]] = {name: {} for name in costs}
    case.progress.start("choosing", sum(map(len, methods.values())) * len(case.validation))
    for method, specs in methods.items():
        rates: dict[str, dict[str, float]] = {name: {} for name in costs}
        refused: CostError | None = None
        for one in specs:
            replay = PolicyReplay(Candidate(one), spec, costs, case.trace_seed)
            try:
                for prompt in case.validation:
                    replay.run(prompt)
                    case.progress.tick()
            except CostError as error:
                refused = error
                continue
            for name, cost in costs.items():
                done = replay.prompts(name)
                rates[name][one] = DecisionTime.measured(done, cost).totals(done).rate
        for name, of in rates.items():
            if refused and not of:
                raise refused
            chosen[name][method] = max(of, key=of.__getitem__)
    return chosen


def _evaluated(case: SpeedCase, policies: Mapping[str, str], spec: DecoderSpec) -> dict[str, Any]:
    parts = (("validation", case.validation), ("test", case.test))
    places = [(prompts, place) for _, prompts in parts for place in range(len(prompts))]
    return evaluate(
        Prompts(places),
        spec,
        policies,
        case.costs,
        seed=case.seed,
        split={prompt.id: part for part, prompts in parts for prompt in prompts},
        orders=case.orders,
        tune=False,
        permutations=0,
        trace_seed=case.trace_seed,
        progress=case.progress,
    )


def _of_policy(result: Mapping[str, Any], policy: str) -> dict[str, Any]:
    """Its figures, and its tokens/s over the best fixed chain by domain."""
    return {
        **_kept(result["overall"]["policies"][policy]),
        "by_domain": {
            domain: group["policies"][policy]["tokens_per_second_ratio"]["value"]
            for domain, group in result["domains"].items()
        },
    }


def _kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in KEPT if name in entry}
