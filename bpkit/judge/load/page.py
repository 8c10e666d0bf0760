"""An evaluation under load as one HTML file. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bpkit.judge.evaluation.fixed import called
from bpkit.judge.html import definitions, html_page, origin, paragraphs, picture
from bpkit.judge.load import plots, tables
from bpkit.judge.load.setup import BOUNDS, POLICIES


def load_page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    settings, loads = report["settings"], report["loads"]
    drafters = [source["drafter"] for source in settings.get("sources", [settings])]
    title = escape(f"{settings['target']} with {' and '.join(drafters)} under load")
    warning = f'<div class="note">{paragraphs(report["notes"])}</div>' if report["notes"] else ""
    body = [
        f"<h1>{title}</h1>",
        paragraphs([_prompts(settings), *(_headline(load) for load in loads.values()), tables.about(report)]),
        warning,
        *(_pictures(report) if loads else []),
        *(_tables(report) if loads else []),
        definitions(report["definitions"]),
        origin([f"Seed {settings['seed']}, {settings['seeds']} of them."], report, ("provenance", "settings")),
    ]
    return html_page(title, body)


def _prompts(settings: Mapping[str, Any]) -> str:
    counts = settings["prompts"]
    of_domains = ", ".join(f"{domain}: {count}" for domain, count in counts.items())
    said = f"{sum(counts.values())} prompts ({of_domains}). Costs: {settings['cost']['name']}"
    return said + ", ".join(["", *filter(None, (settings["cost"]["description"], settings["cost"]["source"]))]) + "."


def _headline(load: Mapping[str, Any]) -> str:
    """One sentence: who is certainly faster than the best fixed size, and who slower."""
    faster, slower = [], []
    for name, entry in load[POLICIES].items():
        low, high = entry["interval"] or (entry[tables.RATIO], entry[tables.RATIO])
        said = f"{name} {entry[tables.RATIO]:.3f}"
        if low > 1:
            faster.append(said)
        elif high < 1:
            slower.append(said)
    best = load["best_fixed"]
    bounds = "".join(f" The bound {name} is {entry[tables.RATIO]:.3f}." for name, entry in load[BOUNDS].items())
    return (
        f"{tables.title(load)}: the best fixed size is {called(best)}, {best[load['compared']]:.1f} tokens/s. "
        f"Faster: {', '.join(faster) or 'no policy'}. Slower: {', '.join(slower) or 'none'}.{bounds}"
    )


def _pictures(report: Mapping[str, Any]) -> list[str]:
    loads, seconds = report["loads"], report["settings"]["unit"] == "seconds"
    parts = [
        "<h2>Speed and latency by load</h2>",
        '<div class="pair">',
        picture(
            plots.ratios(loads),
            "Tokens/s over the best fixed size of each load, with 95% intervals over seeds. A load that changes and "
            "arrivals stand at the right.",
        ),
    ]
    if plots.closed(loads):
        factor, unit = (1e3, "ms") if seconds else (1.0, "plain steps")
        parts.append(
            picture(
                plots.latencies(loads, factor, unit),
                "Time per output token against tokens/s of the engine, from the smallest number of rows to the "
                "largest. Lower and further right is better.",
            )
        )
    parts.append(
        picture(
            plots.acceptance(loads),
            "Of the drafted tokens that were verified after none was rejected, the share that stands, by position. A "
            "policy that drafts where drafts are good has a higher one.",
        )
    )
    parts += [
        picture(plots.rows_over_time(load), "Rows that run and tokens so far while the load changes; the first seed.")
        for load in loads.values()
        if "rows_over_time" in load
    ]
    return [*parts, "</div>"]


def _tables(report: Mapping[str, Any]) -> list[str]:
    shown = [f"<h3>{escape(table.title)}</h3>{table.html()}" for table in tables.tables(report)]
    sizes = tables.size_table(report["loads"]).html()
    return ["<h2>Tables</h2>", *shown, f"<details><summary>Every fixed size</summary>{sizes}</details>"]
