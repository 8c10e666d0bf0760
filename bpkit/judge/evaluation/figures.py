"""The figures of a group of test prompts under one cost model, as plain JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bpkit.judge.evaluation.bounds import Regret, Results
from bpkit.judge.evaluation.fixed import described as described_choice
from bpkit.judge.evaluation.fixed import label
from bpkit.judge.evaluation.policies import PolicyResult
from bpkit.judge.sources import counts_of, shares
from bpkit.judge.statistics import TOUCHES_ZERO, Bootstrap, Floats, Ints, Totals, interval, shares_of_gap
from bpkit.trace.oracle.paths import FixedChoice
from bpkit.trace.oracle.regret import kinds

FEATURES, DECIDING, ORACLE, REASON = "features", "deciding", "oracle", "reason"


class GroupFigures:
    """Figures of some test prompts.

    Args:
        prompts: by index among the test prompts.
        seed: of the bootstrap.

    Attributes:
        base, oracle: the best fixed size, and the oracle that gaps are measured up to, on these prompts; None where
            there is no such oracle.
        base_rates, oracle_rates: their tokens per second in each resample.
    """

    def __init__(self, results: Results, prompts: Ints, seed: int) -> None:
        self.results, self.prompts = results, prompts
        self.bootstrap = Bootstrap(len(prompts), seed)
        self.base, oracle = results.fixed[results.best_fixed].of(prompts), results.best_oracle
        self.oracle = None if oracle is None else oracle.of(prompts)
        self.base_rates = self.base.rates(self.bootstrap)
        self.oracle_rates = None if self.oracle is None else self.oracle.rates(self.bootstrap)

    def as_json(self, own_best: FixedChoice | None = None) -> dict[str, Any]:
        """Plain JSON values.

        Args:
            own_best: the choice that is best on this domain's own validation prompts, if there are any.
        """
        results, base, names = self.results, self.base, self.results.names
        regret = self._shares(results.fixed_regret, float(base.seconds.sum()), 0.0)
        described = {
            "prompts": len(base.tokens),
            "tokens": int(base.tokens.sum()),
            "best_fixed": {**described_choice(names, results.best_fixed), **self._figures(base), "regret": regret},
            "fixed": {label(names, choice): self._fixed(choice) for choice in results.fixed},
            "oracle": {name: self._compared(totals) for name, totals in results.oracles.items()},
            "bounds": {name: self._compared(totals) for name, totals in results.bounds.items()},
            "gap": self._gap(),
            "policies": {name: self._policy(name, result) for name, result in results.policies.items()},
        }
        if own_best is not None:
            own = self._compared(results.fixed[own_best])
            described["best_fixed_of_domain"] = {**described_choice(names, own_best), **own}
        if len(names) > 1:
            described["best_fixed_of_source"] = {
                name: {"block_size": choice.block_size, **self._compared(results.fixed[choice])}
                for name, choice in zip(names, results.best_of_source, strict=True)
            }
        return described

    def _fixed(self, choice: FixedChoice) -> dict[str, Any]:
        """A fixed choice; with several sources it says which one it is."""
        named = described_choice(self.results.names, choice) if len(self.results.names) > 1 else {}
        return {**named, **self._compared(self.results.fixed[choice])}

    def _gap(self) -> dict[str, Any] | None:
        """From the best fixed size to the oracle, in tokens/s; None where there is no oracle."""
        if self.oracle is None or self.oracle_rates is None:
            return None
        difference = interval(self.oracle_rates - self.base_rates)
        return {"tokens_per_second": self.oracle.rate - self.base.rate, "interval": difference}

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
        ratio = totals.rates(self.bootstrap) / self.base_rates
        return {
            **self._figures(totals),
            "tokens_per_second_ratio": {"value": totals.rate / self.base.rate, "interval": interval(ratio)},
        }

    def _policy(self, name: str, result: PolicyResult) -> dict[str, Any]:
        orders, bootstrap = [one.of(self.prompts) for one in result.replays], self.bootstrap
        rates = [one.rates(bootstrap) for one in orders]
        each = np.ones(len(self.prompts))
        steps = sum(float(one.steps.sum()) for one in orders)
        spent = result.decision.per_step * steps + result.decision.per_begin * (len(orders) * len(self.prompts))
        total = sum(float(one.seconds.sum()) for one in orders)
        charged, names = result.decision.charged, self.results.names
        counts = [
            counts_of(names, one.source, one.draft_length, one.num_accepted)
            for place in self.prompts
            for one in result.taken[place]
        ]
        return {
            "tokens_per_second": float(np.mean([one.rate for one in orders])),
            "tokens_per_second_ratio": _estimate(
                [one.rate / self.base.rate for one in orders], [some / self.base_rates for some in rates]
            ),
            "acceptance_length": _estimate(
                [one.acceptance_length for one in orders], [bootstrap.ratios(one.tokens, one.steps) for one in orders]
            ),
            "acceptance_length_per_prompt": _estimate(
                [one.acceptance_length_per_prompt for one in orders],
                [bootstrap.ratios(one.tokens / one.steps, each) for one in orders],
            ),
            "gap_share": self._gap_share(orders, rates),
            "decision_seconds_per_step": result.decision.per_step,
            "decision_seconds_per_step_untrimmed": result.decision.mean_per_step,
            "decision_seconds_per_prompt": result.decision.per_begin,
            "decision_share": spent / total if charged else None,
            "fallbacks": int(result.fallbacks[self.prompts].sum()),
            "options": result.tuned.candidate.describe(),
            "tuned": result.tuned.candidates > 1,
            "tuning": result.tuned.as_json(),
            "memory": bool(result.order_seeds),
            "orders": result.order_seeds,
            "regret": self._shares(self.results.regrets[name], total, spent if charged else 0.0),
            **({"sources": shares(counts)} if len(names) > 1 else {}),
        }

    def _shares(self, regret: Regret, total: float, deciding: float) -> dict[str, float | str]:
        """Of `total` seconds: `kinds`, `features`, `deciding` and, the rest, what the oracle takes too."""
        if isinstance(regret, str):
            return {REASON: regret}
        parts = np.append(np.sum([regret[i] for i in self.prompts], axis=0), deciding) / total
        named = (*kinds(len(self.results.names)), FEATURES, DECIDING)
        return {**dict(zip(named, parts.tolist(), strict=True)), ORACLE: float(1 - parts.sum())}

    def _gap_share(self, orders: Sequence[Totals], rates: Sequence[Floats]) -> dict[str, Any]:
        """Below 0 where a policy is slower than the best fixed size."""
        gap, base = self._gap(), self.base.rate
        if self.oracle is None or self.oracle_rates is None or gap is None:
            return {"value": None, "interval": None, "reason": "there is no oracle that chooses at each step"}
        oracle = self.oracle.rate
        if gap["interval"][0] <= TOUCHES_ZERO * base:
            why = "the interval of the gap between the best fixed size and the oracle touches zero"
            return {"value": None, "interval": None, "reason": f"{why}: a share of it would mean nothing"}
        shares = [(one.rate - base) / (oracle - base) for one in orders]
        return _estimate(shares, [shares_of_gap(some, self.base_rates, self.oracle_rates) for some in rates])


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
