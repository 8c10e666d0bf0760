"""The report of a latency bench, on the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from bpkit.judge.latency.backends import ONNXRUNTIME, TORCH
from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences

COLOURS = {TORCH: "#ee6677", ONNXRUNTIME: "#4477aa"}


def print_latency_report(report: dict[str, Any], console: Console) -> None:
    """Print latencies, the comparison of the backends, and the sentences that say what was measured."""
    console.print(latency_table(report))
    comparison = comparison_table(report)
    if comparison.sections[0]:
        console.print(comparison)
    print_sentences(sentences(report), console)


def methods(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Policy, method and its entry."""
    for name, policy in report["policies"].items():
        for method, entry in policy["methods"].items():
            yield name, method, entry


def latency_table(report: dict[str, Any]) -> Table:
    """A row for each backend of each method."""
    sizes = [str(size) for size in report["settings"]["batch_sizes"]]
    batches = [f"batch {size}" for size in sizes]
    over = f"{sizes[-1]}/{sizes[0]}"
    head = ["policy", "method", "backend", *batches, over, "in the loop", "% of a\nprefill", "% of a\nstep"]
    rows = []
    for name, method, entry in methods(report):
        for backend in (TORCH, ONNXRUNTIME):
            if backend not in entry:
                continue
            of = entry[backend]
            loop = of["in_loop"]
            pairs = [f"{of['p50_us'][size]:.1f} / {of['p99_us'][size]:.1f}" for size in sizes]
            in_loop = f"{loop['p50_us']:.1f} / {loop['p99_us']:.1f}" if loop else "-"
            shares = [f"{100 * of[f'share_of_{what}']:.2f}" for what in ("prefill", "step")]
            times = f"{of['largest_over_smallest']['value']:.1f}x"
            rows.append(TableRow([name, method, backend, *pairs, times, in_loop, *shares]))
    return Table("decision latency, p50 / p99 in microseconds", head, [rows])


def comparison_table(report: dict[str, Any]) -> Table:
    """Ratios, and decisions that are the same."""
    sizes = [str(size) for size in report["settings"]["batch_sizes"]]
    head = ["policy", "method", *(f"batch {size}" for size in sizes), "same decisions", "near ties"]
    rows = []
    for name, method, entry in methods(report):
        if ONNXRUNTIME not in entry:
            continue
        found, ratios = entry.get("agreement"), [entry["torch_over_onnxruntime"][size] for size in sizes]
        said = [f"{ratio['value']:.2f}x {bracketed(ratio['interval'], '.2f')}" for ratio in ratios]
        same = [f"{found['agree']:,}/{found['rows']:,}", str(found["near_ties"])] if found else ["", ""]
        rows.append(TableRow([name, method, *said, *same]))
    return Table("torch over onnxruntime (95%)", head, [rows])


def sentences(report: dict[str, Any]) -> list[str]:
    """What the figures are."""
    settings, machine, pair = report["settings"], report["machine"], report["pair"]
    load = machine["load_average"]
    busy = f", load average {load:.1f} at the start" if load is not None else ""
    runtime = ", ".join(f"{name} {version}" for name, version in machine["onnxruntime"].items()) or "none"
    least, most = min(settings["batch_sizes"]), max(settings["batch_sizes"])
    said = [
        "`step` is all that a step asks: select, extend after each token where the drafter asks, truncate, observe. "
        f"{most}/{least}: what a call for {most} rows takes over one for {least}, the median over neighbouring blocks.",
        f"A prefill takes {pair['prefill_ms']['p50']:.2f} ms and a step of fixed:{pair['block_size']} "
        f"{pair['step_ms']['p50']:.2f} ms (medians of {pair['prefill_ms']['count']} and {pair['step_ms']['count']}, "
        f"{settings['threads']['models']} thread(s)); shares are of the p50 at batch {least}.",
        f"At least {settings['calls']:,} calls each after {settings['warm_up']} to warm up, the backends in turn in "
        f"one process, {settings['threads']['decisions']} thread; questions of {len(settings['prompts'])} prompts. "
        "Caches are warm: in the loop, where the models run in between, a decision takes longer.",
        f"Machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {runtime}, "
        f"provider {settings['provider']}{busy}.",
    ]
    for name, policy in report["policies"].items():
        if policy["why_not"]:
            said.append(f"{name}: torch only ({policy['why_not']}).")
        if not policy["asks"]:
            said.append(f"{name}: in torch it settled in `bind` that asking its network does not pay, and asks nobody.")
    return said


def plot_latency(report: dict[str, Any], path: Path) -> None:
    """Write the picture, a panel for each batch size; the suffix says the format."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    settings, machine = report["settings"], report["machine"]
    sizes, rows = settings["batch_sizes"], list(methods(report))
    figure = Figure(figsize=(3 + 3 * len(sizes), 2 + 0.6 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        _panel(axes, rows, str(size))
    panels[0].set_yticks(range(len(rows)), [f"{name}\n{method}" for name, method, _ in rows], fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.05), ncols=2)
    figure.suptitle(
        f"decision latency on {machine['gpu'] or machine['cpu']}, {settings['threads']['decisions']} thread; "
        "dot p50, line to p99",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _panel(axes: Any, rows: list[tuple[str, str, dict[str, Any]]], size: str) -> None:
    for backend, colour in COLOURS.items():
        shown = [(place, entry[backend]) for place, (_, _, entry) in enumerate(rows) if backend in entry]
        offset = -0.15 if backend == TORCH else 0.15
        places = [place + offset for place, _ in shown]
        low = [of["p50_us"][size] for _, of in shown]
        high = [of["p99_us"][size] for _, of in shown]
        axes.hlines(places, low, high, color=colour, lw=1)
        axes.plot(low, places, "o", color=colour, ms=5, label=backend)
    axes.set_xscale("log")
    axes.set_xlabel("microseconds")
    axes.set_title(f"batch {size}", fontsize=10)
    axes.grid(axis="x", lw=0.3)
    axes.spines[["top", "right"]].set_visible(False)
