"""An evaluation as one HTML file: pictures, tables, terms and where it all comes from. No script, nothing from outside.

Needs matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from bpkit.judge.evaluation import plots
from bpkit.judge.evaluation.table import (
    LOST,
    about,
    bounds,
    decision,
    figure,
    options,
    regret_rows,
    sentences,
    share,
)
from bpkit.judge.html import PAGE, figure_element, paragraphs, table


def html_report(report: Mapping[str, Any]) -> str:
    """The whole page."""
    settings = report["settings"]
    title = f"{settings['target']} with {settings['drafter']}"
    models = report["cost_models"]
    first = next(iter(models.values()))
    body = [
        f"<h1>Block-size policies on {escape(title)}</h1>",
        _summary(report),
        "<h2>Acceptance length by block size</h2>",
        figure_element(
            plots.data_uri(plots.acceptance_lengths(first)),
            "Test prompts; the same under every cost model. Bands: 95%, bootstrap over prompts. A larger block yields "
            "more tokens a step, and each step costs more: which size is fastest depends on the costs below.",
        ),
        *(_model(name, result) for name, result in models.items()),
        _terms(report),
        _origin(report),
    ]
    return PAGE.format(title=escape(title), body="\n".join(body))


def _summary(report: Mapping[str, Any]) -> str:
    """What came out, in a few sentences, and what to be careful with."""
    settings = report["settings"]
    counts = settings["prompts"]
    parts = {part: sum(domain[part] for domain in counts.values()) for part in ("train", "validation", "test")}
    of_domains = ", ".join(f"{domain}: {count['test']}" for domain, count in counts.items())
    sizes = ", ".join(map(str, settings["block_sizes"]))
    said = [
        f"{parts['test']} test prompts ({of_domains}); "
        f"{parts['validation']} others to tune on and {parts['train']} to train on. Block sizes "
        f"{sizes}; the drafter was trained with {settings['trained_block_size']}.",
        *(_headline(name, result) for name, result in report["cost_models"].items()),
        about(dict(report)),
    ]
    careful = [f"Left out: {name}: {why}" for name, why in report["left_out"].items()] + list(report["notes"])
    warning = f'<div class="note">{paragraphs(careful)}</div>' if careful else ""
    return paragraphs(said) + warning


def _headline(name: str, result: Mapping[str, Any]) -> str:
    """One sentence on one cost model: who is certainly faster than the best fixed size, and who slower."""
    group = result["overall"]
    ratio = {policy: entry["tokens_per_second_ratio"] for policy, entry in group["policies"].items()}
    faster = [f"{p} {figure(r)}" for p, r in ratio.items() if r["interval"][0] > 1]
    slower = [f"{p} {figure(r)}" for p, r in ratio.items() if r["interval"][1] < 1]
    most = group["oracle"]["step_truncate"]["tokens_per_second_ratio"]
    return (
        f"Under {name} costs the best fixed size is {group['best_fixed']['block_size']}. Faster, with an interval "
        f"above 1: {', '.join(faster) or 'no policy'}. Slower: {', '.join(slower) or 'none'}. The bound of choosing "
        f"size and verify length at every step is {figure(most)}."
    )


def _model(name: str, result: Mapping[str, Any]) -> str:
    """The section of one cost model."""
    group, domains = result["overall"], result["domains"]
    curves = result["curves"]
    charged = "charged" if result["decision_time_charged"] else "measured, but not charged"
    at = f" at a context of {curves['context_length']} tokens" if curves["context_length"] else ""
    learnable = result["learnable"]
    tested = "" if learnable is None else f"<h3>Is a size per prompt learnable?</h3>{paragraphs([learnable['note']])}"
    parts = [
        f"<h2>Under {escape(name)} costs</h2>",
        paragraphs([p for p in (result["description"], result["source"]) if p]),
        '<div class="pair">',
        figure_element(
            plots.data_uri(plots.ratios(group)),
            f"Tokens/s on {group['prompts']} test prompts, with intervals; decision time is {charged}.",
        ),
        figure_element(
            plots.data_uri(plots.cost_curves(result)),
            f"What a step costs{at}. The size where a token costs least depends on how many are accepted.",
        ),
        "</div>",
        _overall(group, result["unit"]),
        _regrets(group),
        _domains(domains) if len(domains) > 1 else "",
        "<h3>Where the step oracle chooses otherwise</h3>",
        figure_element(
            plots.data_uri(plots.choices(result)),
            f"{sentences(dict(result))[0]} Ties go to no draft, the smaller block, the shorter verification.",
        ),
        tested,
        _sizes(group),
    ]
    return "\n".join(parts)


def _overall(group: Mapping[str, Any], unit: str) -> str:
    best = group["best_fixed"]
    rate = "tokens/s" if unit == "seconds" else "tokens per plain step"
    head = [
        "",
        rate,
        "over best fixed",
        "acceptance length",
        "share of the gap",
        "decision, us (time %)",
        "options chosen",
    ]
    rows: list[Sequence[str]] = [
        [f"best fixed: {best['block_size']}", _rate(best), "1", _length(best), "0", "", "chosen on validation prompts"]
    ]
    for name, entry in group["policies"].items():
        rows.append(
            [
                name + (" *" if entry["memory"] else ""),
                _rate(entry),
                figure(entry["tokens_per_second_ratio"]),
                figure(entry["acceptance_length"], digits=2),
                share(entry["gap_share"]),
                decision(entry),
                options(entry),
            ]
        )
    hindsight = [
        [f"{title} (bound)", _rate(entry), figure(entry["tokens_per_second_ratio"]), _length(entry), "", "", ""]
        for title, entry in bounds(group).items()
    ]
    return table(head, rows, dim=hindsight, last_is_text=True)


def _regrets(group: Mapping[str, Any]) -> str:
    """Where the time goes that the step oracle does not take."""
    picture = figure_element(
        plots.data_uri(plots.regrets(group)),
        "Of each one's own time, what oracle.step_truncate does not take, by the choice that took it. A draft that was "
        "too large only because too much of it was verified counts as verified too much.",
    )
    head = ["% of one's own time", *LOST.values(), "deciding", "together"]
    return f"<h3>Where the gap is</h3>{picture}{table(head, ([who, *cells] for who, cells in regret_rows(group)))}"


def _domains(domains: Mapping[str, Any]) -> str:
    """Tokens/s over the best fixed size, policies by domains."""
    head = ["over best fixed", *(f"{name} ({group['prompts']})" for name, group in domains.items())]
    first = next(iter(domains.values()))
    own = [group.get("best_fixed_of_domain") for group in domains.values()]
    rows = [
        [
            "best fixed of the domain",
            *("" if o is None else f"{o['block_size']}: {figure(o['tokens_per_second_ratio'])}" for o in own),
        ]
    ]

    def line(title: str, entries: Iterable[Mapping[str, Any]]) -> list[str]:
        return [title, *(figure(entry["tokens_per_second_ratio"]) for entry in entries)]

    for name, entry in first["policies"].items():
        rows.append(
            line(name + (" *" if entry["memory"] else ""), (group["policies"][name] for group in domains.values()))
        )
    hindsight = [line(f"{title} (bound)", (bounds(g)[title] for g in domains.values())) for title in bounds(first)]
    return f"<h3>By domain</h3>{table(head, rows, dim=hindsight)}"


def _sizes(group: Mapping[str, Any]) -> str:
    """Every fixed size on the test prompts."""
    rows = [
        [size, _rate(entry), figure(entry["tokens_per_second_ratio"]), _length(entry)]
        for size, entry in group["fixed"].items()
    ]
    head = ["block size", "tokens/s", "over best fixed", "acceptance length"]
    return f"<details><summary>Every fixed size on the test prompts</summary>{table(head, rows)}</details>"


def _terms(report: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(t)}</dt><dd>{escape(text)}</dd>" for t, text in report["definitions"].items())
    return f"<h2>Terms</h2><dl>{items}</dl>"


def _origin(report: Mapping[str, Any]) -> str:
    """Provenance, settings and split, to be unfolded."""
    settings = report["settings"]
    said = [
        f"Seed {settings['seed']}; prompt orders: {settings['orders']}; resamples: {settings['resamples']}; "
        f"permutations: {settings['permutations']}; options tuned: {'yes' if settings['tune'] else 'no'}."
    ]
    command = report.get("provenance", {}).get("command")
    if command:
        said.append(f"Made by: {command}")
    folded = {"provenance": report.get("provenance"), "settings": settings, "split": report["split"]}
    details = "".join(
        f"<details><summary>{name}</summary><pre>{escape(json.dumps(value, indent=1))}</pre></details>"
        for name, value in folded.items()
        if value
    )
    return f"<h2>Where this comes from</h2>{paragraphs(said)}{details}"


def _rate(entry: Mapping[str, Any]) -> str:
    return f"{entry['tokens_per_second']:.4g}"


def _length(entry: Mapping[str, Any]) -> str:
    low, high = entry["acceptance_length_interval"]
    return f"{entry['acceptance_length']:.2f} ({low:.2f}..{high:.2f})"
