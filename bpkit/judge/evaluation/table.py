"""An evaluation on the terminal: a table of all prompts, one of the domains, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bpkit.judge.evaluation.regrets import DECIDING, FEATURES, REASON, Shares
from bpkit.judge.tables import Fitted
from bpkit.trace.oracle.regret import KINDS

BOUNDS = (
    ("oracle", "prompt"),
    ("bounds", "confidences"),
    ("oracle", "distributions"),
    ("oracle", "step"),
    ("oracle", "step_truncate"),
)
"""Where they stand in a group, in the order in which they are shown."""
LOST = {kind: kind.replace("_", " ") for kind in KINDS}


def print_evaluation(report: dict[str, Any], console: Console) -> None:
    """Print tables and notes."""
    for name, result in report["cost_models"].items():
        console.print(Fitted(overall_table(name, result)))
        console.print(Fitted(regret_table(name, result)))
        if len(result["domains"]) > 1:
            console.print(Fitted(domain_table(name, result["domains"])))
        for sentence in sentences(result):
            console.print(escape(sentence), soft_wrap=True)
        console.print()
    for policy, reason in report["left_out"].items():
        console.print(escape(f"Left out: {policy}: {reason}"), soft_wrap=True)
    for note in report["notes"]:
        console.print(escape(f"Note: {note}"), soft_wrap=True)
    console.print(escape(about(report)), soft_wrap=True)


def overall_table(name: str, result: dict[str, Any]) -> Table:
    """All test prompts under one cost model."""
    group = result["overall"]
    unit = "tokens/s" if result["unit"] == "seconds" else "tokens per\nplain step"
    table = Table(title=f"{name} costs ({group['prompts']} test prompts)", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("who", style="bold")
    table.add_column(unit, justify="right")
    table.add_column("over best fixed", justify="right")
    table.add_column("acceptance\nlength", justify="right")
    table.add_column("share of the gap", justify="right")
    table.add_column("decision\nus (time %)", justify="right")
    table.add_column("options chosen", overflow="fold")
    best = group["best_fixed"]
    chosen = "chosen on validation prompts"
    table.add_row(f"best fixed: {best['block_size']}", _rate(best), "1", _length(best), "0", "-", chosen)
    table.add_section()
    fastest = max((p["tokens_per_second"] for p in group["policies"].values()), default=None)
    for policy, entry in group["policies"].items():
        table.add_row(
            escape(policy) + (" *" if entry["memory"] else ""),
            _rate(entry),
            figure(entry["tokens_per_second_ratio"]),
            figure(entry["acceptance_length"], digits=2),
            share(entry["gap_share"]),
            decision(entry),
            escape(options(entry)),
            style="green" if entry["tokens_per_second"] == fastest else None,
        )
    table.add_section()
    for title, entry in bounds(group).items():
        ratio = figure(entry["tokens_per_second_ratio"])
        table.add_row(f"{title} (bound)", _rate(entry), ratio, _length(entry), "", "-", "", style="dim")
    return table


def domain_table(name: str, domains: dict[str, Any]) -> Table:
    """Tokens/s over the best fixed size by domain."""
    table = Table(title=f"{name} costs, over best fixed by domain", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("who", style="bold")
    for domain, group in domains.items():
        table.add_column(f"{escape(domain)}\n({group['prompts']} prompts)", justify="right")
    own = [group.get("best_fixed_of_domain") for group in domains.values()]
    table.add_row(
        "best fixed of the domain",
        *("-" if o is None else f"{o['block_size']}: {figure(o['tokens_per_second_ratio'])}" for o in own),
    )
    for policy in next(iter(domains.values()))["policies"]:
        entries = [group["policies"][policy] for group in domains.values()]
        mark = " *" if entries[0]["memory"] else ""
        table.add_row(escape(policy) + mark, *(figure(entry["tokens_per_second_ratio"]) for entry in entries))
    table.add_section()
    for title in bounds(next(iter(domains.values()))):
        ratios = (figure(bounds(group)[title]["tokens_per_second_ratio"]) for group in domains.values())
        table.add_row(f"{title} (bound)", *ratios, style="dim")
    return table


def regret_table(name: str, result: Mapping[str, Any]) -> Table:
    """Where the time goes that oracle.step_truncate does not take, in percent of each one's own."""
    title = f"{name} costs, time that the step oracle does not take, % of one's own"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("who", style="bold")
    for column in (*LOST.values(), "deciding", "together"):
        table.add_column(column.replace(" too", "\ntoo"), justify="right")
    for who, cells in regret_rows(result["overall"]):
        table.add_row(escape(who), *cells)
    return table


def regret_rows(group: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The best fixed size and the policies, with percents: by `KINDS`, deciding, and together."""
    return [(who, _percents(entry["regret"])) for who, entry in contestants(group).items()]


def contestants(group: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The best fixed size and the policies, by what they are called."""
    best = group["best_fixed"]
    return {f"best fixed: {best['block_size']}": best, **group["policies"]}


def _percents(shares: Shares) -> list[str]:
    if REASON in shares:
        return ["-"] * (len(KINDS) + 2)
    lost = [float(shares[kind]) for kind in KINDS]
    lost.append(float(shares[DECIDING]) + float(shares[FEATURES]))
    return [f"{100 * value:.1f}" for value in (*lost, sum(lost))]


def sentences(result: dict[str, Any]) -> list[str]:
    """What is to be said under the tables of one cost model."""
    choices = result["oracle_choices"]
    size, length = (100 * choices["differs"][name] for name in ("block_size", "verify_length"))
    said = [
        f"The step oracle differs from block size {choices['best_fixed']} in {size:.0f}% of its steps, and in the "
        f"verify length in {length:.0f}%."
    ]
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


def about(report: dict[str, Any]) -> str:
    """How to read all tables."""
    memory = any(p["memory"] for r in report["cost_models"].values() for p in r["overall"]["policies"].values())
    orders = f" * has a memory: lowest and highest of {report['settings']['orders']} prompt orders." if memory else ""
    return (
        "Test prompts only. In brackets: 95% paired bootstrap over prompts." + orders + " The share is of the gap from "
        "the best fixed size to oracle.step_truncate. Oracles choose with hindsight: a block size for each prompt, for "
        "each step, or block size and verify length for each step. They are bounds on such choices, and no policies."
        + (f" {ABOUT_CONFIDENCES}" if any(r["overall"]["bounds"] for r in report["cost_models"].values()) else "")
    )


ABOUT_CONFIDENCES = (
    "bound.confidences chooses both by the drafter's calibrated confidences, those of drafts of all sizes known before "
    "drafting: an estimate of what they could win."
)


def bounds(group: Mapping[str, Any]) -> dict[str, Any]:
    """Oracles and other bounds of a group by what they are called, in the order in which they are shown."""
    prefix = {"oracle": "oracle", "bounds": "bound"}
    return {f"{prefix[kind]}.{name}": group[kind][name] for kind, name in BOUNDS if name in group[kind]}


def figure(entry: dict[str, Any], *, digits: int = 3) -> str:
    """A value with its interval, without blanks, so that narrow terminals do not fold in its middle."""
    low, high = entry["interval"]
    return f"{entry['value']:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def share(entry: dict[str, Any]) -> str:
    """A share of the gap in percent."""
    if entry["value"] is None:
        return "-"
    low, high = entry["interval"]
    return f"{100 * entry['value']:.1f}% ({100 * low:.1f}..{100 * high:.1f})"


def decision(entry: dict[str, Any]) -> str:
    """Decision time of a step in microseconds, and its share of all time if it is charged."""
    spent = f"{1e6 * entry['decision_seconds_per_step']:.0f}"
    return spent if entry["decision_share"] is None else f"{spent} ({100 * entry['decision_share']:.1f}%)"


def options(entry: dict[str, Any]) -> str:
    """The options that were chosen, as they would be typed; nothing if all are as given."""
    return ", ".join(f"{name}={_typed(value)}" for name, value in entry["tuning"]["chosen"].items())


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rate(entry: dict[str, Any]) -> str:
    return f"{entry['tokens_per_second']:.4g}"


def _length(entry: dict[str, Any]) -> str:
    low, high = entry["acceptance_length_interval"]
    return f"{entry['acceptance_length']:.2f} ({low:.2f}..{high:.2f})"
