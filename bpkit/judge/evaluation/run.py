"""Policies judged on prompts that nothing was chosen on; `docs/evaluation.md` says what comes out.

Options are tuned, and the best fixed size is chosen, on validation prompts; figures are of test prompts only; training
prompts are left to policies that are trained, and to the bound that is calibrated
(`bpkit.judge.evaluation.confidences`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bpkit.judge.described import describe_policies, describe_spec
from bpkit.judge.evaluation.candidate import Candidate
from bpkit.judge.evaluation.confidences import ConfidenceBound, confidence_bounds
from bpkit.judge.evaluation.figures import GroupFigures
from bpkit.judge.evaluation.leak import find_leaks, leak_notes, refusal
from bpkit.judge.evaluation.learnable import learnable
from bpkit.judge.evaluation.oracles import compare
from bpkit.judge.evaluation.policies import PolicyResult, judge_policy
from bpkit.judge.evaluation.report import DEFINITIONS, SCHEMA_VERSION, describe_cost, notes
from bpkit.judge.evaluation.setup import Settings, Setup, prepare
from bpkit.judge.evaluation.splits import FRACTIONS, PARTS
from bpkit.judge.statistics import LEVEL, RESAMPLES
from bpkit.policy import PolicyError
from bpkit.progress import NoProgress, Progress
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Fill, offered
from bpkit.trace.store.manifest import TraceError
from bpkit.types import DecoderSpec, Feature

ORDERS, PERMUTATIONS = 8, 200


def evaluate(
    prompts: Sequence[PromptTrace],
    spec: DecoderSpec,
    policies: Mapping[str, PolicyLike],
    cost_models: Sequence[CostTable],
    *,
    seed: int = 0,
    fractions: Sequence[float] = FRACTIONS,
    orders: int = ORDERS,
    tune: bool = True,
    permutations: int = PERMUTATIONS,
    second_test: bool = False,
    leave_out: bool = False,
    allow_leaks: bool = False,
    trace_seed: int | None = None,
    fill: Fill | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge policies on a trace.

    Memory: validation and test prompts are held, one to two megabytes each; training prompts are read and let go.

    Args:
        prompts: a `Trace`, or prompts of one trace in its order.
        spec: of its decoder (`Trace.spec`).
        policies: by name, as specs: each run makes a fresh one.
        cost_models: their names, all different, are those that the results go by.
        seed, fractions, orders, tune, permutations, second_test: see `bpkit.judge.evaluation.setup.Settings`.
        trace_seed: of the trace, for the policies' own random numbers.
        fill: where features come from that policies want and the trace does not hold; asked once for each prompt.
        leave_out: a policy that the trace cannot serve is left out with a sentence; otherwise it is an error.
        allow_leaks: judge a trained policy also on prompts that it was trained or chosen on, and say so in `leaks`
            and `notes`; otherwise such a policy is one that the trace cannot serve.

    Returns:
        Plain JSON values.

    Raises:
        PolicyError, TraceError: the trace cannot serve a policy, or holds what it was trained on.
        CostError: a cost model has no cost for a traced size.
        ValueError: too few prompts, or two cost models of one name.
    """
    settings = Settings(seed, fractions, orders, tune, permutations, second_test)
    setup = prepare(
        prompts,
        spec,
        cost_models,
        settings,
        trace_seed=trace_seed,
        progress=progress or NoProgress(),
        filled=_filler(policies, fill),
    )
    held = {"validation": setup.validation, "test": setup.test}
    leaks, silent = find_leaks(policies, held, spec, cost_models[0])
    left_out = {} if allow_leaks else {name: refusal(name, leak) for name, leak in leaks.items()}
    if left_out and not leave_out:
        raise PolicyError(". ".join(left_out.values()))
    judged: dict[str, dict[str, PolicyResult]] = {}
    for name, policy in policies.items():
        if name in left_out:
            continue
        try:
            judged[name] = judge_policy(setup, policy, name)
        except Exception as error:  # others' policies may fail in any way; the rest are judged all the same
            if not leave_out:
                raise
            known = isinstance(error, (PolicyError, TraceError))
            left_out[name] = str(error) if known else f"{type(error).__name__}: {error}"
    bounds = confidence_bounds(setup, prompts)
    results = {
        cost: _under_costs(setup, cost, {name: found[cost] for name, found in judged.items()}, bounds.get(cost))
        for cost in setup.costs
    }
    leaks = {name: leak for name, leak in leaks.items() if name in judged}
    said = leak_notes(leaks, [name for name in silent if name in judged])
    return {
        "schema_version": SCHEMA_VERSION,
        "definitions": DEFINITIONS,
        "settings": _describe_settings(setup, policies),
        "split": setup.split.as_json(setup.summary.ids),
        "left_out": left_out,
        "leaks": {name: leak.as_json() for name, leak in leaks.items()},
        "notes": said + notes(results, setup.summary.near_ties[list(setup.split.test)], setup.summary.left_out),
        "cost_models": results,
    }


def _filler(policies: Mapping[str, PolicyLike], fill: Fill | None) -> Callable[[PromptTrace], PromptTrace]:
    """Adds what any of the policies wants to a prompt, so that no replay has to."""
    if fill is None:
        return lambda prompt: prompt
    made = [Candidate(policy).make() for policy in policies.values()]
    wants: frozenset[Feature] = frozenset().union(*(p.wants | (p.wants_optional & fill.offers) for p in made))

    def filled(prompt: PromptTrace) -> PromptTrace:
        missing = wants - offered(prompt)
        return fill(prompt, missing) if missing else prompt

    return filled


def _under_costs(
    setup: Setup, cost: str, policies: Mapping[str, PolicyResult], bound: ConfidenceBound | None
) -> dict[str, Any]:
    """Everything that is said under one cost model."""
    summary, split, seed = setup.summary, setup.split, setup.settings.seed
    results = compare(setup, cost, policies, {} if bound is None else {"confidences": bound.totals})
    domains = {}
    for domain in dict.fromkeys(summary.domains):
        inside, chosen_on = (
            [i for i in part if summary.domains[i] == domain] for part in (split.test, split.validation)
        )
        if inside:
            own_best = summary.best_fixed(cost, chosen_on) if chosen_on else None
            domains[domain] = GroupFigures(results, np.searchsorted(split.test, inside), seed).as_json(own_best)
    return {
        **describe_cost(setup.costs[cost], summary.sizes),
        "overall": GroupFigures(results, np.arange(len(split.test)), seed).as_json(),
        "domains": domains,
        "oracle_choices": results.choices.as_json(),
        "confidences": None if bound is None else bound.as_json(),
        "learnable": _learnable(setup, cost),
    }


def _learnable(setup: Setup, cost: str) -> dict[str, Any] | None:
    """The permutation test, on training and validation prompts: test prompts decide nothing."""
    if not setup.settings.permutations:
        return None
    rows, summary = np.array(sorted((*setup.split.train, *setup.split.validation))), setup.summary
    return learnable(
        summary.features[rows],
        summary.seconds[cost][rows],
        summary.tokens[rows],
        summary.sizes,
        permutations=setup.settings.permutations,
        seed=setup.settings.seed,
        progress=setup.progress,
    )


def _describe_settings(setup: Setup, policies: Mapping[str, PolicyLike]) -> dict[str, Any]:
    settings, domains = setup.settings, setup.summary.domains
    parts = {part: [domains[i] for i in getattr(setup.split, part)] for part in PARTS}
    return {
        **describe_spec(setup.spec),
        "block_sizes": list(setup.summary.sizes),
        "policies": describe_policies(policies),
        "seed": settings.seed,
        "orders": settings.orders,
        "tune": settings.tune,
        "permutations": settings.permutations,
        "second_test": settings.second_test,
        "resamples": RESAMPLES,
        "level": LEVEL,
        "prompts": {
            domain: {part: found.count(domain) for part, found in parts.items()} for domain in dict.fromkeys(domains)
        },
    }
