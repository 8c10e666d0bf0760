"""The report of a bench of many rows: what its JSON holds, the tables on the terminal, and a picture.

    machine       as in `bpkit.judge.wall_clock.report`; threads and threads_tried by batch size and decoder
    settings      the same, batch_sizes, and sets: ids of the prompts that are timed together
    batch_sizes   BATCH SIZE -> a group
    measurements  every run: contestant, batch size, set, repeat, tokens, passes, seconds

A group:

    runs          how often each decoder was timed: sets of prompts times repeats
    plain         an entry: this library's loop without drafting
    transformers  an entry: transformers' `generate` on batches of prompts in their order, padded on the left
    policies      NAME -> an entry
    best_fixed    the fastest `fixed:*` at this batch size, or null

An entry: tokens_per_second, ratio_to_plain and ratio_to_transformers at the same batch size, steps_ratio_to_plain (the
same without the time of reading prompts, whose share is prefill_share), acceptance_length (tokens of steps / steps of
rows), texts and texts_equal (to the prompt's text alone, by plain decoding; null where noise
differs), different_prompts, near_ties, share of time, fallbacks, and the sums tokens, seconds and passes of the target;
of several sources of drafts `sources`, shares of the rows' steps and of the tokens that these yield, by who drafted.

Rates are ratios of sums. `*_interval` is [low, high]: 95%, paired bootstrap over runs; null if there was one run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences
from bpkit.judge.wall_clock.report import COLOURS, PHASES, about_sources

HEAD = (
    "decoding",
    "tokens/s",
    "to plain",
    "steps\nalone",
    "to transformers",
    "acceptance\nlength",
    "same\ntext",
    "time %: target/\ndrafter/policy/other",
    "fall-\nbacks",
)

SPREAD = 1.03
"""By what lines of a picture are moved apart, so that their intervals do not hide each other."""


def entries(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All of a group, by name."""
    return {"plain": group["plain"], "transformers": group["transformers"], **group["policies"]}


def print_rows_report(report: dict[str, Any], console: Console) -> None:
    """A table for each batch size, and the sentences about them."""
    for size, group in report["batch_sizes"].items():
        console.print(batch_table(size, group))
    print_sentences(what_was_measured(report), console)


def batch_table(size: str, group: dict[str, Any]) -> Table:
    """One batch size as a table."""
    rows = {name: _row(name, entry) for name, entry in entries(group).items()}
    best = max(group["policies"], key=lambda name: group["policies"][name]["tokens_per_second"], default=None)
    if best is not None:
        rows[best] = TableRow(rows[best].cells, "green")
    plain = [rows.pop("plain"), rows.pop("transformers")]
    return Table(f"batch size {size} ({group['plain']['texts']} prompts)", HEAD, [plain, list(rows.values())])


def _row(name: str, entry: dict[str, Any]) -> TableRow:
    length, share, same = entry["acceptance_length"], entry["share"], entry["texts_equal"]
    return TableRow(
        (
            name,
            _figure(entry, "tokens_per_second", ".1f"),
            _figure(entry, "ratio_to_plain", ".2f", "x"),
            "-" if entry["steps_ratio_to_plain"] is None else f"{entry['steps_ratio_to_plain']:.2f}x",
            _figure(entry, "ratio_to_transformers", ".2f", "x"),
            "-" if length is None else f"{length:.2f}",
            "-" if same is None else f"{same}/{entry['texts']}",
            "-" if share is None else "/".join(f"{100 * share[phase]:.0f}" for phase in PHASES),
            str(entry["fallbacks"]),
        )
    )


def _figure(entry: dict[str, Any], name: str, form: str, unit: str = "") -> str:
    spread = entry[f"{name}_interval"]
    return f"{entry[name]:{form}}{unit}" + (f" {bracketed(spread, form)}" if spread else "")


def what_was_measured(report: dict[str, Any]) -> list[str]:
    """Sentences that say what the figures are."""
    machine, settings, groups = report["machine"], report["settings"], report["batch_sizes"]
    temperature, new_tokens = settings["options"]["temperature"], settings["options"]["max_new_tokens"]
    mode = "greedy" if temperature == 0 else f"temperature {temperature}, rule {settings['rule']}"
    counts = {size: sorted(set(threads.values())) for size, threads in machine["threads"].items()}
    said = ", ".join(f"{'/'.join(map(str, found))} at {size}" for size, found in counts.items())
    sizes = sorted({len(ids) for ids in settings["sets"]})
    fixed = [f"{group['best_fixed']} at {size}" for size, group in groups.items() if group["best_fixed"]]
    return [
        f"Wall clock of whole sets of {'-'.join(map(str, sizes[:: len(sizes) - 1 or 1]))} prompts "
        f"({len(settings['sets'])} sets, interleaved runs of each: {settings['repeats']}); at most {new_tokens} new "
        f"tokens, {mode}, {settings['dtype']}, seed {settings['seed']}.",
        "Ratios are to plain decoding in this library's loop and to transformers' generate, at the same batch size; in "
        "brackets: 95% paired bootstrap over runs of a set.",
        "Steps alone: the ratio to plain decoding without the time of reading prompts, which takes "
        + ", ".join(
            f"{_percent(group['plain']['prefill_share'])} of plain decoding at {n}" for n, group in groups.items()
        )
        + ".",
        *([f"Best fixed size: {', '.join(fixed)}."] if fixed else []),
        f"Machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, threads by "
        f"batch size: {said}.",
        *_about_texts(groups),
        *(f"At {size}: {said}" for size, group in groups.items() for said in about_sources(group["policies"])),
    ]


def _percent(share: float | None) -> str:
    return "an unknown part" if share is None else f"{100 * share:.0f}%"


def _about_texts(groups: dict[str, Any]) -> list[str]:
    said = []
    for size, group in groups.items():
        for name, entry in entries(group).items():
            different = entry["different_prompts"]
            if different:
                after = sum(one["near_tie"] for one in different)
                ids = ", ".join(one["id"] for one in different[:5]) + ", ..." * (len(different) > 5)
                said.append(
                    f"{name} at {size}: another text than alone on {len(different)} prompt(s), after a near tie on "
                    f"{after} of them ({ids})."
                )
    return said


def plot_rows_report(report: dict[str, Any], path: Path) -> None:
    """Write a picture: speed over plain decoding by batch size, a line for each decoder. The suffix says the format."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    groups, settings = report["batch_sizes"], report["settings"]
    sizes = [int(size) for size in groups]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="#888888", lw=1, label="plain")
    names = [name for name in entries(next(iter(groups.values()))) if name != "plain"]
    for i, name in enumerate(names):
        found = [entries(group)[name] for group in groups.values()]
        ratios = [entry["ratio_to_plain"] for entry in found]
        spreads = [entry["ratio_to_plain_interval"] or [entry["ratio_to_plain"]] * 2 for entry in found]
        low = [max(ratio - spread[0], 0) for ratio, spread in zip(ratios, spreads, strict=True)]
        high = [max(spread[1] - ratio, 0) for ratio, spread in zip(ratios, spreads, strict=True)]
        colour, style = ("#555555", "--") if name == "transformers" else (COLOURS[i % len(COLOURS)], "-")
        places = [size * SPREAD ** (i - (len(names) - 1) / 2) for size in sizes]
        axes.errorbar(places, ratios, yerr=[low, high], label=name, color=colour, ls=style, marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("rows at once")
    axes.set_ylabel("speed over plain decoding at the same batch size (95% interval)")
    axes.legend(fontsize=8, ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    figure.suptitle(
        f"{settings['target']} with {settings['drafter']} on {machine['gpu'] or machine['cpu']}, "
        f"{len(settings['prompts'])} prompts",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
