"""The report of a trace bench on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bpkit.judge.tables import Fitted
from bpkit.sizes import format_sizes


def print_trace_report(report: dict[str, Any], console: Console) -> None:
    """Print speed, parts, and the sentences that say what was measured."""
    console.print(Fitted(speed_table(report)))
    console.print(Fitted(parts_table(report)))
    for sentence in sentences(report):
        console.print(escape(sentence), soft_wrap=True)


def speed_table(report: dict[str, Any]) -> Table:
    """Prompts per minute, and how much faster the trace is than each brute force."""
    count = len(report["settings"]["block_sizes"])
    table = Table(title=f"tracing {report['prompts']} prompts", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("way", style="bold")
    table.add_column("prompts/min", justify="right")
    table.add_column("trace is faster\n(ratio of sums)", justify="right")
    table.add_column("trace is faster\n(median prompt)", justify="right")
    table.add_row("trace", f"{report['trace']['prompts_per_minute']:.2f}", "", "")
    for name, title in (("generations", f"{count} generations"), ("positions", "from every position (scaled)")):
        entry = report[name]
        ratios = [f"{entry[key]:.1f}x {_interval(entry[f'{key}_interval'])}" for key in ("ratio", "median_ratio")]
        table.add_row(title, f"{entry['prompts_per_minute']:.2f}", *ratios)
    return table


def parts_table(report: dict[str, Any]) -> Table:
    """Where the time of a traced prompt goes."""
    table = Table(title="a traced prompt", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part", style="bold")
    table.add_column("seconds", justify="right")
    table.add_column("%", justify="right")
    each = report["trace"]["seconds"] / report["prompts"]
    for part, share in report["trace"]["parts"].items():
        table.add_row(part, f"{share * each:.3f}", f"{100 * share:.0f}")
    return table


def sentences(report: dict[str, Any]) -> list[str]:
    """What the figures are."""
    settings, machine, count = report["settings"], report["machine"], len(report["settings"]["block_sizes"])
    load = machine["load_average"]
    busy = f", load average {load:.1f} at the start" if load is not None else ""
    temperature = settings["sampling"]["temperature"]
    parts = report["trace"]["parts"]
    largest = max(parts, key=lambda part: parts[part])
    return [
        f"{count} generations: the live decoder once for each block size ({format_sizes(settings['block_sizes'])}); it "
        "yields only the steps of those runs. From every position: the live decoder for one step at each position with "
        f"each block size, which is what a trace holds; SCALED from {100 * report['sampled_share']:.1f}% of the "
        f"positions ({settings['sampled_positions']} of each prompt, drawn at random, every block size; medians), each "
        "a fresh run that reads prompt and output so far.",
        "Wall clock, interleaved in one process, writing included; in brackets: 95% paired bootstrap over prompts.",
        f"What bounds it: {largest}, {100 * parts[largest]:.0f}% of the time. The output has to be generated once: "
        f"were all the rest free, tracing would be {report['generation_bound']:.1f}x as fast as {count} generations.",
        f"At most {settings['max_new_tokens']} new tokens ({report['output_tokens']:,} in all), temperature "
        f"{temperature:g}, {settings['dtype']}; machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, threads: {settings['threads']}{busy}.",
    ]


def _interval(pair: list[float]) -> str:
    return f"({pair[0]:.1f}..{pair[1]:.1f})"
