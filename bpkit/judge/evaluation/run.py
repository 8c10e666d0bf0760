"""Policies judged on prompts that nothing was chosen on. `bpkit.judge.evaluation.json_form` says what comes out.

Options are tuned, and the best fixed size is chosen, on validation prompts; figures are of test prompts only; training
prompts are left to policies that are trained, and to the bound that is calibrated
(`bpkit.judge.evaluation.confidences`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bpkit.judge.evaluation.choices import Choices
from bpkit.judge.evaluation.confidences import NAME, Bound, confidences
from bpkit.judge.evaluation.court import Court, Settings, assemble
from bpkit.judge.evaluation.group import HEADLINE, Field, Performance, describe_group
from bpkit.judge.evaluation.json_form import DEFINITIONS, SCHEMA_VERSION, describe_cost, notes
from bpkit.judge.evaluation.leak import find_leaks, leak_notes, refusal
from bpkit.judge.evaluation.learnable import learnable
from bpkit.judge.evaluation.perform import PerformanceByCost, perform, tuned
from bpkit.judge.evaluation.play import Runs, Stage
from bpkit.judge.evaluation.recipe import Recipe
from bpkit.judge.evaluation.regrets import Regrets
from bpkit.judge.evaluation.splits import FRACTIONS, PARTS
from bpkit.judge.progress import NoProgress, Progress
from bpkit.judge.statistics import LEVEL, RESAMPLES, Bootstrap
from bpkit.policy import PolicyError
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.cost import CostTable
from bpkit.trace.oracle import Expectation, Path, fixed_path, hindsight, oracle_distributions, oracle_step
from bpkit.trace.oracle.regret import Taken
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
        seed, fractions, orders, tune, permutations, second_test: see `Settings`.
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
    settings, stage = Settings(seed, fractions, orders, tune, permutations, second_test), Stage(spec, trace_seed)
    court = assemble(prompts, stage, cost_models, settings, progress or NoProgress(), _filler(policies, fill))
    held = {"validation": court.validation, "test": court.test}
    leaks, silent = find_leaks(policies, held, spec, cost_models[0])
    left_out = {} if allow_leaks else {name: refusal(name, leak) for name, leak in leaks.items()}
    if left_out and not leave_out:
        raise PolicyError(". ".join(left_out.values()))
    performances: dict[str, PerformanceByCost] = {}
    for name, policy in policies.items():
        if name in left_out:
            continue
        try:
            performances[name] = perform(court, tuned(court, policy), name)
        except Exception as error:  # a stranger's policy may fail in any way; the others are judged all the same
            if not leave_out:
                raise
            known = isinstance(error, (PolicyError, TraceError))
            left_out[name] = str(error) if known else f"{type(error).__name__}: {error}"
    results = _results(court, performances, confidences(court, prompts))
    judged_on = {name: leak for name, leak in leaks.items() if name in performances}
    said = leak_notes(judged_on, [name for name in silent if name in performances])
    return {
        "schema_version": SCHEMA_VERSION,
        "definitions": DEFINITIONS,
        "settings": _describe_settings(court, policies),
        "split": court.split.as_json(court.survey.ids),
        "left_out": left_out,
        "leaks": {name: leak.as_json() for name, leak in judged_on.items()},
        "notes": said + notes(results, court.survey.near_ties[list(court.split.test)], court.survey.left_out),
        "cost_models": results,
    }


def _filler(policies: Mapping[str, PolicyLike], fill: Fill | None) -> Callable[[PromptTrace], PromptTrace]:
    """Adds what any of the policies wants to a prompt, so that no replay has to."""
    if fill is None:
        return lambda prompt: prompt
    made = [Recipe(policy).make() for policy in policies.values()]
    wants: frozenset[Feature] = frozenset().union(*(p.wants | (p.wants_optional & fill.offers) for p in made))

    def filled(prompt: PromptTrace) -> PromptTrace:
        missing = wants - offered(prompt)
        return fill(prompt, missing) if missing else prompt

    return filled


def _results(
    court: Court, performances: Mapping[str, PerformanceByCost], bounds: Mapping[str, Bound]
) -> dict[str, Any]:
    """Everything that is said under each cost model."""
    survey, split = court.survey, court.split
    domains = np.array([survey.domains[i] for i in split.test])
    members = {domain: np.flatnonzero(domains == domain) for domain in dict.fromkeys(survey.domains)}
    members = {domain: inside for domain, inside in members.items() if len(inside)}
    bootstraps = {domain: Bootstrap(len(inside), court.settings.seed) for domain, inside in members.items()}
    overall = Bootstrap(len(split.test), court.settings.seed)
    results = {}
    for name, cost in court.costs.items():
        policies = {policy: found[name] for policy, found in performances.items()}
        field, choices = _field(court, name, policies, bounds.get(name))
        own = {domain: _own_best(court, name, domain) for domain in members}
        results[name] = {
            **describe_cost(cost, survey.sizes, charged=court.charged[name]),
            "overall": describe_group(field, overall),
            "domains": {
                domain: describe_group(field.of(inside), bootstraps[domain], own_best=own[domain])
                for domain, inside in members.items()
            },
            "oracle_choices": choices.as_json(),
            "confidences": bounds[name].as_json() if name in bounds else None,
            "learnable": _learnable(court, name),
        }
    return results


def _field(court: Court, name: str, policies: Mapping[str, Performance], bound: Bound | None) -> tuple[Field, Choices]:
    """Fixed sizes, oracles and policies on the test prompts, and the oracle's choices."""
    survey, test, cost = court.survey, court.split.test, court.costs[name]
    best, kind = survey.best_fixed(name, court.split.validation), court.stage.spec.drafter_kind
    found: dict[str, list[tuple[int, float, float]]] = {"step": [], HEADLINE: []}
    if survey.sampled:
        found["distributions"] = []
    choices, fixed_regrets, regrets = Choices(best), Regrets(kind, cost), {p: Regrets(kind, cost) for p in policies}
    court.progress.start(f"oracles, {name}", len(court.test))
    for place, prompt in enumerate(court.test):
        known = hindsight(prompt, kind, cost)
        choices.add(prompt, known.path)
        asked = {"step": oracle_step(prompt, kind, cost), HEADLINE: known.path}
        for policy, one in policies.items():
            regrets[policy].add(prompt, known, [run[place] for run in one.taken])
        fixed_regrets.add(prompt, known, [Taken.by_path(prompt, fixed_path(prompt, kind, cost, best))])
        if survey.sampled:
            found["distributions"].append(_sums(oracle_distributions(prompt, kind, cost)))
        for oracle, path in asked.items():
            found[oracle].append(_sums(path))
        court.progress.tick()
    oracles = {"prompt": survey.best_of_each(name, test)}
    oracles |= {oracle: Runs(*np.array(rows, np.float64).T) for oracle, rows in found.items()}
    fixed = {size: survey.fixed(name, size, test) for size in survey.sizes}
    bounds = {NAME: bound.runs} if bound is not None else {}
    return Field(best, fixed, oracles, bounds, policies, regrets, fixed_regrets), choices


def _sums(path: Path | Expectation) -> tuple[int, float, float]:
    return path.tokens, path.steps, path.seconds


def _own_best(court: Court, cost: str, domain: str) -> int | None:
    """The size that is fastest on the domain's own validation prompts, if it has any."""
    own = [i for i in court.split.validation if court.survey.domains[i] == domain]
    return court.survey.best_fixed(cost, own) if own else None


def _learnable(court: Court, cost: str) -> dict[str, Any] | None:
    """The permutation test, on training and validation prompts: test prompts decide nothing."""
    if not court.settings.permutations:
        return None
    rows = np.array(sorted((*court.split.train, *court.split.validation)))
    survey = court.survey
    return learnable(
        survey.features[rows],
        survey.seconds[cost][rows],
        survey.tokens[rows],
        survey.sizes,
        permutations=court.settings.permutations,
        seed=court.settings.seed,
        progress=court.progress,
    ).as_json()


def _describe_settings(court: Court, policies: Mapping[str, PolicyLike]) -> dict[str, Any]:
    settings, spec = court.settings, court.stage.spec
    return {
        "target": spec.target,
        "drafter": spec.drafter,
        "drafter_kind": spec.drafter_kind,
        "trained_block_size": spec.trained_block_size,
        "block_sizes": list(court.survey.sizes),
        "policies": {
            name: policy if isinstance(policy, str) else dict(policy)
            for name, policy in policies.items()
            if isinstance(policy, (str, Mapping))
        },
        "seed": settings.seed,
        "orders": settings.orders,
        "tune": settings.tune,
        "permutations": settings.permutations,
        "second_test": settings.second_test,
        "resamples": RESAMPLES,
        "level": LEVEL,
        "prompts": {domain: _count(court, domain) for domain in dict.fromkeys(court.survey.domains)},
    }


def _count(court: Court, domain: str) -> dict[str, int]:
    """Prompts of a domain by part of the split."""
    return {part: sum(court.survey.domains[i] == domain for i in getattr(court.split, part)) for part in PARTS}
