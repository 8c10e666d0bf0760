"""The figures of one group of test prompts under one cost model, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bpkit.judge.evaluation.play import Decision, Runs
from bpkit.judge.evaluation.recipe import Recipe
from bpkit.judge.evaluation.regrets import Regrets, Shares
from bpkit.judge.evaluation.survey import Indices
from bpkit.judge.evaluation.tune import Tuned
from bpkit.judge.statistics import Bootstrap, Gap, interval
from bpkit.judge.statistics import Floats as Array
from bpkit.trace.oracle.regret import Taken

HEADLINE = "step_truncate"
"""The oracle that gaps are measured up to."""
NO_GAP = (
    "the interval of the gap between the best fixed size and the oracle touches zero: a share of it would mean nothing"
)


@dataclass(frozen=True)
class Performance:
    """What a policy did with the test prompts under one cost model.

    Attributes:
        runs: one, or one for each prompt order if the policy has a memory.
        order_seeds: of those orders; empty without a memory.
        fallbacks: faults that were mended, all orders together, int64 [prompts].
        charged: whether `decision` is in the seconds of `runs`.
        taken: the steps of each run, prompt by prompt.
    """

    runs: list[Runs]
    order_seeds: list[int]
    decision: Decision
    fallbacks: Indices
    tuned: Tuned
    charged: bool
    taken: list[list[Taken]]

    @property
    def recipe(self) -> Recipe:
        return self.tuned.recipe

    def of(self, prompts: Indices) -> Performance:
        """With some of the prompts."""
        return replace(
            self,
            runs=[run.of(prompts) for run in self.runs],
            fallbacks=self.fallbacks[prompts],
            taken=[[run[i] for i in prompts] for run in self.taken],
        )


@dataclass(frozen=True)
class Field:
    """Everybody on the test prompts under one cost model.

    Attributes:
        best_fixed: the block size chosen on all validation prompts.
        fixed: runs by block size.
        oracles, bounds: runs by name.
        policies: by name.
        regrets: of the policies by name. fixed_regrets: of the best fixed size.
    """

    best_fixed: int
    fixed: Mapping[int, Runs]
    oracles: Mapping[str, Runs]
    bounds: Mapping[str, Runs]
    policies: Mapping[str, Performance]
    regrets: Mapping[str, Regrets]
    fixed_regrets: Regrets

    def of(self, prompts: Indices) -> Field:
        """With some of the prompts, by index among the test prompts."""
        return Field(
            self.best_fixed,
            {size: runs.of(prompts) for size, runs in self.fixed.items()},
            {name: runs.of(prompts) for name, runs in self.oracles.items()},
            {name: runs.of(prompts) for name, runs in self.bounds.items()},
            {name: performance.of(prompts) for name, performance in self.policies.items()},
            {name: regrets.of(prompts) for name, regrets in self.regrets.items()},
            self.fixed_regrets.of(prompts),
        )


def describe_group(field: Field, bootstrap: Bootstrap, *, own_best: int | None = None) -> dict[str, Any]:
    """The figures of all prompts of `field`.

    Args:
        own_best: the size that is best on this domain's own validation prompts, if there are any.
    """
    base = field.fixed[field.best_fixed]
    headline = field.oracles[HEADLINE]
    gap = Gap(base.rate, headline.rate, _rates(base, bootstrap), _rates(headline, bootstrap))
    described = {
        "prompts": len(base.tokens),
        "tokens": int(base.tokens.sum()),
        "best_fixed": {
            "block_size": field.best_fixed,
            **_plain_figures(base, bootstrap),
            "regret": field.fixed_regrets.shares(float(base.seconds.sum()), 0.0),
        },
        "fixed": {str(size): _bound(runs, base, bootstrap) for size, runs in field.fixed.items()},
        "oracle": {name: _bound(runs, base, bootstrap) for name, runs in field.oracles.items()},
        "bounds": {name: _bound(runs, base, bootstrap) for name, runs in field.bounds.items()},
        "gap": {"tokens_per_second": gap.oracle - gap.fixed, "interval": gap.interval},
        "policies": {
            name: {**_policy(one, base, gap, bootstrap), "regret": _regret(one, field.regrets[name])}
            for name, one in field.policies.items()
        },
    }
    if own_best is not None:
        described["best_fixed_of_domain"] = {
            "block_size": own_best,
            **_bound(field.fixed[own_best], base, bootstrap),
        }
    return described


def _rates(runs: Runs, bootstrap: Bootstrap) -> Array:
    """Tokens per second in each resample: float64 [resamples]."""
    return bootstrap.ratios(runs.tokens, runs.seconds)


def _plain_figures(runs: Runs, bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "tokens_per_second": runs.rate,
        "tokens_per_second_interval": interval(_rates(runs, bootstrap)),
        "acceptance_length": runs.acceptance_length,
        "acceptance_length_interval": interval(bootstrap.ratios(runs.tokens, runs.steps)),
        "acceptance_length_per_prompt": runs.acceptance_length_per_prompt,
    }


def _bound(runs: Runs, base: Runs, bootstrap: Bootstrap) -> dict[str, Any]:
    """A fixed size or an oracle: its figures, and how it compares with the best fixed size."""
    ratio = _rates(runs, bootstrap) / _rates(base, bootstrap)
    return {
        **_plain_figures(runs, bootstrap),
        "tokens_per_second_ratio": {"value": runs.rate / base.rate, "interval": interval(ratio)},
    }


def _policy(one: Performance, base: Runs, gap: Gap, bootstrap: Bootstrap) -> dict[str, Any]:
    runs = one.runs
    resampled = [_rates(run, bootstrap) for run in runs]
    per_prompt = [run.tokens / run.steps for run in runs]
    count = np.ones(len(base.tokens))
    return {
        "tokens_per_second": float(np.mean([run.rate for run in runs])),
        "tokens_per_second_ratio": _estimate(
            [run.rate / base.rate for run in runs], [rates / gap.fixed_resampled for rates in resampled]
        ),
        "acceptance_length": _estimate(
            [run.acceptance_length for run in runs], [bootstrap.ratios(run.tokens, run.steps) for run in runs]
        ),
        "acceptance_length_per_prompt": _estimate(
            [run.acceptance_length_per_prompt for run in runs],
            [bootstrap.ratios(values, count) for values in per_prompt],
        ),
        "gap_share": _gap_share(runs, resampled, gap),
        **_decisions(one),
        "fallbacks": int(one.fallbacks.sum()),
        "options": one.recipe.describe(),
        "tuned": one.tuned.candidates > 1,
        "tuning": one.tuned.as_json(),
        "memory": bool(one.order_seeds),
        "orders": one.order_seeds,
    }


def _gap_share(runs: Sequence[Runs], resampled: Sequence[Array], gap: Gap) -> dict[str, Any]:
    if gap.touches_zero:
        return {"value": None, "interval": None, "reason": NO_GAP}
    return _estimate([gap.share(run.rate) for run in runs], [gap.shares(rates) for rates in resampled])


def _decisions(one: Performance) -> dict[str, Any]:
    """What deciding takes, and which share of all time that is if it is charged; all orders together."""
    spent, total = _spent(one)
    return {
        "decision_seconds_per_step": one.decision.per_step,
        "decision_seconds_per_step_untrimmed": one.decision.mean_per_step,
        "decision_seconds_per_prompt": one.decision.per_begin,
        "decision_share": spent / total if one.charged else None,
    }


def _regret(one: Performance, regrets: Regrets) -> Shares:
    """Shares of the policy's time that the oracle would not have taken; all orders together."""
    spent, total = _spent(one)
    return regrets.shares(total, spent if one.charged else 0.0)


def _spent(one: Performance) -> tuple[float, float]:
    """Seconds of decisions, and all seconds; all orders together."""
    steps = sum(float(run.steps.sum()) for run in one.runs)
    prompts = sum(len(run.steps) for run in one.runs)
    spent = one.decision.per_step * steps + one.decision.per_begin * prompts
    return spent, sum(float(run.seconds.sum()) for run in one.runs)


def _estimate(values: Sequence[float], resampled: Sequence[Array]) -> dict[str, Any]:
    """A figure and its interval: by resampling prompts, or over the prompt orders if there are several.

    With several orders, the figure is their mean, `interval` is from the lowest to the highest, and
    `interval_over_prompts` is what resampling says of the mean.
    """
    mean = np.mean(np.stack(resampled), axis=0)
    if len(values) == 1:
        return {"value": values[0], "interval": interval(mean)}
    return {
        "value": float(np.mean(values)),
        "interval": [min(values), max(values)],
        "interval_over_prompts": interval(mean),
    }
