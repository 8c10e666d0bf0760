"""All figures of a real model in one file: evaluations of traces, the run against peers, and a headline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bpkit.registry.resolve import written
from recipes.paired import gain

SCHEMA_VERSION = 1
Reports = Mapping[str, Mapping[str, Any]]
"""Reports of `bpkit evaluate`, by drafter."""


def summarise(peers: Mapping[str, Any], evaluations: Reports, selections: Reports) -> dict[str, Any]:
    """Plain JSON values.

    Args:
        peers: of `bench-peers`, with the two that are chosen among its contestants, as `POLICY@DRAFTER`.
        evaluations: on test prompts.
        selections: with validation prompts in the place of test prompts. They choose the best fixed size and the best
            policy over all drafters, so that no test prompt chooses what it is to judge.

    Raises:
        ValueError: a contestant is missing.
    """
    fixed, policy = chosen(selections)
    return {
        "schema_version": SCHEMA_VERSION,
        "headline": headline(peers, fixed, policy),
        "live": peers,
        "replay": {name: replay_figures(report) for name, report in evaluations.items()},
        "selection": {name: replay_figures(report) for name, report in selections.items()},
    }


def chosen(selections: Reports) -> tuple[str, str]:
    """The fixed size and the policy with the most modelled tokens/s, as `POLICY@DRAFTER`."""
    fixed, policies = {}, {}
    for drafter, report in selections.items():
        group = measured(report)["overall"]
        best = group["best_fixed"]
        fixed[f"fixed:{best['block_size']}@{drafter}"] = best["tokens_per_second"]
        for name, entry in group["policies"].items():
            policies[f"{spelled(name, entry)}@{drafter}"] = entry["tokens_per_second"]
    return max(fixed, key=fixed.__getitem__), max(policies, key=policies.__getitem__)


def spelled(name: str, entry: Mapping[str, Any]) -> str:
    """A policy with the options that were chosen for it, as it is typed.

    >>> spelled("goodput", {"tuning": {"chosen": {"discount": 0.9}}}), spelled("blockpilot", {})
    ('goodput:discount=0.9', 'blockpilot')
    """
    return written({"name": name, **((entry.get("tuning") or {}).get("chosen") or {})})


def headline(peers: Mapping[str, Any], fixed: str, policy: str) -> dict[str, Any]:
    """By the wall clock: the two choices and the peers over plain decoding by bpkit's loop."""
    overall = peers["overall"]
    entries = overall["contestants"]
    if missing := [name for name in (fixed, policy) if name not in entries]:
        raise ValueError(f"bench-peers was run without {' and '.join(missing)}: name them with --policy")
    speedups = {name: entry["over_plain"] for name, entry in entries.items()}
    return {
        "best_fixed": fixed,
        "best_fixed_speedup": speedups[fixed],
        "best_policy": policy,
        "best_policy_speedup": speedups[policy],
        "gain_over_best_fixed_percent": 100 * (speedups[policy] / speedups[fixed] - 1),
        "gain_interval": gain(peers, policy, fixed)["interval"],
        "loops_percent": 100 * overall["loops"] / overall["prompts"],
        "peers": {name: speedup for name, speedup in speedups.items() if "@" not in name},
    }


def measured(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an evaluation says under the cost model that it was given, which is its first."""
    found: Mapping[str, Any] = next(iter(report["cost_models"].values()))
    return found


def replay_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens/s over the best fixed size by replay: every policy, overall and by kind, and the bounds."""
    found, loops = measured(report), report["loops"]
    groups = {"overall": found["overall"], **found["domains"]}
    return {
        "groups": {
            title: {
                "prompts": group["prompts"],
                "loops_percent": 100 * loops[title] / group["prompts"],
                "best_fixed": {key: group["best_fixed"][key] for key in ("block_size", "acceptance_length")},
                "over_best_fixed": dict(_ratios(group)),
            }
            for title, group in groups.items()
        },
        "options": {name: spelled(name, entry) for name, entry in found["overall"]["policies"].items()},
        "learnable": found["learnable"],
        "left_out": report["left_out"],
    }


def _ratios(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Ratios with intervals: plain decoding, policies by name, the kind's own best size, and bounds."""
    best = group["best_fixed"]["tokens_per_second"]
    yield "plain decoding", {"value": group["fixed"]["1"]["tokens_per_second"] / best}
    for name, entry in group["policies"].items():
        yield name, {**entry["tokens_per_second_ratio"], "gap_share": entry["gap_share"]["value"]}
    own = group.get("best_fixed_of_domain")
    if own is not None:
        yield f"best size of the kind, {own['block_size']}", own["tokens_per_second_ratio"]
    for name, entry in {**group["oracle"], **group["bounds"]}.items():
        yield f"{name} (bound)", entry["tokens_per_second_ratio"]
