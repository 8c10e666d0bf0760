"""The bound `confidences` of an evaluation: calibrated on training prompts, tuned on validation prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bpkit.judge.evaluation.setup import Setup
from bpkit.judge.statistics import Totals, totals_of
from bpkit.trace.oracle.informed import Informed, calibrate, has_confidences
from bpkit.trace.records import PromptTrace

FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Of the best fixed size's tokens per second: what a second may be worth in tokens."""


def confidence_bounds(setup: Setup, prompts: Sequence[PromptTrace]) -> dict[str, tuple[Totals, dict[str, Any]]]:
    """The bound on the test prompts under each cost model; none where the trace holds no confidences of greedy drafts.

    Args:
        prompts: of the trace; training prompts are read from it.

    Returns:
        The figures, and what was learned from and chosen as plain JSON values: `tokens`, drafted ones of training
        prompts, and `factor`, the one of `FACTORS` that is best on validation prompts.
    """
    if not all(has_confidences(prompt) for prompt in (*setup.validation, *setup.test)):
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

    def paths(of: Sequence[PromptTrace], factors: dict[str, tuple[float, ...]]) -> dict[tuple[str, float], Any]:
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

    tried = paths(setup.validation, dict.fromkeys(setup.costs, FACTORS))
    seconds = {key: math.fsum(spent for *_, spent in rows) for key, rows in tried.items()}
    # Of equals the factor nearest to 1.
    factor = {name: min(FACTORS, key=lambda f: (seconds[name, f], abs(f - 1))) for name in setup.costs}
    judged = paths(setup.test, {name: (chosen,) for name, chosen in factor.items()})
    return {
        name: (totals_of(rows), {"tokens": calibration.tokens, "factor": chosen})
        for (name, chosen), rows in judged.items()
    }
