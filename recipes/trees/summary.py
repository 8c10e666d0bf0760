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
    """What `bpkit bench` measured of the same prompts: trees, and chains, maybe in one file.

    Attributes:
        tree, chain: policies, as they are named there.
    """

    trees: Report
    chains: Report
    tree: str
    chain: Sequence[str]


def summarise(cases: Mapping[str, Report], live: Mapping[str, Live]) -> dict[str, Any]:
    """Plain JSON values.

    Args:
        cases: with `nodes` and `speed`. live: of some of them.

    Raises:
        ValueError: a bench lacks a policy or a prompt.
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
    ratios, trees = {}, _rows(live.trees, live.tree, "tree")
    for chain in live.chain:
        chains = _rows(live.chains, chain, "chain")
        if {row["prompt"] for row in trees} != {row["prompt"] for row in chains}:
            raise ValueError(f"{live.tree} and {chain} were not measured on the same prompts")
        percent = gain({"measurements": [*trees, *chains], "settings": live.trees["settings"]}, "tree", "chain")
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
        "machine": live.trees["machine"],
        "settings": {"trees": live.trees["settings"], "chains": live.chains["settings"]},
    }


def _rows(report: Report, policy: str, name: str) -> list[dict[str, Any]]:
    """Measurements of one policy, under another name. Raises ValueError if there are none."""
    rows = [{**row, "contestant": name} for row in report["measurements"] if row["contestant"] == policy]
    if not rows:
        raise ValueError(f"bpkit bench was run without {policy}: name it with --policy")
    return rows
