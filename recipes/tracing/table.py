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
    """Prompts per minute, and how many times as fast the trace is that a way is compared with."""
    count, size = len(report["settings"]["block_sizes"]), report["settings"]["batch_size"]
    titles = {
        "trace": "trace",
        "together": f"trace, {size} together",
        "generations": f"{count} generations",
        "generations_together": f"{count} generations, {size} together",
        "positions": "from every position (scaled)",
        "earlier": "trace by the other checkout",
    }
    rows = []
    for name, title in titles.items():
        if name not in report:
            continue
        entry, ratios = report[name], ["", "", ""]
        if "against" in entry:
            ratios = [f"{entry[k]:.1f}x {bracketed(entry[f'{k}_interval'], '.1f')}" for k in ("ratio", "median_ratio")]
            ratios.append(titles[entry["against"]])
        rows.append(TableRow((title, f"{entry['prompts_per_minute']:.2f}", *ratios)))
    head = ("way", "prompts/min", "its time over the trace's\n(ratio of sums)", "(median batch)", "which trace")
    return Table(f"tracing {report['prompts']} prompts", head, [rows])


def parts_table(report: dict[str, Any]) -> Table:
    """Where the time of a traced prompt goes, one at a time and together."""
    rows = []
    for part in report["trace"]["parts"]:
        cells = []
        for name in ("trace", "together"):
            each, share = report[name]["seconds"] / report["prompts"], report[name]["parts"][part]
            cells += [f"{share * each:.3f}", f"{100 * share:.0f}"]
        rows.append(TableRow((part, *cells)))
    together = f"{report['settings']['batch_size']} together:\nseconds"
    return Table("a traced prompt", ("part", "seconds", "%", together, "%"), [rows])


def sentences(report: dict[str, Any]) -> list[str]:
    """What the figures are."""
    settings, machine, count = report["settings"], report["machine"], len(report["settings"]["block_sizes"])
    load = machine["load_average"]
    busy = f", load average {load:.1f} at the start" if load is not None else ""
    temperature = settings["sampling"]["temperature"]
    parts = report["together"]["parts"]
    largest = max(parts, key=lambda part: parts[part])
    share, sampled = f"{100 * report['sampled_share']:.1f}%", settings["sampled_positions"]
    every = (
        " From every position: the live decoder for one step at each position with each block size, which is what a "
        f"trace holds; SCALED from {share} of the positions ({sampled} of each prompt, drawn at random, every block "
        "size; medians), each a fresh run that reads prompt and output so far."
    )
    gained = f"{report['batch_ratio']:.1f}x {bracketed(report['batch_ratio_interval'], '.1f')}"
    return [
        f"{count} generations: the live decoder once for each block size ({format_sizes(settings['block_sizes'])}); it "
        f"yields only the steps of those runs.{every if 'positions' in report else ''}",
        "Wall clock, in turn, batch by batch, writing included; in brackets: 95% paired bootstrap over batches. "
        f"Together, prompts are traced {gained} as fast as one at a time.",
        f"What bounds it together: {largest}, {100 * parts[largest]:.0f}% of the time. The output has to be generated "
        f"once: were all the rest free, tracing one at a time would be {report['generation_bound']:.1f}x as fast as "
        f"{count} generations.",
        f"At most {settings['max_new_tokens']} new tokens ({report['output_tokens']:,} in all), temperature "
        f"{temperature:g}, {settings['dtype']}; machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, threads: {settings['threads']}{busy}.",
    ]
