"""The same runs on a simulated server: what a trace and vLLM's calibrated costs say that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from bpkit.trace.cost import NamedCost
from bpkit.trace.load import ChangingLoad, ClosedLoop
from bpkit.trace.records import PromptTrace
from bpkit.trace.server import ServerReplayer
from bpkit.types import DecoderSpec
from recipes.vllm.engines import FEATURES, PLAIN, TABLE, policy_of
from recipes.vllm.measure import BATCH_TABLE, MEASURE, Run, batch_table, rate

NO_FEATURES = {"joint": "joint:confidences=false"}
"""Policies that read features if they are there, as they decide in an engine without."""
SAME = 0.03
"""Two methods whose tokens/s differ by less than this share have no order."""


@dataclass(frozen=True)
class Simulated:
    """What stands for the engine and its requests.

    Attributes:
        prompts: of a trace, by their ids. spec: of its decoder.
        changing_per_row: of the runs' plan. table: block sizes by concurrency, as tuned.
        max_tokens: positions of a step.
    """

    prompts: Mapping[str, PromptTrace]
    spec: DecoderSpec
    cost: NamedCost
    changing_per_row: int
    table: Mapping[int, int]
    max_tokens: int


def replayed_rate(run: Run, engine: Simulated) -> float:
    """Tokens per second that a run is predicted to have. Raises ValueError if the trace lacks a prompt."""
    used = sorted(set(run["prompts"]))
    lacking = [name for name in used if name not in engine.prompts]
    if lacking:
        raise ValueError(f"the trace lacks {len(lacking)} prompt(s) of the runs, such as {lacking[0]!r}")
    prompts, places = [engine.prompts[name] for name in used], [used.index(name) for name in run["prompts"]]
    levels = tuple(int(rows) for rows in run["load"].rpartition(":")[2].split("-"))
    closed = len(levels) == 1
    load = ClosedLoop(levels[0]) if closed else ChangingLoad(levels, engine.changing_per_row)
    policy = policy_of(run["method"]) or "fixed:1"
    policy = batch_table(engine.table) if policy == BATCH_TABLE else policy
    if not run["method"].endswith(FEATURES):
        policy = NO_FEATURES.get(policy, policy)
    replayer = ServerReplayer(engine.spec, policy, engine.cost, charges_decisions=True, max_tokens=engine.max_tokens)
    served = replayer.serve(prompts, places, load)
    # As runs are measured: from the step after that in which the last row's prompt was read.
    full = closed and served.full > served.filled + 1
    begin, end = (served.filled + 1, served.full) if full else (0, len(served.time))
    seconds = served.time[end - 1] - (served.time[begin - 1] if begin else 0.0)
    return float(served.tokens[begin:end].sum() / seconds)


def predictions(runs: Sequence[Run], engine: Simulated, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Predicted and measured tokens/s of each load and method, and how they agree. Raises ValueError."""
    rates: dict[str, dict[str, list[tuple[float, float]]]] = {}
    chosen = predicted_runs(runs)
    for place, run in enumerate(chosen):
        report(f"{run['load']}, {run['method']}", place, len(chosen))
        predicted = replayed_rate(run, engine)
        rates.setdefault(run["load"], {}).setdefault(run["method"], []).append((rate(run), predicted))
    loads = {load: _of_load(of) for load, of in rates.items()}
    every = [entry["error"] for of in loads.values() for entry in of["methods"].values()]
    worst = max(
        ((load, method) for load, of in loads.items() for method in of["methods"]),
        key=lambda where: abs(loads[where[0]]["methods"][where[1]]["error"]),
    )
    pairs = sum(of["pairs"] for of in loads.values())
    return {
        "headline": {
            "mean_error_percent": round(100 * fmean(map(abs, every)), 2),
            "bias_percent": round(100 * fmean(every), 2),
            "within_tenth": round(fmean(abs(error) < 0.1 for error in every), 4),
            "worst_error_percent": round(100 * loads[worst[0]]["methods"][worst[1]]["error"], 2),
            "worst_error_at": ", ".join(worst),
            "pairs": pairs,
            "pairs_in_order": sum(of["pairs_in_order"] for of in loads.values()),
        },
        "loads": loads,
    }


def predicted_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs that can be predicted: those whose drafts policies decide."""
    return [run for run in runs if run["phase"] == MEASURE and run["method"] not in (PLAIN, TABLE)]


def _of_load(rates: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    means = {method: np.exp(np.log(np.array(of)).mean(axis=0)) for method, of in rates.items()}
    differ = [
        bool((means[a][0] - means[b][0]) * (means[a][1] - means[b][1]) > 0)
        for a, b in combinations(means, 2)
        if abs(means[a][0] / means[b][0] - 1) >= SAME
    ]
    return {
        "methods": {
            method: {
                "measured": float(f"{measured:.5g}"),
                "predicted": float(f"{predicted:.5g}"),
                "error": round(float(predicted / measured) - 1, 4),
            }
            for method, (measured, predicted) in means.items()
        },
        "pairs": len(differ),
        "pairs_in_order": sum(differ),
    }
