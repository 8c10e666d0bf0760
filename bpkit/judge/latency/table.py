"""The report of a latency bench on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bpkit.judge.latency.backends import ONNXRUNTIME, TORCH
from bpkit.judge.tables import Fitted


def print_latency_report(report: dict[str, Any], console: Console) -> None:
    """Print latencies, the comparison of the backends, and the sentences that say what was measured."""
    console.print(Fitted(latency_table(report)))
    if any(ONNXRUNTIME in method for _, _, method in methods(report)):
        console.print(Fitted(comparison_table(report)))
    for sentence in sentences(report):
        console.print(escape(sentence), soft_wrap=True)


def methods(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Policy, method and its entry."""
    for name, policy in report["policies"].items():
        for method, entry in policy["methods"].items():
            yield name, method, entry


def latency_table(report: dict[str, Any]) -> Table:
    """A row for each backend of each method."""
    sizes = [str(size) for size in report["settings"]["batch_sizes"]]
    table = Table(title="decision latency, p50 / p99 in microseconds", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("policy", style="bold")
    table.add_column("method")
    table.add_column("backend")
    for title in (*(f"batch {size}" for size in sizes), "in the loop", "% of a\nprefill", "% of a\nstep"):
        table.add_column(title, justify="right")
    for name, method, entry in methods(report):
        for backend in (TORCH, ONNXRUNTIME):
            if backend not in entry:
                continue
            of = entry[backend]
            loop = of["in_loop"]
            table.add_row(
                escape(name),
                method,
                backend,
                *(_pair(of["p50_us"][size], of["p99_us"][size]) for size in sizes),
                _pair(loop["p50_us"], loop["p99_us"]) if loop else "-",
                *(_percent(of[f"share_of_{what}"]) for what in ("prefill", "step")),
            )
    return table


def comparison_table(report: dict[str, Any]) -> Table:
    """Ratios, and decisions that are the same."""
    sizes = [str(size) for size in report["settings"]["batch_sizes"]]
    table = Table(title="torch over onnxruntime (95%)", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("policy", style="bold")
    table.add_column("method")
    for title in (*(f"batch {size}" for size in sizes), "same decisions", "near ties"):
        table.add_column(title, justify="right")
    for name, method, entry in methods(report):
        if ONNXRUNTIME not in entry:
            continue
        found, ratios = entry["agreement"], entry["torch_over_onnxruntime"]
        table.add_row(
            escape(name),
            method,
            *(_ratio(ratios[size]) for size in sizes),
            f"{found['agree']:,}/{found['rows']:,}",
            str(found["near_ties"]),
        )
    return table


def sentences(report: dict[str, Any]) -> list[str]:
    """What the figures are."""
    settings, machine, pair = report["settings"], report["machine"], report["pair"]
    load = machine["load_average"]
    busy = f", load average {load:.1f} at the start" if load is not None else ""
    runtime = ", ".join(f"{name} {version}" for name, version in machine["onnxruntime"].items()) or "none"
    said = [
        f"A prefill takes {pair['prefill_ms']['p50']:.2f} ms and a step of fixed:{pair['block_size']} "
        f"{pair['step_ms']['p50']:.2f} ms (medians of {pair['prefill_ms']['count']} and {pair['step_ms']['count']}, "
        f"{settings['threads']['models']} thread(s)); shares are of the p50 at batch {min(settings['batch_sizes'])}.",
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


def _pair(p50: float, p99: float) -> str:
    return f"{p50:.1f} / {p99:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _ratio(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['value']:.2f}x ({low:.2f}..{high:.2f})"
