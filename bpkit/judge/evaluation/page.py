"""An evaluation as one HTML file: pictures, tables, terms and where it all comes from. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bpkit.judge.evaluation import plots, tables
from bpkit.judge.evaluation.fixed import called
from bpkit.judge.html import definitions, html_page, origin, paragraphs, picture


def html_report(report: Mapping[str, Any]) -> str:
    """The whole page."""
    settings = report["settings"]
    drafters = [source["drafter"] for source in settings.get("sources", [settings])]
    title = escape(f"{settings['target']} with {' and '.join(drafters)}")
    models = report["cost_models"]
    first = next(iter(models.values()))
    body = [
        f"<h1>Block-size policies on {title}</h1>",
        _summary(report),
        "<h2>Acceptance length by block size</h2>",
        picture(
            plots.acceptance_lengths(first),
            "Test prompts; the same under every cost model. Bands: 95%, bootstrap over prompts. A larger block yields "
            "more tokens a step, and each step costs more: which size is fastest depends on the costs below.",
        ),
        *(_model(name, result) for name, result in models.items()),
        definitions(report["definitions"]),
        _origin(report),
    ]
    return html_page(title, body)


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
        tables.about(report),
    ]
    careful = [f"Left out: {name}: {why}" for name, why in report["left_out"].items()] + list(report["notes"])
    warning = f'<div class="note">{paragraphs(careful)}</div>' if careful else ""
    return paragraphs(said) + warning


def _headline(name: str, result: Mapping[str, Any]) -> str:
    """One sentence on one cost model: who is certainly faster than the best fixed size, and who slower."""
    group = result["overall"]
    ratio = {policy: entry[tables.RATIO] for policy, entry in group["policies"].items()}
    faster = [f"{p} {tables.figure(r)}" for p, r in ratio.items() if r["interval"][0] > 1]
    slower = [f"{p} {tables.figure(r)}" for p, r in ratio.items() if r["interval"][1] < 1]
    bound = ""
    if "tree" in group["oracle"]:
        most = tables.figure(group["oracle"]["tree"][tables.RATIO])
        bound = f" The bound of choosing size and nodes at every step is {most}."
    elif "step_truncate" in group["oracle"]:
        most = tables.figure(group["oracle"]["step_truncate"][tables.RATIO])
        bound = f" The bound of choosing size and verify length at every step is {most}."
    return (
        f"Under {name} costs the best fixed size is {called(group['best_fixed'])}. Faster, with an interval "
        f"above 1: {', '.join(faster) or 'no policy'}. Slower: {', '.join(slower) or 'none'}.{bound}"
    )


def _model(name: str, result: Mapping[str, Any]) -> str:
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
        picture(
            plots.ratios(group),
            f"Tokens/s on {group['prompts']} test prompts, with intervals; decision time is {charged}.",
        ),
        picture(
            plots.cost_curves(result),
            f"What a step costs{at}. The size where a token costs least depends on how many are accepted.",
        ),
        "</div>",
        tables.overall_table(name, result).html(),
        *_oracle(name, result),
        f"<h3>By domain, over best fixed</h3>{tables.domain_table(name, domains).html()}" if len(domains) > 1 else "",
        *_choices(result),
        tested,
        f"<details><summary>Every fixed size on the test prompts</summary>{tables.size_table(group).html()}</details>",
    ]
    return "\n".join(parts)


def _oracle(name: str, result: Mapping[str, Any]) -> list[str]:
    """What the step oracle does not take; and of several sources, which of them drafted."""
    group, parts = result["overall"], []
    if result["oracle_choices"] is not None:
        parts += [
            "<h3>Where the gap is, % of one's own time</h3>",
            picture(
                plots.regrets(group),
                f"Of each one's own time, what {tables.best_oracle(group)} does not take, by the choice that took it. "
                "A draft that was too large only because too much of it was verified counts as verified too much.",
            ),
            tables.regret_table(name, group).html(),
        ]
    if "best_fixed_of_source" in group:
        parts += ["<h3>Which source drafted</h3>", tables.source_table(name, group).html()]
    return parts


def _choices(result: Mapping[str, Any]) -> list[str]:
    if result["oracle_choices"] is None:
        return []
    said = tables.of_choices(result["oracle_choices"])
    said += " Ties go to no draft, the smaller block, the shorter verification."
    return ["<h3>Where the step oracle chooses otherwise</h3>", picture(plots.choices(result), said)]


def _origin(report: Mapping[str, Any]) -> str:
    """Provenance, settings and split, to be unfolded."""
    settings = report["settings"]
    said = [
        f"Seed {settings['seed']}; prompt orders: {settings['orders']}; resamples: {settings['resamples']}; "
        f"permutations: {settings['permutations']}; options tuned: {'yes' if settings['tune'] else 'no'}."
    ]
    return origin(said, report, ("provenance", "settings", "split"))
