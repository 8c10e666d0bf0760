"""Bounds on the test prompts: oracles, where they choose otherwise and time that they would not take; confidences."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.evaluation.fixed import label
from bpkit.judge.evaluation.policies import PolicyResult
from bpkit.judge.evaluation.setup import Setup
from bpkit.judge.sources import PLAIN
from bpkit.judge.statistics import Floats, Totals, totals_of
from bpkit.trace.oracle import paths
from bpkit.trace.oracle.informed import Informed, calibrate, has_confidences
from bpkit.trace.oracle.paths import FixedChoice
from bpkit.trace.oracle.plan import Works
from bpkit.trace.oracle.regret import NotTraced, features_seconds, step_regret, tree_regret
from bpkit.trace.oracle.trees import along_paths
from bpkit.trace.records import PromptTrace, Taken
from bpkit.types import CostModel

CHAINS, TREES = "step_truncate", "tree"
"""The oracles that gaps are measured up to: where drafts are chains, and where they may be trees."""
LEVELS = "which nodes of its trees an autoregressive drafter has read is not known to the oracle, which waits for none"
"""Why it is not known where time goes; the oracle is a bound all the same."""
STRETCHES = 8
"""Stretches of the output that are told apart, at most."""
FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Of the best fixed size's tokens per second: what a second may be worth in tokens, for the bound `confidences`."""

Steps = NDArray[np.int32]
Regret = list[Floats] | str
"""Seconds that the best choices would not have taken, by `kinds` and for features, all orders of the test prompts
together: float64 [kinds + 1] for each prompt. Or why they are not known.
"""


@dataclass(frozen=True)
class Results:
    """Everything on the test prompts under one cost model.

    Attributes:
        names: of the sources of drafts.
        best_fixed: what was chosen on all validation prompts. best_of_source: for each source, of its sizes and 1.
        fixed: by choice. oracles, bounds, policies: by name.
        choices: where the `best_oracle` chooses otherwise than the best fixed size, plain JSON values; None where there
            is no such oracle.
        regrets: of the policies, by name. fixed_regret: of the best fixed size.
    """

    names: tuple[str, ...]
    best_fixed: FixedChoice
    best_of_source: tuple[FixedChoice, ...]
    fixed: dict[FixedChoice, Totals]
    oracles: dict[str, Totals]
    bounds: dict[str, Totals]
    policies: Mapping[str, PolicyResult]
    choices: dict[str, Any] | None
    regrets: dict[str, Regret]
    fixed_regret: Regret

    @property
    def best_oracle(self) -> Totals | None:
        """The one that gaps are measured up to."""
        return self.oracles.get(TREES, self.oracles.get(CHAINS))


def compare(setup: Setup, name: str, policies: Mapping[str, PolicyResult], bounds: dict[str, Totals]) -> Results:
    """Fixed sizes, oracles and policies under one cost model, and what the latter take beyond the oracle."""
    summary, test, chosen_on = setup.summary, setup.split.test, setup.split.validation
    best_fixed = summary.best_fixed(name, chosen_on)
    found = _Found(setup.no_oracle) if setup.no_oracle else _oracles(setup, name, policies, best_fixed)
    return Results(
        names=setup.names,
        best_fixed=best_fixed,
        best_of_source=tuple(summary.best_fixed(name, chosen_on, source) for source in range(len(setup.names))),
        fixed={choice: summary.fixed(name, test, choice) for choice in summary.choices},
        oracles={"prompt": summary.fixed(name, test), **found.oracles},
        bounds=bounds,
        policies=policies,
        choices=found.choices,
        regrets=found.regrets or dict.fromkeys(policies, found.fixed_regret),
        fixed_regret=found.fixed_regret,
    )


@dataclass
class _Found:
    """What a search for the best choices says; as in `Results`."""

    fixed_regret: Regret
    choices: dict[str, Any] | None = None
    oracles: dict[str, Totals] = field(default_factory=dict)
    regrets: dict[str, Regret] = field(default_factory=dict)


def _oracles(setup: Setup, name: str, policies: Mapping[str, PolicyResult], best_fixed: FixedChoice) -> _Found:
    test, works, cost = setup.split.test, setup.works, setup.costs[name]
    rows = defaultdict[str, list[tuple[float, ...]]](list)
    steps: list[Steps] = []
    fixed_regret: list[Floats] = []
    sources = setup.spec.sources
    trees = max(source.branches for source in sources) > 1
    unknown = any(source.branches > 1 and source.work.reads == "tokens" for source in sources)
    regrets: dict[str, Regret] = {policy: LEVELS if unknown else [] for policy in policies}
    setup.progress.start(f"oracles, {name}", len(test))
    for place, prompt in enumerate(setup.test):
        chains = paths.oracle_step_truncate(prompt, works, cost)
        shown = along_paths(prompt, sources) if trees else prompt
        known = paths.oracle_step_truncate(shown, works, cost) if trees else chains
        for policy, result in policies.items():
            so_far = regrets[policy]
            if isinstance(so_far, list):
                try:
                    so_far.append(_regret(shown, works, cost, known, result.taken[place], trees=trees))
                except NotTraced as error:
                    regrets[policy] = str(error)
        fixed = paths.fixed_path(prompt, works, cost, *best_fixed)
        if not unknown:
            fixed_regret.append(_regret(shown, works, cost, known, [fixed], trees=trees))
        steps.append(steps_beside(best_fixed, prompt, known))
        found: dict[str, paths.Path | paths.Expectation] = {
            "step": paths.oracle_step(prompt, works, cost),
            CHAINS: chains,
            **({TREES: known} if trees else {}),
        }
        if all(setup.summary.sampled):
            found["distributions"] = paths.oracle_distributions(prompt, works, cost)
        for oracle, path in found.items():
            rows[oracle].append((path.tokens, path.steps, path.seconds))
        setup.progress.tick()
    oracles = {oracle: totals_of(sums) for oracle, sums in rows.items()}
    return _Found(
        LEVELS if unknown else fixed_regret, describe_choices(best_fixed, steps, setup.names), oracles, regrets
    )


def _regret(
    prompt: PromptTrace,
    works: Works,
    cost: CostModel,
    known: paths.Hindsight,
    taken: Sequence[Taken],
    *,
    trees: bool,
) -> Floats:
    """Of one prompt, in one or more orders."""
    by_kind = [
        (tree_regret(prompt, works, cost, known, one) if trees else step_regret(prompt, works, known, one)).sum(axis=0)
        for one in taken
    ]
    return np.append(np.sum(by_kind, axis=0), sum(features_seconds(prompt, cost, one) for one in taken))


def steps_beside(best_fixed: FixedChoice, prompt: PromptTrace, path: paths.Path) -> Steps:
    """Position, block size, verify length and source of each step, and the best fixed choice's verify length.

    The source is -1 where nothing is drafted. int32 [5, steps].
    """
    usual, (size, source) = np.zeros(path.steps, np.int64), best_fixed
    if size > 1:
        drafts = prompt.sources[source]
        drafted = drafts.draft_length[path.position - 1, drafts.column(size)]
        usual = np.minimum(drafted, prompt.most_verified(0) - path.position)
    drafted_by = np.where(path.block_size > 1, path.source, -1)
    columns = (path.position, path.block_size, path.verify_length, drafted_by, usual)
    return np.stack(columns).astype(np.int32)


def describe_choices(best_fixed: FixedChoice, steps: Sequence[Steps], names: Sequence[str] = ("",)) -> dict[str, Any]:
    """Histograms of all steps, and of those in each stretch of the output; `differs` are shares of steps.

    `block_size`, `verify_length` and, of several sources, `source` map a value to its number of steps. A stretch counts
    output tokens decided before the step, from `start` up to but without `end`.

    Args:
        steps: of each prompt, by `steps_beside`.
        names: of the sources.
    """
    several, own = len(names) > 1, best_fixed.source if best_fixed.block_size > 1 else -1

    def describe(block_size: Steps, verify_length: Steps, source: Steps, usual: Steps) -> dict[str, Any]:
        differs = {"block_size": block_size != best_fixed.block_size, "verify_length": verify_length != usual}
        histograms = {"block_size": _histogram(block_size), "verify_length": _histogram(verify_length)}
        if several:
            differs["source"] = source != own
            histograms["source"] = {
                PLAIN if int(place) < 0 else names[int(place)]: count for place, count in _histogram(source).items()
            }
        differs["either"] = np.any(list(differs.values()), axis=0)
        shares = {name: float(other.mean()) for name, other in differs.items()}
        return {"steps": len(block_size), "differs": shares, **histograms}

    position, *columns = np.concatenate(steps, axis=1)
    last = int(position.max())
    width = 1 << (last // STRETCHES).bit_length()  # so that 0 .. `last` need no more than `STRETCHES`
    stretches = []
    for start in range(0, last + 1, width):
        inside = (position >= start) & (position < start + width)
        if inside.any():
            described = describe(*(column[inside] for column in columns))
            stretches.append({"start": start, "end": start + width, **described})
    named = label(names, best_fixed) if several else best_fixed.block_size
    return {"best_fixed": named, **describe(*columns), "positions": stretches}


def _histogram(values: Steps) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items())}


def confidence_bounds(setup: Setup, prompts: Sequence[PromptTrace]) -> dict[str, tuple[Totals, dict[str, Any]]]:
    """The bound `confidences` under each cost model, calibrated on training prompts, tuned on validation prompts.

    Empty where the trace holds no confidences of greedy drafts, or there are several sources.

    Args:
        prompts: of the trace; training prompts are read from it.

    Returns:
        The figures, and what was learned from and chosen as plain JSON values: `tokens`, drafted ones of training
        prompts, and `factor`, the one of `FACTORS` that is best on validation prompts.
    """
    held = (*setup.validation, *setup.test)
    if len(setup.names) > 1 or not all(has_confidences(prompt) for prompt in held):
        return {}
    setup.progress.start("confidences", len(setup.validation) + len(setup.test))
    train = (prompts[setup.summary.places[i]] for i in setup.split.train)
    try:
        calibration = calibrate(filter(has_confidences, train), setup.seed)
    except ImportError:  # an optional package; the bound is an extra
        return {}
    if calibration is None:
        return {}
    chosen_on = setup.split.validation
    best = {name: setup.summary.best_fixed(name, chosen_on) for name in setup.costs}
    rates = {name: setup.summary.fixed(name, chosen_on, size).rate for name, size in best.items()}

    def replay(of: Sequence[PromptTrace], factors: dict[str, tuple[float, ...]]) -> dict[tuple[str, float], Any]:
        """Tokens, steps and seconds of each prompt, by cost model and factor."""
        found: dict[tuple[str, float], Any] = {(name, f): [] for name, some in factors.items() for f in some}
        for prompt in of:
            survival = calibration.survival(prompt)
            for name, cost in setup.costs.items():
                informed = Informed(prompt, setup.spec.work, cost, survival)
                for factor in factors[name]:
                    path = informed.path(factor * rates[name])
                    found[name, factor].append((path.tokens, path.steps, path.seconds))
            setup.progress.tick()
        return found

    tried = replay(setup.validation, dict.fromkeys(setup.costs, FACTORS))
    seconds = {key: math.fsum(spent for *_, spent in rows) for key, rows in tried.items()}
    # Of equals the factor nearest to 1.
    factor = {name: min(FACTORS, key=lambda f: (seconds[name, f], abs(f - 1))) for name in setup.costs}
    judged = replay(setup.test, {name: (chosen,) for name, chosen in factor.items()})
    return {
        name: (totals_of(rows), {"tokens": calibration.tokens, "factor": chosen})
        for (name, chosen), rows in judged.items()
    }
