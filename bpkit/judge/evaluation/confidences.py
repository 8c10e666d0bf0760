"""The bound `confidences` of an evaluation: calibrated on training prompts, tuned on validation prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bpkit.judge.evaluation.court import Court
from bpkit.judge.evaluation.play import Runs
from bpkit.trace.oracle.informed import Calibration, Informed, calibrate, has_confidences
from bpkit.trace.records import PromptTrace

NAME = "confidences"
FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Of the best fixed size's tokens per second: what a second may be worth in tokens."""


@dataclass(frozen=True)
class Bound:
    """Under one cost model.

    Attributes:
        runs: on the test prompts.
        factor: of `FACTORS`, chosen on validation prompts.
        tokens: drafted tokens of training prompts that were learned from.
    """

    runs: Runs
    factor: float
    tokens: int

    def as_json(self) -> dict[str, float | int]:
        """What was learned from and chosen, as plain JSON values."""
        return {"tokens": self.tokens, "factor": self.factor}


def confidences(court: Court, prompts: Sequence[PromptTrace]) -> dict[str, Bound]:
    """The bound under each cost model; none where the trace holds no confidences of greedy drafts.

    Args:
        prompts: of the trace; training prompts are read from it.
    """
    if not all(has_confidences(prompt) for prompt in (*court.validation, *court.test)):
        return {}
    court.progress.start("confidences", len(court.validation) + len(court.test))
    train = (prompts[int(court.survey.places[i])] for i in court.split.train)
    try:
        calibration = calibrate(filter(has_confidences, train), court.settings.seed)
    except ImportError:  # an optional package; the bound is an extra
        return {}
    if calibration is None:
        return {}
    factors = _factors(court, calibration)
    prices = {name: factors[name] * _rate(court, name) for name in court.costs}
    rows: dict[str, list[tuple[int, float, float]]] = {name: [] for name in court.costs}
    for prompt in court.test:
        survival = calibration.survival(prompt)
        for name, cost in court.costs.items():
            path = Informed(prompt, court.stage.spec.drafter_kind, cost, survival).path(prices[name])
            rows[name].append((path.tokens, path.steps, path.seconds))
        court.progress.tick()
    runs = {name: Runs(*np.array(found, np.float64).T) for name, found in rows.items()}
    return {name: Bound(runs[name], factors[name], calibration.tokens) for name in court.costs}


def _factors(court: Court, calibration: Calibration) -> dict[str, float]:
    """The fastest on validation prompts under each cost model; of equals the nearest to 1."""
    seconds: dict[tuple[str, float], list[float]] = {(name, f): [] for name in court.costs for f in FACTORS}
    for prompt in court.validation:
        survival = calibration.survival(prompt)
        for name, cost in court.costs.items():
            informed = Informed(prompt, court.stage.spec.drafter_kind, cost, survival)
            for factor in FACTORS:
                seconds[name, factor].append(informed.path(factor * _rate(court, name)).seconds)
        court.progress.tick()
    total = {key: math.fsum(values) for key, values in seconds.items()}
    return {name: min(FACTORS, key=lambda f: (total[name, f], abs(f - 1))) for name in court.costs}


def _rate(court: Court, cost: str) -> float:
    """Tokens per second of the best fixed size on validation prompts."""
    chosen_on = court.split.validation
    return court.survey.fixed(cost, court.survey.best_fixed(cost, chosen_on), chosen_on).rate
