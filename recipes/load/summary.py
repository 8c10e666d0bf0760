"""What one policy is worth under load, of several evaluations in one file: costs by costs, load by load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

SCHEMA_VERSION = 1
MANY_ROWS = 8
"""Rows from which on the share of the gap counts in the headline."""
KEPT = ("tokens_per_second", "tokens_per_second_ratio", "interval", "by_seed", "gap_share", "regret", "ttft", "tpot")
KEPT_OF_WORK = ("drafted_per_token", "verified_per_token", "wasted_per_token", "decision_us", "fallbacks")
Report = Mapping[str, Any]


def summarise(runs: Mapping[str, Report], policy: str) -> dict[str, Any]:
    """Plain JSON values.

    Args:
        runs: reports of `bpkit evaluate-load`, by name, such as the pair and the costs.
        policy: as it is named there.

    Raises:
        ValueError: a report lacks the policy.
    """
    figures = {name: _of_run(name, report, policy) for name, report in runs.items()}
    return {"schema_version": SCHEMA_VERSION, "headline": _headline(figures, policy), "runs": figures}


def table_of(report: Report) -> str:
    """The best fixed size of each closed loop, as an operator would write it for `batch_table`.

    >>> loads = {"concurrency:1": {"kind": "concurrency", "rows": 1, "best_fixed": {"block_size": 6}}}
    >>> table_of({"loads": loads})
    'batch_table:1:6'
    """
    best = {load["rows"]: load["best_fixed"]["block_size"] for load in closed_loops(report)}
    if not best:
        raise ValueError("the report has no closed loop: evaluate with --concurrency 1,2,4,...")
    first = min(best)
    return "batch_table:" + "+".join(f"{1 if rows == first else rows}:{size}" for rows, size in sorted(best.items()))


def closed_loops(report: Report) -> Iterable[Report]:
    """The loads whose number of rows stays."""
    return (load for load in report["loads"].values() if load["kind"] == "concurrency")


def _of_run(name: str, report: Report, policy: str) -> dict[str, Any]:
    loads = report["loads"]
    lacking = [load for load, of in loads.items() if policy not in of["policies"]]
    if lacking:
        raise ValueError(f"{name}: policy {policy!r} was not served at {', '.join(lacking)}; name it with --policy")
    told = ("target", "drafter", "cost", "prompts", "seeds", "decision_time_charged", "mixes_passes", "max_tokens")
    settings = {key: report["settings"][key] for key in told}
    return {
        "command": report["provenance"]["command"],
        "settings": {**settings, "bound_seeds": report["settings"]["bound_seeds"]},
        "loads": {load: _of_load(of) for load, of in loads.items()},
    }


def _of_load(load: Report) -> dict[str, Any]:
    best, bound = load["best_fixed"], load["bound"]
    return {
        "kind": load["kind"],
        "rows": load["rows"],
        "requests": load["requests"],
        "best_fixed": {"block_size": best["block_size"], **_kept(best)},
        "bound": None if bound is None else {"name": bound["name"], **_kept(bound)},
        "fixed": {size: entry["tokens_per_second_ratio"] for size, entry in load["fixed"].items()},
        "policies": {name: _kept(entry) for name, entry in load["policies"].items()},
        "simulated_steps_per_second": load["fixed"]["1"]["simulated_steps_per_second"],
        "simulated_row_steps_per_second": load["fixed"]["1"]["simulated_row_steps_per_second"],
    }


def _kept(entry: Report) -> dict[str, Any]:
    return {key: _rounded(entry[key]) for key in (*KEPT, *KEPT_OF_WORK) if key in entry}


def _rounded(value: Any) -> Any:
    """Figures with five digits, which is more than is known."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


Entry = tuple[str, Report, Report]
"""Of a policy at a load: where, the load, and the policy's figures."""


def _headline(figures: Mapping[str, Report], policy: str) -> dict[str, Any]:
    entries = {
        charged: [
            (f"{name} {load}", of, of["policies"][policy])
            for name, run in figures.items()
            if run["settings"]["decision_time_charged"] == charged
            for load, of in run["loads"].items()
        ]
        for charged in (True, False)
    }
    every = [*entries[True], *entries[False]]
    closed = [of for _, of, _ in every if of["kind"] == "concurrency"]
    shares = [e["gap_share"] for _, of, e in every if of["kind"] == "concurrency" and of["rows"] >= MANY_ROWS]
    known = [share for share in shares if share is not None]
    return {
        "policy": policy,
        **_against_fixed(entries[True]),
        "decisions_free": _against_fixed(entries[False]),
        "gap_share_from_8_rows": _rounded(fmean(known)) if known else None,
        "steps_per_second": _rounded(fmean(of["simulated_steps_per_second"] for of in closed if of["rows"] == 1)),
        "row_steps_per_second": _rounded(max(of["simulated_row_steps_per_second"] for of in closed)),
    }


def _against_fixed(entries: Sequence[Entry]) -> dict[str, Any]:
    """The worst of closed loops against the best size of each, and the mean gain under loads that change."""
    closed = {name: 100 * (1 - e["tokens_per_second_ratio"]) for name, of, e in entries if of["kind"] == "concurrency"}
    changing = {name: e["tokens_per_second_ratio"] for name, of, e in entries if of["kind"] == "changing"}
    worst = max(closed, key=lambda name: closed[name], default=None)
    return {
        "worst_regret_percent": None if worst is None else _rounded(closed[worst]),
        "worst_regret_at": worst,
        "changing_load_gain_percent": _rounded(100 * (_geometric(changing.values()) - 1)) if changing else None,
        "changing_load_gain_percent_by_run": {name: _rounded(100 * (ratio - 1)) for name, ratio in changing.items()},
    }


def _geometric(values: Iterable[float]) -> float:
    return math.exp(fmean(map(math.log, values)))
