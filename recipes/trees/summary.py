"""What trees are worth: figures of several cases in one file, with a headline of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.paired import gain

SCHEMA_VERSION = 1
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Live:
    """What `bpkit bench` measured of trees and of chains.

    Attributes:
        tree, chains: policies, as they are named there.
    """

    report: Report
    tree: str
    chains: Sequence[str]


def summarise(cases: Mapping[str, Report], live: Mapping[str, Live]) -> dict[str, Any]:
    """Plain JSON values.

    Args:
        cases: with `nodes` and `speed`. live: of some of them.

    Raises:
        ValueError: a bench lacks a policy.
    """
    figures = {name: dict(case) for name, case in cases.items()}
    for name, measured in live.items():
        figures[name]["live"] = live_figures(measured)
    first = next(iter(figures))
    return {
        "schema_version": SCHEMA_VERSION,
        "headline": {
            "case": first,
            "acceptance_gain_percent": _gains(figures[first]),
            "acceptance_gain_percent_by_case": {name: _gains(case) for name, case in figures.items()},
            "modelled_ratio_to_best_chain": {name: _ratios(case) for name, case in figures.items()},
            "live_ratio_to_best_chain": {
                name: case["live"]["ratio_to_best_chain"]["value"] for name, case in figures.items() if "live" in case
            },
        },
        "cases": figures,
    }


def _gains(case: Report) -> dict[str, float]:
    """Of the tree rule that validation prompts chose, over the best chain of as many nodes."""
    at_most = case["nodes"]["at_most"]
    return {count: of["trees"][of["best"]]["gain_percent"]["value"] for count, of in at_most.items()}


def _ratios(case: Report) -> dict[str, dict[str, float]]:
    """Tokens/s of methods on trees over the best fixed chain, by cost model."""
    return {
        cost: {name: entry["tokens_per_second_ratio"]["value"] for name, entry in of["trees"].items()}
        for cost, of in case["speed"].items()
    }


def live_figures(live: Live) -> dict[str, Any]:
    """Tokens/s on trees over those of each chain, by the clock, paired over prompts; the best chain is that here."""
    policies, ratios = live.report["overall"]["policies"], {}
    missing = [name for name in (live.tree, *live.chains) if name not in policies]
    if missing or not live.chains:
        raise ValueError(
            f"bpkit bench was run without {', '.join(missing) or 'chains'}: name them with --policy, chains such as "
            "fixed:6@block-diffusion"
        )
    for chain in live.chains:
        percent = gain(live.report, live.tree, chain)
        ratios[chain] = {
            "value": 1 + percent["value"] / 100,
            "interval": [1 + end / 100 for end in percent["interval"]],
        }
    best = min(ratios, key=lambda name: ratios[name]["value"])
    return {
        "tree": live.tree,
        "best_chain": best,
        "ratio_to_best_chain": ratios[best],
        "ratio_to_each_chain": ratios,
        "texts_equal": {name: policies[name]["identical_text"] for name in (live.tree, *live.chains)},
        "machine": live.report["machine"],
        "settings": live.report["settings"],
    }
