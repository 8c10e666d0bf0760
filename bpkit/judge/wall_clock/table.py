"""The report on the terminal: a table for each group, and below what was measured."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bpkit.judge.fitted import Fitted
from bpkit.judge.wall_clock.report import PHASES, entries, groups, what_was_measured


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print all groups, those without loops where they differ, and the sentences about them."""
    for title, group in groups(report).items():
        console.print(Fitted(group_table(title, group)))
    rest = report["without_loops"]["overall"]
    if rest is not None and report["overall"]["loops"]:
        console.print(Fitted(group_table("overall, without the prompts whose plain output loops", rest)))
    for sentence in what_was_measured(report):
        console.print(escape(sentence), soft_wrap=True)


def group_table(title: str, group: dict[str, Any]) -> Table:
    """One group as a table."""
    count, looping = group["prompts"], group["loops"]
    loops = f", of which {looping} loop{'s' * (looping == 1)}" if looping else ""
    table = Table(
        title=f"{title} ({count} {'prompt' if count == 1 else 'prompts'}{loops})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("decoding", style="bold")
    table.add_column("tokens/s", justify="right")
    table.add_column("speed-up", justify="right")
    table.add_column("acceptance\nlength", justify="right")
    table.add_column("same\ntext", justify="right")
    table.add_column("time %: target/\ndrafter/policy/other", justify="right")
    table.add_column("fall-\nbacks", justify="right")
    plain = group["plain"]
    for entry in (plain, *plain["others"]):
        speedup = "1.00x" if entry is plain else f"{entry['tokens_per_second'] / plain['tokens_per_second']:.2f}x"
        name = escape(f"plain ({entry['source']})")
        same, share = _same(entry["identical_text"]), _shares(entry["share"])
        table.add_row(name, _rate(entry), speedup, "1.00", same, share, "-")
    table.add_section()
    best = max((entry["tokens_per_second"] for entry in group["policies"].values()), default=None)
    for name, entry in entries(group).items():
        fastest = name in group["policies"] and entry["tokens_per_second"] == best
        table.add_row(
            escape(name),
            _rate(entry),
            f"{entry['speedup']:.2f}x {_interval(entry['speedup_interval'], 2)}",
            "-" if entry["acceptance_length"] is None else f"{entry['acceptance_length']:.2f}",
            _same(entry["identical_text"]),
            _shares(entry["share"]),
            str(entry["fallbacks"]) if name in group["policies"] else "-",
            style="green" if fastest else None,
        )
    return table


def _rate(entry: dict[str, Any]) -> str:
    return f"{entry['tokens_per_second']:.1f} {_interval(entry['tokens_per_second_interval'], 1)}"


def _interval(pair: list[float], digits: int) -> str:
    # Without blanks, so that narrow terminals do not fold in its middle.
    return f"({pair[0]:.{digits}f}..{pair[1]:.{digits}f})"


def _same(identical: bool | None) -> str:
    return "-" if identical is None else "yes" if identical else "NO"


def _shares(share: dict[str, float] | None) -> str:
    return "-" if share is None else "/".join(f"{100 * share[phase]:.0f}" for phase in PHASES)
