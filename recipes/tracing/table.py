"""The report of a trace bench on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences
from bpkit.sizes import format_sizes


def print_trace_report(report: dict[str, Any], console: Console) -> None:
    """Print speed, parts, and the sentences that say what was measured."""
    console.print(speed_table(report))
    console.print(parts_table(report))
    print_sentences(sentences(report), console)


def speed_table(report: dict[str, Any]) -> Table:
    """Prompts per minute, and how much faster the trace is than each brute force."""
    count = len(report["settings"]["block_sizes"])
    rows = [TableRow(("trace", f"{report['trace']['prompts_per_minute']:.2f}", "", ""))]
    for name, title in (("generations", f"{count} generations"), ("positions", "from every position (scaled)")):
        entry = report[name]
        ratios = [f"{entry[k]:.1f}x {bracketed(entry[f'{k}_interval'], '.1f')}" for k in ("ratio", "median_ratio")]
        rows.append(TableRow((title, f"{entry['prompts_per_minute']:.2f}", *ratios)))
    head = ("way", "prompts/min", "trace is faster\n(ratio of sums)", "trace is faster\n(median prompt)")
    return Table(f"tracing {report['prompts']} prompts", head, [rows])


def parts_table(report: dict[str, Any]) -> Table:
    """Where the time of a traced prompt goes."""
    each, parts = report["trace"]["seconds"] / report["prompts"], report["trace"]["parts"]
    rows = [TableRow((part, f"{share * each:.3f}", f"{100 * share:.0f}")) for part, share in parts.items()]
    return Table("a traced prompt", ("part", "seconds", "%"), [rows])


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
