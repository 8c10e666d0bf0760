"""The JSON of a bench, and what it says in words.

    machine       cpu, cores, gpu, threads (by contestant), threads_tried (tokens/s by contestant and count), versions
    settings      models, policies as given, options, seed, order of prompts, seconds that the runs took
    overall       a group: all prompts
    domains       DOMAIN -> a group
    without_loops overall and domains again, without the prompts whose plain output ends in a loop; null if none is left
    measurements  every run: contestant, prompt, repeat, tokens, steps, seconds

A group:

    prompts, loops    how many prompts, and how many of them have a plain output that ends in a loop
    plain             source (the faster way of plain decoding overall), tokens_per_second(_interval), ...; others: the
                      other way
    policies          NAME -> an entry: tokens_per_second, speedup (over plain), acceptance_length (tokens of steps /
                      steps), acceptance_length_per_prompt (mean of the prompts' own), identical_text (to plain's, on
                      all prompts and repeats), different_prompts, share of time, fallbacks, near_ties, and the sums
                      tokens, seconds and steps
    against           NAME -> an entry; identical_text is null when sampling, where other decoders draw other noise
    best_fixed        the fastest `fixed:*`, or null

Rates are ratios of sums. `*_interval` is [low, high]: 95%, paired bootstrap over prompts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bpkit.files import write_at_once

PHASES = ("target", "drafter", "policy", "other")
"""Where time goes: target passes, drafting, the policy's decisions, everything else."""


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the figures as JSON; at once."""
    write_at_once(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def check_writable(path: Path, *, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a result path before minutes of measuring. Raises ValueError or FileNotFoundError."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: name a file that ends in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: you have no permission to")


def entries(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Policies and peers of a group, by name."""
    return {**group["policies"], **group["against"]}


def groups(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups of a report by title: `overall` first, then the domains if there are several."""
    domains = report["domains"] if len(report["domains"]) > 1 else {}
    return {"overall": report["overall"], **domains}


def what_was_measured(report: dict[str, Any]) -> list[str]:
    """Sentences that say what the figures are."""
    machine, settings, overall = report["machine"], report["settings"], report["overall"]
    options = dict(settings["options"])
    temperature, new_tokens = options.pop("temperature"), options.pop("max_new_tokens")
    mode = "greedy" if temperature == 0 else f"temperature {temperature}, rule {settings['rule']}"
    more = "".join(f", {name} {value}" for name, value in options.items())
    plain = overall["plain"]
    others = "".join(
        f", the faster way ({o['source']}: {o['tokens_per_second']:.1f} tokens/s)" for o in plain["others"]
    )
    threads = machine["threads"]
    counts = sorted(set(threads.values()))
    said = f"{counts[0]}" if len(counts) == 1 else ", ".join(f"{name} {n}" for name, n in threads.items())
    load = machine["load_average"]
    busy = f", load average {load:.1f} at the start" if load is not None else ""
    return [
        f"Wall clock of whole generate calls; prompts: {overall['prompts']}, interleaved runs of each: "
        f"{settings['repeats']}; at most {new_tokens} new tokens, {mode}{more}, {settings['dtype']}, "
        f"seed {settings['seed']}.",
        f"Plain decoding is {plain['source']}{others}. Speed-ups are ratios of sums; in brackets: "
        "95% paired bootstrap over prompts.",
        f"{overall['loops']} of {overall['prompts']} plain outputs end in a loop, which inflates acceptance; "
        "the JSON has all figures without them too.",
        f"Machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, threads: "
        f"{said}{busy}.",
        *_about_sampling(settings),
        *_about_texts(overall),
    ]


def _about_sampling(settings: dict[str, Any]) -> list[str]:
    if settings["options"]["temperature"] == 0:
        return []
    said = []
    if settings["rule"] != "coupled":
        said.append(f"Under rule {settings['rule']!r} the text depends on the policy: it cannot be the same.")
    if settings["against"]:
        said.append("Other decoders draw other noise when sampling: their texts are not compared.")
    return said


def _about_texts(group: dict[str, Any]) -> list[str]:
    plain = group["plain"]
    everyone = {e["source"]: e for e in (plain, *plain["others"])} | entries(group)
    ties = [f"{name} {entry['near_ties']}" for name, entry in everyone.items() if entry["near_ties"]]
    said = [f"Near ties, where another verify width might choose otherwise: {', '.join(ties)}."] if ties else []
    for name, entry in everyone.items():
        different = entry["different_prompts"]
        if different:
            after = sum(d["near_tie"] for d in different)
            said.append(
                f"{name}: the text differs on {len(different)} prompt(s), after a near tie on {after} of them "
                f"({', '.join(d['id'] for d in different[:5])}{', ...' if len(different) > 5 else ''})."
            )
    return said
