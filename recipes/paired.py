"""Gains of one contestant over another, from what was measured prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bpkit.judge.statistics import Bootstrap, interval


def gain(report: Mapping[str, Any], ours: str, theirs: str) -> dict[str, Any]:
    """Tokens/s of one contestant over another's, less 1, in per cent, with its 95% interval, paired over prompts."""
    totals: dict[str, dict[str, list[float]]] = {ours: {}, theirs: {}}
    for row in report["measurements"]:
        if row["contestant"] in totals:
            done = totals[row["contestant"]].setdefault(row["prompt"], [0.0, 0.0])
            done[0] += row["tokens"]
            done[1] += row["seconds"]
    prompts = sorted(totals[ours])
    bootstrap = Bootstrap(len(prompts), report["settings"]["seed"])
    columns = [np.array([totals[name][prompt] for prompt in prompts]).T for name in (ours, theirs)]
    mine, other = (tokens.sum() / seconds.sum() for tokens, seconds in columns)
    resampled, others = (bootstrap.ratios(tokens, seconds) for tokens, seconds in columns)
    return {"value": 100 * (mine / other - 1), "interval": interval(100 * (resampled / others - 1))}
