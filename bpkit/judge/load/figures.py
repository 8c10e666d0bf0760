"""The figures of one load, as plain JSON values: means over seeds, and ratios to the best fixed size, seed by seed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bpkit.judge.evaluation.figures import REASON
from bpkit.judge.evaluation.fixed import described
from bpkit.judge.load.setup import BOUNDS, CONCURRENCY, FIXED, POLICIES, RATE, LoadCase, LoadSetup
from bpkit.judge.sources import source_names
from bpkit.judge.statistics import LEVEL, Floats
from bpkit.trace.server import Served


@dataclass(frozen=True)
class ServerRun:
    """What a server did, and the seconds that simulating it took.

    Attributes:
        least: seconds of all steps together that nobody can undercut who knows as much; of bounds.
        regrets: of the bound that gaps are measured to: by policy, where its time goes that the bound does not take, or
            why that is not known.
    """

    served: Served
    seconds: float
    least: float | None = None
    regrets: Mapping[str, Mapping[str, float] | str] = field(default_factory=dict)


CaseRuns = dict[str, dict[str, dict[int, ServerRun]]]
"""The runs of one load by group, name and number of the seed."""
TOKENS_PER_SECOND, PER_REQUEST = "tokens_per_second", "tokens_per_second_per_request"
NO_GAP = 0.01
"""Of the best fixed size's tokens/s: up to so much is no gap to have a share of."""
FEW_TESTED = 20
"""Drafted tokens at a position below which no share of them is told."""
MOST_POINTS = 400
"""Steps of a changing load that are kept for its picture."""


@dataclass(frozen=True)
class Window:
    """The part of a run that figures are of.

    Attributes:
        steps: that it has. tokens: that the engine gave in it. seconds: that it took.
        requests: which ended in it, bool [requests].
    """

    steps: slice
    tokens: int
    seconds: float
    requests: Any

    @classmethod
    def of(cls, case: LoadCase, served: Served, *, prompts_cost: bool) -> Window:
        """The steps with all rows busy of a closed loop; else everything.

        A first token is decided by reading the prompt: it counts where that has a price.
        """
        closed = case.kind == CONCURRENCY and served.full > served.filled
        steps = slice(served.filled, served.full) if closed else slice(0, len(served.time))
        start = float(served.time[steps.start - 1]) if steps.start else 0.0
        end = float(served.time[steps.stop - 1])
        first = int(((served.first > start) & (served.first <= end)).sum()) if prompts_cost else 0
        ended = (served.ended > start) & (served.ended <= end)
        tokens = int(served.tokens[steps].sum()) + first
        return cls(steps, tokens, end - start, ended if ended.any() else np.ones_like(ended))


class CaseFigures:
    """Figures of one load.

    Args:
        runs: of seeds in which everything was run; one or more.
    """

    def __init__(self, setup: LoadSetup, case: LoadCase, runs: CaseRuns) -> None:
        self.setup, self.case, self.runs = setup, case, runs
        self.compared = PER_REQUEST if case.kind == RATE else TOKENS_PER_SECOND
        fixed = {name: self._rates(some, some) for name, some in runs[FIXED].items()}
        self.best = max(fixed, key=lambda name: float(np.log(fixed[name]).mean()))
        self.bound = next((name for name, some in runs.get(BOUNDS, {}).items() if some), None)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        choice = described(source_names(self.setup.spec), self.setup.fixed[self.best])
        of = {
            group: {name: self._entry(group, name) for name, runs in self.runs.get(group, {}).items() if runs}
            for group in (BOUNDS, POLICIES, FIXED)
        }
        return {
            **self.case.as_json(),
            "seeds": len(self.runs[FIXED][self.best]),
            "compared": self.compared,
            "best_fixed": {**choice, **of[FIXED][self.best]},
            "bound": None if self.bound is None else {"name": self.bound, **of[BOUNDS][self.bound]},
            **of,
            **_simulated(
                [run for g in (FIXED, POLICIES) for of in self.runs.get(g, {}).values() for run in of.values()]
            ),
            **({"rows_over_time": self._rows_over_time()} if self.case.levels else {}),
        }

    def _rates(self, runs: Mapping[int, ServerRun], numbers: Iterable[int]) -> Floats:
        """What is compared, of seeds by number: float64 [seeds]."""
        of = _per_request if self.compared == PER_REQUEST else _engine
        return np.array([of(runs[number].served, self._window(runs[number])) for number in numbers])

    def _ratios(self, group: str, name: str, numbers: Collection[int]) -> Floats:
        """To the best fixed size on the same requests: float64 [seeds]."""
        return self._rates(self.runs[group][name], numbers) / self._rates(self.runs[FIXED][self.best], numbers)

    def _window(self, run: ServerRun) -> Window:
        return Window.of(self.case, run.served, prompts_cost=self.setup.cost.prices_prefill)

    def _entry(self, group: str, name: str) -> dict[str, Any]:
        numbers, runs = self.runs[group][name].keys(), list(self.runs[group][name].values())
        served, windows = [run.served for run in runs], [self._window(run) for run in runs]
        ratios = self._ratios(group, name, numbers)
        return {
            TOKENS_PER_SECOND: _geometric([_engine(one, w) for one, w in zip(served, windows, strict=True)]),
            PER_REQUEST: _geometric([_per_request(one, w) for one, w in zip(served, windows, strict=True)]),
            "tokens_per_second_ratio": _geometric(ratios),
            "interval": None if (group, name) == (FIXED, self.best) else ratio_interval(ratios),
            "by_seed": ratios.tolist(),
            **({"gap_share": self._gap_share(group, name)} if group != FIXED else {}),
            **({"regret": self._regret(name)} if group == POLICIES else {}),
            **({"least_seconds": float(np.mean([run.least for run in runs]))} if group == BOUNDS else {}),
            **self._latencies(served, windows),
            **_work(served, windows),
            "decision_us": self._decision(group, served),
            "fallbacks": sum(one.fallbacks for one in served),
            **_simulated(runs),
        }

    def _gap_share(self, group: str, name: str) -> float | None:
        """(it - best fixed) / (bound - best fixed), of seeds of the bound; None where there is hardly a gap."""
        if self.bound is None:
            return None
        numbers = self.runs[BOUNDS][self.bound].keys() & self.runs[group][name].keys()
        own, bound = self._ratios(group, name, numbers), self._ratios(BOUNDS, self.bound, numbers)
        interval = ratio_interval(bound)
        if _geometric(bound) - 1 < NO_GAP or (interval is not None and interval[0] <= 1):
            return None
        return (_geometric(own) - 1) / (_geometric(bound) - 1)

    def _regret(self, policy: str) -> dict[str, float | str] | None:
        """Shares of the policy's time, mean over seeds of the bound; only `reason` where they are not known."""
        if self.bound is None:
            return None
        found = [run.regrets[policy] for run in self.runs[BOUNDS][self.bound].values()]
        shares = [one for one in found if not isinstance(one, str)]
        if len(shares) < len(found):
            return {REASON: next(one for one in found if isinstance(one, str))}
        return {kind: float(np.mean([one[kind] for one in shares])) for kind in shares[0]}

    def _latencies(self, served: Sequence[Served], windows: Sequence[Window]) -> dict[str, Any]:
        """Of the requests that ended in the window."""
        first, each, slow = [], [], []
        for one, window in zip(served, windows, strict=True):
            inside = window.requests
            first.append((one.first - one.arrived)[inside])
            several = inside & (one.output_lengths > 1)
            each.append(((one.ended - one.first)[several]) / (one.output_lengths[several] - 1))
            slow.append(inside.sum() - several.sum())
        described = {"ttft": _quantiles(np.concatenate(first)), "tpot": _quantiles(np.concatenate(each))}
        limit = self.setup.slo_tpot
        if limit is None:
            return described
        within = [int((some <= limit).sum() + others) for some, others in zip(each, slow, strict=True)]
        share = sum(within) / sum(int(window.requests.sum()) for window in windows)
        rates = [count / window.seconds for count, window in zip(within, windows, strict=True)]
        return {**described, "goodput": {"share": share, "requests_per_second": float(np.mean(rates))}}

    def _decision(self, group: str, served: Sequence[Served]) -> float | None:
        """Microseconds of a step's decisions; None where they were not charged."""
        if group != POLICIES or not self.setup.charged:
            return None
        return 1e6 * float(np.concatenate([one.decisions for one in served]).mean())

    def _rows_over_time(self) -> dict[str, Any]:
        """Time and rows of the first seed's steps, for the best fixed size and the policies."""
        shown = {self.best: self.runs[FIXED][self.best], **self.runs.get(POLICIES, {})}
        found = {}
        for name, runs in shown.items():
            served = next(iter(runs.values())).served
            some = np.unique(np.linspace(0, len(served.time) - 1, MOST_POINTS).astype(int))
            tokens = np.cumsum(served.tokens)
            found[name] = {
                "time": served.time[some].tolist(),
                "rows": served.rows[some].tolist(),
                "tokens": tokens[some].tolist(),
            }
        return found


def ratio_interval(ratios: Floats) -> list[float] | None:
    """[low, high]: 95%, Student's t of the logarithms; None for a single seed."""
    if len(ratios) < 2:
        return None
    from scipy import stats

    logs = np.log(ratios)
    half = stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return [float(end) for end in np.exp(logs.mean() + np.array([-half, half]))]


def _engine(served: Served, window: Window) -> float:
    return window.tokens / window.seconds


def _per_request(served: Served, window: Window) -> float:
    """Tokens over seconds from arrival to end, sums over requests."""
    inside = window.requests
    return float(served.output_lengths[inside].sum() / (served.ended - served.arrived)[inside].sum())


def _geometric(values: Sequence[float] | Floats) -> float:
    """So that a mean of ratios is the ratio of means."""
    return float(np.exp(np.log(values).mean()))


def _quantiles(values: Floats) -> dict[str, float] | None:
    if not len(values):
        return None
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}


def _work(served: Sequence[Served], windows: Sequence[Window]) -> dict[str, Any]:
    """What the steps of the windows did, all seeds together; acceptance by position is of all steps."""
    pairs = list(zip(served, windows, strict=True))
    sums = {
        name: sum(int(getattr(one, name)[window.steps].sum()) for one, window in pairs)
        for name in ("rows", "drafted", "verified", "tokens")
    }
    steps, tokens = sum(window.steps.stop - window.steps.start for window in windows), sums["tokens"]
    tested, accepted = (np.sum([getattr(one, name) for one in served], axis=0) for name in ("tested", "accepted"))
    some = tested >= FEW_TESTED
    return {
        "acceptance_length": tokens / sums["rows"],
        "acceptance_by_position": (accepted[some] / tested[some]).tolist(),
        "drafted_per_token": sums["drafted"] / tokens,
        "verified_per_token": sums["verified"] / tokens,
        "wasted_per_token": (sums["verified"] - tokens) / tokens,
        "rows": sums["rows"] / steps,
        "steps": steps / len(served),
    }


def _simulated(runs: Sequence[ServerRun]) -> dict[str, float]:
    """How fast the simulation itself was: steps, and steps of single rows, over its own seconds."""
    seconds = sum(run.seconds for run in runs)
    steps, row_steps = sum(len(run.served.rows) for run in runs), sum(int(run.served.rows.sum()) for run in runs)
    return {"simulated_steps_per_second": steps / seconds, "simulated_row_steps_per_second": row_steps / seconds}
