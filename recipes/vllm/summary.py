"""Figures of the runs: tokens/s against the best fixed length of each load, texts against plain decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from bpkit.judge.statistics import interval, resample
from recipes.vllm.engines import PLAIN
from recipes.vllm.measure import FIXED, MEASURE, Run, rate

SCHEMA_VERSION = 1
DECISION_ROWS = "concurrency:32"
Runs = dict[str, dict[int, Run]]
"""Of a load, by method and repetition."""


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Figures of one target and drafter, by load, as plain JSON values."""
    by_load: dict[str, Runs] = {}
    for run in runs:
        if run["phase"] == MEASURE:
            by_load.setdefault(run["load"], {}).setdefault(run["method"], {})[run["repetition"]] = run
    return {load: _of_load(of) for load, of in by_load.items()}


def _of_load(runs: Runs) -> dict[str, Any]:
    whole = sorted(set.intersection(*(set(of) for of in runs.values())))  # repetitions that are complete
    rates = {method: np.array([rate(of[r]) for r in whole]) for method, of in runs.items()}
    if not whole:
        return {"repetitions": 0}
    best = max(FIXED, key=lambda method: float(np.log(rates[method]).mean()))
    return {
        "repetitions": len(whole),
        "best_fixed": best,
        "methods": {method: _of_method([runs[method][r] for r in whole], rates, method, best) for method in runs},
    }


def _of_method(runs: Sequence[Run], rates: Mapping[str, Any], method: str, best: str) -> dict[str, Any]:
    ratio = np.log(rates[method] / rates[best])
    found = {
        "tokens_per_second": _rounded(float(np.exp(np.log(rates[method]).mean()))),
        "ratio": _rounded(float(np.exp(ratio.mean()))),
        "interval": None,
        "ratio_to_plain": None,
        "verified_per_token": _rounded(fmean(run["verified_per_token"] for run in runs)),
        "by_repetition": [_rounded(value) for value in rates[method].tolist()],
    }
    if len(runs) > 1:
        found["interval"] = [_rounded(x) for x in interval(np.exp(ratio[resample(len(runs), 0)].mean(axis=1)))]
    if PLAIN in rates:
        found["ratio_to_plain"] = _rounded(float(np.exp(np.log(rates[method] / rates[PLAIN]).mean())))
    if runs[0]["decision_us"] is not None:
        found["decision_us"] = _rounded(fmean(run["decision_us"] for run in runs))
        found["decision_us_median"] = _rounded(fmean(run["decision_us_median"] for run in runs))
    return found


def texts_of(runs: Sequence[Run]) -> dict[str, Any]:
    """How many texts were compared with plain decoding's under the same load, and how many of them are the same."""
    plain = {(r["repetition"], r["load"]): r for r in runs if r["phase"] == MEASURE and r["method"] == PLAIN}
    count, equal, differ = 0, 0, dict[str, int]()
    for run in runs:
        reference = plain.get((run["repetition"], run["load"]))
        if run["phase"] != MEASURE or run["method"] == PLAIN or reference is None:
            continue
        same = sum(a == b for a, b in zip(run["digests"], reference["digests"], strict=True))
        count, equal = count + len(run["digests"]), equal + same
        if same < len(run["digests"]):
            differ[run["method"]] = differ.get(run["method"], 0) + len(run["digests"]) - same
    return {"texts": count, "texts_equal": equal, "texts_that_differ": differ}


def headline(reports: Mapping[str, Mapping[str, Any]], policy: str) -> dict[str, Any]:
    """Of several targets and drafters, by name: what a policy is worth against the best fixed length of each load.

    Raises:
        ValueError: a report lacks the policy, or has no complete repetition.
    """
    regret, gain, decision = dict[str, float](), dict[str, float](), list[float]()
    for name, report in reports.items():
        for load, of in report["loads"].items():
            entry = of.get("methods", {}).get(policy)
            if entry is None:
                raise ValueError(f"{name}, {load}: policy {policy!r} has no complete repetition")
            if load.startswith("changing"):
                gain[name] = _rounded(100 * (entry["ratio"] - 1))
            else:
                regret[f"{name} {load}"] = _rounded(100 * (1 - entry["ratio"]))
            if load == DECISION_ROWS:
                decision.append(entry["decision_us"])
    worst = max(regret, key=lambda where: regret[where])
    return {
        "policy": policy,
        "texts": sum(report["texts"] for report in reports.values()),
        "texts_equal": sum(report["texts_equal"] for report in reports.values()),
        "worst_regret_percent": regret[worst],
        "worst_regret_at": worst,
        "changing_load_gain_percent": _rounded(100 * (_geometric([1 + g / 100 for g in gain.values()]) - 1))
        if gain
        else None,
        "changing_load_gain_percent_by_setup": gain,
        "decision_us_at_32": _rounded(max(decision)) if decision else None,
    }


def _geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
