"""What a policy that picks among sources gains over each source alone and over fixed rules, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.paired import gain

SCHEMA_VERSION = 1
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """What was measured of one target with its sources.

    Attributes:
        live: of `bpkit bench`, one prompt at a time. rows: of `bpkit bench --batch-size N`, if there is one.
        replay: of `bpkit evaluate`.
        singles: the best fixed size of each source, as typed; rules: the fixed rules. All chosen on validation prompts.
    """

    live: Report
    rows: Report | None
    replay: Report
    singles: Sequence[str]
    rules: Sequence[str]


def summarise(pairs: Mapping[str, Pair], method: str, last_pass: Report) -> dict[str, Any]:
    """Plain JSON values; the headline is of the first pair, live, one prompt at a time.

    Raises:
        ValueError: the method, a single source or a rule is missing from a report.
    """
    figures = {name: of_pair(pair, method) for name, pair in pairs.items()}
    first = next(iter(figures.values()))["live"]
    return {
        "schema_version": SCHEMA_VERSION,
        "headline": {
            "method": method,
            "gain_over_best_single_percent": first["gain_over_best_single_percent"],
            "gain_over_fixed_rules_percent": first["gain_over_fixed_rules_percent"],
            "least_over_plain_in_any_kind": min(kind[method] for kind in first["over_plain_by_kind"].values()),
            "jacobi_passes_ratio": last_pass["headline"]["jacobi_passes_ratio"],
        },
        "pairs": figures,
    }


def of_pair(pair: Pair, method: str) -> dict[str, Any]:
    """Figures of one target."""
    best = best_single(pair)
    found = {"best_single": best, "live": live_figures(pair, method, best), "replay": replay_figures(pair.replay)}
    if pair.rows is not None:
        found["rows"] = rows_figures(pair.rows, method)
    return found


def best_single(pair: Pair) -> str:
    """The source and size that is fastest on validation prompts, as it is typed for `bpkit bench`.

    Raises:
        ValueError: it is not among the single sources.
    """
    best = measured(pair.replay)["overall"]["best_fixed"]
    drafters = [source["drafter"] for source in pair.replay["settings"]["sources"]]
    names = [name if drafters.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(drafters)]
    size, place = f"fixed:{best['block_size']}", names.index(best["source"])
    typed = (f"{size},source={place}", *([size] if place == 0 else []))
    for name in typed:
        if name in pair.singles:
            return name
    raise ValueError(f"the best single source and size is {typed[0]}: name it with --single, and in the bench")


def live_figures(pair: Pair, method: str, best: str) -> dict[str, Any]:
    """By the wall clock: speed-ups over plain decoding, by kind of text, and gains of the method."""
    overall, names = pair.live["overall"], (method, *pair.singles, *pair.rules)
    missing = [name for name in names if name not in overall["policies"]]
    if missing:
        raise ValueError(f"bpkit bench was run without {', '.join(missing)}: name them with --policy")
    groups = {"overall": overall, **pair.live["domains"]}
    return {
        "prompts": overall["prompts"],
        "loops": overall["loops"],
        "texts_equal": all(entry["identical_text"] for entry in overall["policies"].values()),
        "over_plain": {
            name: {key: entry[key] for key in ("speedup", "speedup_interval", "acceptance_length")}
            for name, entry in overall["policies"].items()
        },
        "over_plain_by_kind": {
            kind: {name: entry["speedup"] for name, entry in group["policies"].items()}
            for kind, group in groups.items()
            if kind != "overall"
        },
        "gain_over_best_single_percent": gain(pair.live, method, best),
        "gain_over_each_single_percent": {name: gain(pair.live, method, name) for name in pair.singles},
        "gain_over_fixed_rules_percent": {name: gain(pair.live, method, name) for name in pair.rules},
        "machine": pair.live["machine"],
        "settings": pair.live["settings"],
    }


def rows_figures(report: Report, method: str) -> dict[str, Any]:
    """Several prompts at once: tokens/s over plain decoding at that batch size, and the method's over each other's."""
    found = {}
    for size, group in report["batch_sizes"].items():
        rate = {name: entry["tokens_per_second"] for name, entry in group["policies"].items()}
        found[size] = {
            "over_plain": {name: entry["ratio_to_plain"] for name, entry in group["policies"].items()},
            "over_plain_interval": {
                name: entry["ratio_to_plain_interval"] for name, entry in group["policies"].items()
            },
            "gain_percent": {name: 100 * (rate[method] / rate[name] - 1) for name in rate if name != method},
            "texts": sum(entry["texts"] for entry in group["policies"].values()),
            "texts_equal": sum(entry["texts_equal"] for entry in group["policies"].values()),
        }
    return {"batch_sizes": found, "machine": report["machine"], "settings": report["settings"]}


def measured(report: Report) -> Report:
    """What an evaluation says under the cost model that it was given, which is its first."""
    found: Report = next(iter(report["cost_models"].values()))
    return found


def replay_figures(report: Report) -> dict[str, Any]:
    """Tokens/s over the best fixed source and size by replay, overall and by kind."""
    found = measured(report)
    groups = {"overall": found["overall"], **found["domains"]}
    return {
        "groups": {title: _group(group) for title, group in groups.items()},
        "options": {
            name: entry.get("tuning", {}).get("chosen") for name, entry in found["overall"]["policies"].items()
        },
        "sources": report["settings"].get("sources"),
    }


def _group(group: Report) -> dict[str, Any]:
    best = group["best_fixed"]["tokens_per_second"]
    return {
        "prompts": group["prompts"],
        "best_fixed": {key: value for key, value in group["best_fixed"].items() if not key.endswith("interval")},
        "plain": group["fixed"]["1"]["tokens_per_second"] / best,
        "over_best_fixed": {name: entry["tokens_per_second_ratio"] for name, entry in group["policies"].items()},
        "bounds": {name: entry["tokens_per_second_ratio"] for name, entry in group.get("oracle", {}).items()},
    }
