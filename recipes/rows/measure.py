"""The bench of many rows with two drafters of one target, and the figures that sum it up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.judge.wall_clock.bench import BenchSettings, encoded
from bpkit.judge.wall_clock.rows.bench import run_rows_bench, texts_alone
from bpkit.progress import Progress
from bpkit.prompts import Prompt

SCHEMA_VERSION = 1
PLAIN_AT, SPEEDUP_AT = 16, 8
"""Batch sizes of the headline: of plain decoding beside transformers', and of speculative beside plain decoding."""
NGRAM = "ngram"
COST_ERROR = ("measured", "held_out", "mean_error")
TRACE_RATIO = ("trace_ratio",)
"""Where files of other commands have what belongs into the headline."""


def bench_rows(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    batch_sizes: Sequence[int],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The decoder's drafter at all batch sizes, then n-gram drafts at the one of the headline; plain JSON values.

    Args:
        settings: its fixed sizes are what n-gram drafts are tried with.
        batch_sizes: with those of the headline among them.
    """
    fixed = {name: policy for name, policy in settings.policies.items() if name.startswith("fixed:")}
    for_ngram = BenchSettings(
        fixed, settings.options, repeats=settings.repeats, threads=settings.threads, seed=settings.seed
    )
    alone = texts_alone(decoder, encoded(decoder, prompts, settings.seed), settings, progress=progress)
    bench = partial(run_rows_bench, progress=progress, alone=alone)
    reports = {
        decoder.spec.drafter_kind: bench(decoder, prompts, settings, batch_sizes),
        NGRAM: bench(decoder.with_policy("fixed:1", NGRAM), prompts, for_ngram, [SPEEDUP_AT]),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "headline": headline(reports),
        "drafts_for_free": {name: drafts_for_free(report) for name, report in reports.items()},
        "reports": reports,
    }


def headline(reports: Mapping[str, Any]) -> dict[str, Any]:
    """Texts of this library's decoders at batch sizes above 1, and how many are what they are alone; and speeds.

    `speedup_at_8` is that of the fastest policy over plain decoding at the same batch size; the same by drafter.
    """
    entries, (own, *others) = list(_side_by_side(reports)), reports
    plain, at = reports[own]["batch_sizes"][str(PLAIN_AT)]["plain"], f"plain_ratio_to_transformers_at_{PLAIN_AT}"
    found = {
        "texts": sum(entry["texts"] for entry in entries),
        "texts_equal": sum(entry["texts_equal"] for entry in entries),
        at: plain["ratio_to_transformers"],
        f"{at}_interval": plain["ratio_to_transformers_interval"],
    }
    for name, report in reports.items():
        policies = report["batch_sizes"][str(SPEEDUP_AT)]["policies"]
        best = max(policies, key=lambda policy: policies[policy]["tokens_per_second"])
        at = f"speedup_at_{SPEEDUP_AT}" + (f"_{name}" if name in others else "")
        found[at], found[f"{at}_by"] = policies[best]["ratio_to_plain"], best
        found[f"{at}_interval"] = policies[best]["ratio_to_plain_interval"]
        found[f"{at}_steps_alone"] = policies[best]["steps_ratio_to_plain"]
    return found


def _side_by_side(reports: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries of plain decoding and policies where several rows ran."""
    for report in reports.values():
        for size, group in report["batch_sizes"].items():
            if size != "1":
                yield group["plain"]
                yield from group["policies"].values()


def drafts_for_free(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By batch size and policy, what the speed-up over plain decoding would be if drafts took no time.

    What is left of the distance to the acceptance length is what verifying more positions costs.
    """
    found: dict[str, dict[str, float]] = {}
    for size, group in report["batch_sizes"].items():
        plain = group["plain"]["tokens_per_second"]
        for name, entry in group["policies"].items():
            if entry["share"] is not None:
                rest = entry["seconds"] * (1 - entry["share"]["drafter"])
                found.setdefault(size, {})[name] = entry["tokens"] / rest / plain
    return found


def figure_of(file: Path, place: Sequence[str]) -> float:
    """A number of a JSON file, by its keys. Raises ValueError, which names the file and the keys, or OSError."""
    value = json.loads(file.read_text(encoding="utf-8"))
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{file} has no number at {'.'.join(place)}: make it again with the command that --help names")
    return float(value)
