"""Policies judged on prompts that nothing was chosen on. `bpkit.bench.evaluation_json` says what comes out.

Options are tuned, and the best fixed size is chosen, on validation prompts; figures are of test prompts only; training
prompts are left to policies that are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bpkit.bench.bootstrap import Bootstrap
from bpkit.bench.choices import Choices
from bpkit.bench.court import Court, Settings, assemble
from bpkit.bench.evaluation_group import HEADLINE, Field, Performance, describe_group
from bpkit.bench.evaluation_json import DEFINITIONS, SCHEMA_VERSION, describe_cost, notes
from bpkit.bench.learnable import learnable
from bpkit.bench.measure import NoProgress, Progress
from bpkit.bench.perform import PerformanceByCost, perform, tuned
from bpkit.bench.play import Runs, Stage
from bpkit.bench.recipe import Recipe
from bpkit.bench.resampling import LEVEL, RESAMPLES
from bpkit.bench.splits import FRACTIONS, PARTS
from bpkit.policy import PolicyError
from bpkit.registry import PolicyLike
from bpkit.traces.cost import CostTable
from bpkit.traces.manifest import TraceError
from bpkit.traces.oracle import Expectation, Path, oracle_distributions, oracle_step, oracle_step_truncate
from bpkit.traces.records import PromptTrace
from bpkit.traces.replay import Fill, offered
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
    leave_out: bool = False,
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
        seed, fractions, orders, tune, permutations: see `Settings`.
        trace_seed: of the trace, for the policies' own random numbers.
        fill: where features come from that policies want and the trace does not hold; asked once for each prompt.
        leave_out: a policy that the trace cannot serve is left out with a sentence; otherwise it is an error.

    Returns:
        Plain JSON values.

    Raises:
        PolicyError, TraceError: the trace cannot serve a policy.
        CostError: a cost model has no cost for a traced size.
        ValueError: too few prompts, or two cost models of one name.
    """
    settings, stage = Settings(seed, fractions, orders, tune, permutations), Stage(spec, trace_seed)
    court = assemble(prompts, stage, cost_models, settings, progress or NoProgress(), _filler(policies, fill))
    performances: dict[str, PerformanceByCost] = {}
    left_out: dict[str, str] = {}
    for name, policy in policies.items():
        try:
            performances[name] = perform(court, tuned(court, policy), name)
        except (PolicyError, TraceError) as error:
            if not leave_out:
                raise
            left_out[name] = str(error)
    results = _results(court, performances)
    return {
        "schema_version": SCHEMA_VERSION,
        "definitions": DEFINITIONS,
        "settings": _describe_settings(court, policies),
        "split": court.split.as_json(court.survey.ids),
        "left_out": left_out,
        "notes": notes(results, court.survey.near_ties[list(court.split.test)], court.survey.left_out),
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


def _results(court: Court, performances: Mapping[str, PerformanceByCost]) -> dict[str, Any]:
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
        field, choices = _field(court, name, policies)
        own = {domain: _own_best(court, name, domain) for domain in members}
        results[name] = {
            **describe_cost(cost, survey.sizes, charged=court.charged[name]),
            "overall": describe_group(field, overall),
            "domains": {
                domain: describe_group(field.of(inside), bootstraps[domain], own_best=own[domain])
                for domain, inside in members.items()
            },
            "oracle_choices": choices.as_json(),
            "learnable": _learnable(court, name),
        }
    return results


def _field(court: Court, name: str, policies: Mapping[str, Performance]) -> tuple[Field, Choices]:
    """Fixed sizes, oracles and policies on the test prompts, and the oracle's choices."""
    survey, test, cost = court.survey, court.split.test, court.costs[name]
    best = survey.best_fixed(name, court.split.validation)
    found: dict[str, list[tuple[int, float, float]]] = {"step": [], HEADLINE: []}
    if survey.sampled:
        found["distributions"] = []
    choices = Choices(best)
    kind = court.stage.spec.drafter_kind
    court.progress.start(f"oracles, {name}", len(court.test))
    for prompt in court.test:
        step, headline = oracle_step(prompt, kind, cost), oracle_step_truncate(prompt, kind, cost)
        choices.add(prompt, headline)
        asked = {"step": step, HEADLINE: headline}
        if survey.sampled:
            found["distributions"].append(_sums(oracle_distributions(prompt, kind, cost)))
        for oracle, path in asked.items():
            found[oracle].append(_sums(path))
        court.progress.tick()
    oracles = {"prompt": survey.best_of_each(name, test)}
    oracles |= {oracle: Runs(*np.array(rows, np.float64).T) for oracle, rows in found.items()}
    fixed = {size: survey.fixed(name, size, test) for size in survey.sizes}
    return Field(best, fixed, oracles, policies), choices


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
        "resamples": RESAMPLES,
        "level": LEVEL,
        "prompts": {domain: _count(court, domain) for domain in dict.fromkeys(court.survey.domains)},
    }


def _count(court: Court, domain: str) -> dict[str, int]:
    """Prompts of a domain by part of the split."""
    return {part: sum(court.survey.domains[i] == domain for i in getattr(court.split, part)) for part in PARTS}
