"""The figures of a group of test prompts under one cost model, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpkit.judge.evaluation.oracles import HEADLINE, Oracles
from bpkit.judge.evaluation.policies import PolicyResult
from bpkit.judge.statistics import Bootstrap, Floats, Gap, Ints, Totals, interval

NO_GAP = (
    "the interval of the gap between the best fixed size and the oracle touches zero: a share of it would mean nothing"
)


@dataclass(frozen=True)
class Results:
    """Everything on the test prompts under one cost model.

    Attributes:
        best_fixed: the block size chosen on all validation prompts.
        fixed: by block size. bounds: by name, other than oracles.
    """

    best_fixed: int
    fixed: Mapping[int, Totals]
    oracles: Oracles
    bounds: Mapping[str, Totals]
    policies: Mapping[str, PolicyResult]


def describe_group(results: Results, prompts: Ints, seed: int, *, own_best: int | None = None) -> dict[str, Any]:
    """The figures of some test prompts, by index among them.

    Args:
        seed: of the bootstrap.
        own_best: the size that is best on this domain's own validation prompts, if there are any.
    """
    return _Group(results, prompts, seed).describe(own_best)


class _Group:
    """Some test prompts, and what the others are compared with on them: the best fixed size and the oracle."""

    def __init__(self, results: Results, prompts: Ints, seed: int) -> None:
        self.results, self.prompts = results, prompts
        self.bootstrap = Bootstrap(len(prompts), seed)
        self.base = results.fixed[results.best_fixed].of(prompts)
        oracle = results.oracles.totals[HEADLINE].of(prompts)
        self.gap = Gap(self.base.rate, oracle.rate, self.base.rates(self.bootstrap), oracle.rates(self.bootstrap))

    def describe(self, own_best: int | None) -> dict[str, Any]:
        results, base = self.results, self.base
        regret = results.oracles.fixed_regret.shares(self.prompts, float(base.seconds.sum()), 0.0)
        described = {
            "prompts": len(base.tokens),
            "tokens": int(base.tokens.sum()),
            "best_fixed": {"block_size": results.best_fixed, **self._figures(base), "regret": regret},
            "fixed": {str(size): self._compared(totals) for size, totals in results.fixed.items()},
            "oracle": {name: self._compared(totals) for name, totals in results.oracles.totals.items()},
            "bounds": {name: self._compared(totals) for name, totals in results.bounds.items()},
            "gap": {"tokens_per_second": self.gap.oracle - self.gap.fixed, "interval": self.gap.interval},
            "policies": {name: self._policy(name, result) for name, result in results.policies.items()},
        }
        if own_best is not None:
            own = self._compared(results.fixed[own_best])
            described["best_fixed_of_domain"] = {"block_size": own_best, **own}
        return described

    def _figures(self, totals: Totals) -> dict[str, Any]:
        return {
            "tokens_per_second": totals.rate,
            "tokens_per_second_interval": interval(totals.rates(self.bootstrap)),
            "acceptance_length": totals.acceptance_length,
            "acceptance_length_interval": interval(self.bootstrap.ratios(totals.tokens, totals.steps)),
            "acceptance_length_per_prompt": totals.acceptance_length_per_prompt,
        }

    def _compared(self, totals: Totals) -> dict[str, Any]:
        """A fixed size or a bound: its figures, and how it compares with the best fixed size."""
        totals = totals.of(self.prompts)
        ratio = totals.rates(self.bootstrap) / self.gap.fixed_resampled
        return {
            **self._figures(totals),
            "tokens_per_second_ratio": {"value": totals.rate / self.base.rate, "interval": interval(ratio)},
        }

    def _policy(self, name: str, result: PolicyResult) -> dict[str, Any]:
        orders, bootstrap, gap = [one.of(self.prompts) for one in result.replays], self.bootstrap, self.gap
        rates = [one.rates(bootstrap) for one in orders]
        each = np.ones(len(self.prompts))
        share: dict[str, Any] = {"value": None, "interval": None, "reason": NO_GAP}
        if not gap.touches_zero:
            share = _estimate([gap.share(one.rate) for one in orders], [gap.shares(some) for some in rates])
        steps = sum(float(one.steps.sum()) for one in orders)
        spent = result.decision.per_step * steps + result.decision.per_begin * (len(orders) * len(self.prompts))
        total = sum(float(one.seconds.sum()) for one in orders)
        regret = self.results.oracles.regrets[name].shares(self.prompts, total, spent if result.charged else 0.0)
        return {
            "tokens_per_second": float(np.mean([one.rate for one in orders])),
            "tokens_per_second_ratio": _estimate(
                [one.rate / self.base.rate for one in orders], [some / gap.fixed_resampled for some in rates]
            ),
            "acceptance_length": _estimate(
                [one.acceptance_length for one in orders], [bootstrap.ratios(one.tokens, one.steps) for one in orders]
            ),
            "acceptance_length_per_prompt": _estimate(
                [one.acceptance_length_per_prompt for one in orders],
                [bootstrap.ratios(one.tokens / one.steps, each) for one in orders],
            ),
            "gap_share": share,
            "decision_seconds_per_step": result.decision.per_step,
            "decision_seconds_per_step_untrimmed": result.decision.mean_per_step,
            "decision_seconds_per_prompt": result.decision.per_begin,
            "decision_share": spent / total if result.charged else None,
            "fallbacks": int(result.fallbacks[self.prompts].sum()),
            "options": result.tuned.candidate.describe(),
            "tuned": result.tuned.candidates > 1,
            "tuning": result.tuned.as_json(),
            "memory": bool(result.order_seeds),
            "orders": result.order_seeds,
            "regret": regret,
        }


def _estimate(values: Sequence[float], resampled: Sequence[Floats]) -> dict[str, Any]:
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
