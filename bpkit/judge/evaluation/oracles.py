"""What hindsight says of the test prompts: oracles, where they choose otherwise, and time that they would not take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.evaluation.policies import PolicyResult
from bpkit.judge.evaluation.setup import Setup
from bpkit.judge.statistics import Floats, Ints, Totals, totals_of
from bpkit.trace.oracle.paths import (
    Expectation,
    Hindsight,
    Path,
    fixed_path,
    oracle_distributions,
    oracle_step,
    oracle_step_truncate,
)
from bpkit.trace.oracle.regret import KINDS, NotTraced, features_seconds, step_regret
from bpkit.trace.records import PromptTrace, Taken
from bpkit.types import CostModel, DraftWork

HEADLINE = "step_truncate"
"""The oracle that gaps are measured up to."""
FEATURES, DECIDING, ORACLE, REASON = "features", "deciding", "oracle", "reason"
STRETCHES = 8
"""Stretches of the output that are told apart, at most."""

Steps = NDArray[np.int32]
Shares = Mapping[str, float | str]


@dataclass(frozen=True)
class Results:
    """Everything on the test prompts under one cost model.

    Attributes:
        best_fixed: the block size chosen on all validation prompts.
        fixed: by block size. oracles, bounds, policies: by name.
        choices: where the oracle `HEADLINE` chooses otherwise than the best fixed size.
        regrets: of the policies, by name. fixed_regret: of the best fixed size.
    """

    best_fixed: int
    fixed: dict[int, Totals]
    oracles: dict[str, Totals]
    bounds: dict[str, Totals]
    policies: Mapping[str, PolicyResult]
    choices: Choices
    regrets: dict[str, Regret]
    fixed_regret: Regret


def compare(setup: Setup, name: str, policies: Mapping[str, PolicyResult], bounds: dict[str, Totals]) -> Results:
    """Fixed sizes, oracles and policies under one cost model, and what the latter take beyond the oracle."""
    summary, test, work, cost = setup.summary, setup.split.test, setup.work, setup.costs[name]
    best_fixed = summary.best_fixed(name, setup.split.validation)
    sums: dict[str, list[tuple[float, ...]]] = {"step": [], HEADLINE: []}
    if summary.sampled:
        sums["distributions"] = []
    choices, fixed_regret, regrets = Choices(best_fixed), Regret(work, cost), {p: Regret(work, cost) for p in policies}
    setup.progress.start(f"oracles, {name}", len(test))
    for place, prompt in enumerate(setup.test):
        known = oracle_step_truncate(prompt, work, cost)
        choices.add(prompt, known)
        for policy, result in policies.items():
            regrets[policy].add(prompt, known, result.taken[place])
        fixed_regret.add(prompt, known, [fixed_path(prompt, work, cost, best_fixed)])
        found: dict[str, Path | Expectation] = {"step": oracle_step(prompt, work, cost), HEADLINE: known}
        if summary.sampled:
            found["distributions"] = oracle_distributions(prompt, work, cost)
        for oracle, path in found.items():
            sums[oracle].append((path.tokens, path.steps, path.seconds))
        setup.progress.tick()
    fixed = {size: summary.fixed(name, test, size) for size in summary.sizes}
    oracles = {"prompt": summary.fixed(name, test), **{oracle: totals_of(rows) for oracle, rows in sums.items()}}
    return Results(best_fixed, fixed, oracles, bounds, policies, choices, regrets, fixed_regret)


@dataclass
class Regret:
    """Time over the test prompts that the best choices would not have taken.

    Attributes:
        work: of the drafter.
        seconds: of each prompt by `KINDS` and for features, all orders together: float64 [kinds + 1] each.
        reason: why they are not known, or nothing.
    """

    work: DraftWork
    cost: CostModel
    seconds: list[Floats] = field(default_factory=list)
    reason: str = ""

    def add(self, prompt: PromptTrace, known: Hindsight, taken: Sequence[Taken]) -> None:
        """One prompt more, in one or more orders."""
        if self.reason:
            return
        try:
            found = [step_regret(prompt, self.work, known, one).sum(axis=0) for one in taken]
        except NotTraced as error:
            self.reason = str(error)
            return
        features = sum(features_seconds(prompt, self.cost, one) for one in taken)
        self.seconds.append(np.append(np.sum(found, axis=0), features))

    def shares(self, prompts: Ints, total: float, deciding: float) -> Shares:
        """Of one's own time on some prompts: `KINDS`, `features`, `deciding` and, the rest, what the oracle takes too.

        Args:
            total: seconds of these prompts in all orders. deciding: of them, for decisions.
        """
        if self.reason:
            return {REASON: self.reason}
        parts = np.append(np.sum([self.seconds[i] for i in prompts], axis=0), deciding) / total
        return {**dict(zip((*KINDS, FEATURES, DECIDING), parts.tolist(), strict=True)), ORACLE: float(1 - parts.sum())}


@dataclass
class Choices:
    """Steps of the oracle over many prompts.

    Attributes:
        best_fixed: the block size to compare with.
    """

    best_fixed: int
    _steps: list[Steps] = field(default_factory=list)

    def add(self, prompt: PromptTrace, path: Path) -> None:
        """The steps of one prompt."""
        usual = np.zeros(path.steps, np.int64)
        if self.best_fixed > 1:
            drafted = prompt.drafts.draft_length[path.position - 1, prompt.drafts.column(self.best_fixed)]
            usual = np.minimum(drafted, prompt.most_verified(0) - path.position)
        self._steps.append(np.stack([path.position, path.block_size, path.verify_length, usual.astype(np.int32)]))

    def as_json(self) -> dict[str, Any]:
        """Histograms of all steps, and of those in each stretch of the output; `differs` are shares of steps.

        `block_size` and `verify_length` map a value to its number of steps. A stretch counts output tokens decided
        before the step, from `start` up to but without `end`.
        """
        position, *columns = np.concatenate(self._steps, axis=1)
        width = stretch_width(int(position.max()))
        stretches = []
        for start in range(0, int(position.max()) + 1, width):
            inside = (position >= start) & (position < start + width)
            if inside.any():
                described = self._describe(*(column[inside] for column in columns))
                stretches.append({"start": start, "end": start + width, **described})
        return {"best_fixed": self.best_fixed, **self._describe(*columns), "positions": stretches}

    def _describe(self, block_size: Steps, verify_length: Steps, usual_verify: Steps) -> dict[str, Any]:
        other_size, other_length = block_size != self.best_fixed, verify_length != usual_verify
        return {
            "steps": len(block_size),
            "differs": {
                "block_size": float(other_size.mean()),
                "verify_length": float(other_length.mean()),
                "either": float((other_size | other_length).mean()),
            },
            "block_size": _histogram(block_size),
            "verify_length": _histogram(verify_length),
        }


def stretch_width(last: int) -> int:
    """Width of stretches, a power of two, so that positions 0 .. `last` need no more than `STRETCHES`.

    >>> stretch_width(127), stretch_width(128), stretch_width(5)
    (16, 32, 1)
    """
    width = 1
    while width * STRETCHES <= last:
        width *= 2
    return width


def _histogram(values: Steps) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items())}
