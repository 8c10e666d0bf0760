"""An evaluation as tables and sentences, on the terminal or in the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from bpkit.judge.evaluation.figures import DECIDING, FEATURES, REASON
from bpkit.judge.evaluation.fixed import called
from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences
from bpkit.trace.oracle.regret import KINDS, OTHER_SOURCE

BOUNDS = (
    "oracle.prompt",
    "bound.confidences",
    "oracle.distributions",
    "oracle.step",
    "oracle.step_truncate",
    "oracle.tree",
)
"""In the order in which they are shown."""
LOST = {kind: kind.replace("_", " ") for kind in (*KINDS, OTHER_SOURCE)}
RATIO = "tokens_per_second_ratio"


def print_evaluation(report: dict[str, Any], console: Console) -> None:
    """Print tables and notes."""
    for name, result in report["cost_models"].items():
        shown = [overall_table(name, result), regret_table(name, result["overall"])]
        if "best_fixed_of_source" in result["overall"]:
            shown.append(source_table(name, result["overall"]))
        if len(result["domains"]) > 1:
            shown.append(domain_table(name, result["domains"]))
        for table in shown:
            console.print(table)
        print_sentences(sentences(result), console)
        console.print()
    left_out = [f"Left out: {policy}: {reason}" for policy, reason in report["left_out"].items()]
    print_sentences([*left_out, *(f"Note: {note}" for note in report["notes"]), about(report)], console)


def overall_table(name: str, result: Mapping[str, Any]) -> Table:
    """All test prompts under one cost model."""
    group = result["overall"]
    unit = "tokens/s" if result["unit"] == "seconds" else "tokens per\nplain step"
    head = ("who", unit, "over best fixed", "acceptance\nlength", "share of the gap", "decision\nus (time %)")
    best, policies = group["best_fixed"], group["policies"]
    fixed = [TableRow((best_fixed(group), _rate(best), "1", _length(best), "0", "-", "chosen on validation prompts"))]
    fixed += [
        TableRow((title, _rate(entry), figure(entry[RATIO]), _length(entry), "", "-", ""))
        for title, entry in alone(group).items()
    ]
    fastest = max((p["tokens_per_second"] for p in policies.values()), default=None)
    rows = [
        TableRow(
            (
                _marked(policy, entry),
                _rate(entry),
                figure(entry[RATIO]),
                figure(entry["acceptance_length"], digits=2),
                _share(entry["gap_share"]),
                _decision(entry),
                _options(entry),
            ),
            "green" if entry["tokens_per_second"] == fastest else None,
        )
        for policy, entry in policies.items()
    ]
    limits = [
        TableRow((f"{title} (bound)", _rate(entry), figure(entry[RATIO]), _length(entry), "", "-", ""), "dim")
        for title, entry in bounds(group).items()
    ]
    title = f"{name} costs ({group['prompts']} test prompts)"
    return Table(title, (*head, "options chosen"), [fixed, rows, limits], last_is_text=True)


def domain_table(name: str, domains: Mapping[str, Any]) -> Table:
    """Tokens/s over the best fixed size by domain."""
    groups = list(domains.values())
    own = [group.get("best_fixed_of_domain") for group in groups]
    said = ("-" if o is None else f"{called(o)}: {figure(o[RATIO])}" for o in own)
    rows = [TableRow(("best fixed of the domain", *said))]
    for title in alone(groups[0]):
        rows.append(TableRow((title, *(figure(alone(group)[title][RATIO]) for group in groups))))
    for policy, entry in groups[0]["policies"].items():
        rows.append(TableRow((_marked(policy, entry), *(figure(group["policies"][policy][RATIO]) for group in groups))))
    limits = [
        TableRow((f"{title} (bound)", *(figure(bounds(group)[title][RATIO]) for group in groups)), "dim")
        for title in bounds(groups[0])
    ]
    head = ("who", *(f"{domain}\n({group['prompts']} prompts)" for domain, group in domains.items()))
    return Table(f"{name} costs, over best fixed by domain", head, [rows, limits])


def regret_table(name: str, group: Mapping[str, Any]) -> Table:
    """Where the time goes that the best oracle does not take, in percent of each one's own."""
    titles = lost_titles(group)
    head = ("who", *(title.replace(" too", "\ntoo") for title in (*titles, "together")))
    rows = [TableRow((who, *_percents(entry["regret"], len(titles)))) for who, entry in compared(group).items()]
    return Table(f"{name} costs, time that the step oracle does not take, % of one's own", head, [rows])


def source_table(name: str, group: Mapping[str, Any]) -> Table:
    """How much of the text each source drafted under each policy."""
    drafted = {policy: entry["sources"] for policy, entry in group["policies"].items()}
    titles = next((list(one["steps"]) for one in drafted.values()), [])
    rows = [
        TableRow((policy, *(f"{100 * one['steps'][t]:.0f} / {100 * one['tokens'][t]:.0f}" for t in titles)))
        for policy, one in drafted.items()
    ]
    return Table(f"{name} costs, by source, % of steps / % of tokens", ("who", *titles), [rows])


def size_table(group: Mapping[str, Any]) -> Table:
    """Every fixed size on the test prompts."""
    rows = [
        TableRow((size, _rate(entry), figure(entry[RATIO]), _length(entry))) for size, entry in group["fixed"].items()
    ]
    return Table("", ("block size", "tokens/s", "over best fixed", "acceptance length"), [rows])


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What is to be said under the tables of one cost model."""
    said = [] if result["oracle_choices"] is None else [of_choices(result["oracle_choices"])]
    reason = next((p["gap_share"].get("reason") for p in result["overall"]["policies"].values()), None)
    if reason:
        said.append(f"No shares: {reason}.")
    said += [
        f"Where {policy} loses time is not known: {entry['regret'][REASON]}."
        for policy, entry in result["overall"]["policies"].items()
        if REASON in entry["regret"]
    ]
    if result["learnable"] is not None:
        said.append(result["learnable"]["note"])
    return said


def of_choices(choices: Mapping[str, Any]) -> str:
    """How often the step oracle chooses otherwise than the best fixed size."""
    size, length = (100 * choices["differs"][name] for name in ("block_size", "verify_length"))
    if "source" not in choices["differs"]:
        return (
            f"The step oracle differs from block size {choices['best_fixed']} in {size:.0f}% of its steps, and in the "
            f"verify length in {length:.0f}%."
        )
    source = 100 * choices["differs"]["source"]
    return (
        f"The step oracle differs from {choices['best_fixed']} in the source in {source:.0f}% of its steps, in the "
        f"block size in {size:.0f}%, and in the verify length in {length:.0f}%."
    )


def about(report: Mapping[str, Any]) -> str:
    """How to read all tables."""
    groups = [result["overall"] for result in report["cost_models"].values()]
    memory = any(p["memory"] for group in groups for p in group["policies"].values())
    orders = f" * has a memory: lowest and highest of {report['settings']['orders']} prompt orders." if memory else ""
    confidences = (
        " bound.confidences chooses both by the drafter's calibrated confidences, those of drafts of all sizes known "
        "before drafting: an estimate of what they could win."
    )
    return (
        "Test prompts only. In brackets: 95% paired bootstrap over prompts." + orders + " The share is of the gap from "
        f"the best fixed size to {best_oracle(groups[0])}. Oracles choose with hindsight: a block size for each "
        "prompt, for each step, or block size and verify length for each step. They are bounds on such choices, and no "
        "policies." + (confidences if any(group["bounds"] for group in groups) else "")
    )


def best_fixed(group: Mapping[str, Any]) -> str:
    """What the best fixed size is called."""
    return f"best fixed: {called(group['best_fixed'])}"


def alone(group: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each source at its best fixed size, by what they are called; empty if there is one source only."""
    own = group.get("best_fixed_of_source", {})
    return {f"{source} alone: {entry['block_size']}": entry for source, entry in own.items()}


def compared(group: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The best fixed size and the policies, by what they are called."""
    return {best_fixed(group): group["best_fixed"], **group["policies"]}


def bounds(group: Mapping[str, Any]) -> dict[str, Any]:
    """Oracles and other bounds of a group by what they are called, in the order in which they are shown."""
    known = {f"oracle.{name}": entry for name, entry in group["oracle"].items()}
    known |= {f"bound.{name}": entry for name, entry in group["bounds"].items()}
    return {title: known[title] for title in BOUNDS if title in known}


def best_oracle(group: Mapping[str, Any]) -> str:
    """What the oracle is called that gaps are measured up to."""
    return "oracle.tree" if "tree" in group["oracle"] else "oracle.step_truncate"


def figure(entry: Mapping[str, Any], *, digits: int = 3) -> str:
    """A value with its interval."""
    return f"{entry['value']:.{digits}f} {bracketed(entry['interval'], f'.{digits}f')}"


def lost(shares: Mapping[str, Any]) -> dict[str, float]:
    """Percents of one's own time that the oracle does not take, by what they are called; those of deciding last."""
    percents = {title: 100 * float(shares[kind]) for kind, title in LOST.items() if kind in shares}
    return {**percents, "deciding": 100 * (float(shares[DECIDING]) + float(shares[FEATURES]))}


def lost_titles(group: Mapping[str, Any]) -> list[str]:
    """What `lost` says of the group, in its order."""
    own = list(LOST.values())[: len(LOST) if "best_fixed_of_source" in group else len(KINDS)]
    return [*own, "deciding"]


def _percents(shares: Mapping[str, Any], count: int) -> list[str]:
    if REASON in shares:
        return ["-"] * (count + 1)
    parts = list(lost(shares).values())
    return [f"{value:.1f}" for value in (*parts, sum(parts))]


def _marked(policy: str, entry: Mapping[str, Any]) -> str:
    return f"{policy} *" if entry["memory"] else policy


def _share(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "-"
    return f"{100 * entry['value']:.1f}% {bracketed([100 * end for end in entry['interval']], '.1f')}"


def _decision(entry: Mapping[str, Any]) -> str:
    """Decision time of a step in microseconds, and its share of all time if it is charged."""
    spent = f"{1e6 * entry['decision_seconds_per_step']:.0f}"
    return spent if entry["decision_share"] is None else f"{spent} ({100 * entry['decision_share']:.1f}%)"


def _options(entry: Mapping[str, Any]) -> str:
    """The options that were chosen, as they would be typed; nothing if all are as given."""
    return ", ".join(f"{name}={_typed(value)}" for name, value in entry["tuning"]["chosen"].items())


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rate(entry: Mapping[str, Any]) -> str:
    return f"{entry['tokens_per_second']:.4g}"


def _length(entry: Mapping[str, Any]) -> str:
    return f"{entry['acceptance_length']:.2f} {bracketed(entry['acceptance_length_interval'], '.2f')}"
