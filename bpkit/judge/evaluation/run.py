"""Policies judged on prompts that nothing was chosen on; `docs/evaluation.md` says how, and what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bpkit.judge.described import describe_policies, describe_spec
from bpkit.judge.evaluation.bounds import compare, confidence_bounds
from bpkit.judge.evaluation.candidate import Candidate
from bpkit.judge.evaluation.figures import GroupFigures
from bpkit.judge.evaluation.leak import find_leaks, leak_notes, refusal
from bpkit.judge.evaluation.learnable import learnable
from bpkit.judge.evaluation.policies import PolicyResult, judge_policy
from bpkit.judge.evaluation.report import (
    DEFINITIONS,
    DEFINITIONS_OF_SOURCES,
    DEFINITIONS_OF_TREES,
    describe_cost,
    notes,
    notes_of_sources,
    notes_of_trees,
)
from bpkit.judge.evaluation.setup import Setup, TraceSummary, prepare
from bpkit.judge.evaluation.splits import FRACTIONS, PARTS, SplitRule
from bpkit.judge.statistics import LEVEL, RESAMPLES, Totals
from bpkit.policy import PolicyError
from bpkit.progress import NoProgress, Progress
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.cost import NamedCost
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Fill, offered
from bpkit.trace.store.manifest import TraceError
from bpkit.types import DecoderSpec, Feature


def evaluate(
    prompts: Sequence[PromptTrace],
    spec: DecoderSpec,
    policies: Mapping[str, PolicyLike],
    cost_models: Sequence[NamedCost],
    *,
    seed: int = 0,
    split: SplitRule = FRACTIONS,
    orders: int = 8,
    tune: bool = True,
    permutations: int = 200,
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
        seed: of split, orders, bootstrap and permutations.
        split: fractions of train, validation and test prompts, or the part of each by its id.
        orders: of the test prompts, for policies with a memory.
        tune: whether options that the user left open are chosen on validation prompts.
        permutations: of the test whether per-prompt choice is learnable; 0 leaves it out.
        second_test: judge on the prompts that were left for training, and leave the test prompts alone.
        leave_out: a policy that the trace cannot serve is left out with a sentence; otherwise it is an error.
        allow_leaks: judge a trained policy also on prompts that it was trained or chosen on, and say so in `leaks`
            and `notes`; otherwise such a policy is one that the trace cannot serve.
        trace_seed: of the trace, for the policies' own random numbers.
        fill: where features come from that policies want and the trace does not hold; asked once for each prompt.

    Returns:
        Plain JSON values.

    Raises:
        PolicyError, TraceError: the trace cannot serve a policy, or holds what it was trained on.
        CostError: a cost model has no cost for a traced size.
        ValueError: too few prompts, or two cost models of one name.
    """
    setup = prepare(
        prompts,
        spec,
        cost_models,
        trace_seed=trace_seed,
        seed=seed,
        rule=split,
        second_test=second_test,
        filled=_filler(policies, fill),
        progress=progress or NoProgress(),
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
            judged[name] = judge_policy(setup, policy, name, orders=orders, tune=tune)
        except Exception as error:  # others' policies may fail in any way; the rest are judged all the same
            if not leave_out:
                raise
            known = isinstance(error, (PolicyError, TraceError))
            left_out[name] = str(error) if known else f"{type(error).__name__}: {error}"
    bounds = confidence_bounds(setup, prompts)
    results: dict[str, Any] = {}
    for cost in setup.costs:
        of_policies = {name: found[cost] for name, found in judged.items()}
        results[cost] = {
            **_under_costs(setup, cost, of_policies, bounds.get(cost)),
            "learnable": _learnable(setup, cost, permutations) if permutations else None,
        }
    leaks = {name: leak for name, leak in leaks.items() if name in judged}
    said, summary = leak_notes(leaks, [name for name in silent if name in judged]), setup.summary
    loops = loops_of(summary, setup.split.test)
    parts = {part: [summary.domains[i] for i in getattr(setup.split, part)] for part in PARTS}
    return {
        "schema_version": 1,
        "definitions": DEFINITIONS
        | (DEFINITIONS_OF_SOURCES if spec.others else {})
        | (DEFINITIONS_OF_TREES if any(source.branches > 1 for source in spec.sources) else {}),
        "settings": {
            **describe_spec(spec),
            "block_sizes": list(summary.sizes),
            "policies": describe_policies(policies),
            "seed": seed,
            "orders": orders,
            "tune": tune,
            "permutations": permutations,
            "second_test": second_test,
            "resamples": RESAMPLES,
            "level": LEVEL,
            "prompts": {
                domain: {part: found.count(domain) for part, found in parts.items()}
                for domain in dict.fromkeys(summary.domains)
            },
        },
        "split": setup.split.as_json(summary.ids),
        "loops": loops,
        "left_out": left_out,
        "leaks": {name: leak.as_json() for name, leak in leaks.items()},
        "notes": said
        + notes(results, summary.near_ties[list(setup.split.test)], loops, summary.left_out)
        + notes_of_sources(setup)
        + notes_of_trees(spec),
        "cost_models": results,
    }


def loops_of(summary: TraceSummary, prompts: Sequence[int]) -> dict[str, int]:
    """How many of the prompts have an output that ends in a loop: overall, and by domain."""
    looping = Counter(summary.domains[i] for i in prompts if summary.loops[i])
    return {"overall": looping.total(), **{domain: looping[domain] for domain in dict.fromkeys(summary.domains)}}


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
    setup: Setup, cost: str, policies: Mapping[str, PolicyResult], bound: tuple[Totals, dict[str, Any]] | None
) -> dict[str, Any]:
    """What is said of the test prompts under one cost model."""
    summary, split, seed = setup.summary, setup.split, setup.seed
    results = compare(setup, cost, policies, {} if bound is None else {"confidences": bound[0]})
    domains = {}
    for domain in dict.fromkeys(summary.domains):
        inside, chosen_on = (
            [i for i in part if summary.domains[i] == domain] for part in (split.test, split.validation)
        )
        if inside:
            own_best = summary.best_fixed(cost, chosen_on) if chosen_on else None
            domains[domain] = GroupFigures(results, np.searchsorted(split.test, inside), seed).as_json(own_best)
    return {
        **describe_cost(setup.costs[cost], summary.choices, setup.names),
        "overall": GroupFigures(results, np.arange(len(split.test)), seed).as_json(),
        "domains": domains,
        "oracle_choices": results.choices,
        "confidences": None if bound is None else bound[1],
    }


def _learnable(setup: Setup, cost: str, permutations: int) -> dict[str, Any]:
    """The permutation test, on training and validation prompts: test prompts decide nothing."""
    rows, summary = np.array(sorted((*setup.split.train, *setup.split.validation))), setup.summary
    return learnable(
        summary.features[rows],
        summary.seconds[cost][rows],
        summary.tokens[rows],
        summary.choices,
        permutations=permutations,
        seed=setup.seed,
        progress=setup.progress,
    )
