"""An evaluation under load as tables and sentences, on the terminal or in the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from bpkit.judge.evaluation.figures import REASON
from bpkit.judge.evaluation.fixed import called
from bpkit.judge.load.setup import BOUNDS, CHANGING, CONCURRENCY, FIXED, POLICIES, RATE
from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences

RATIO = "tokens_per_second_ratio"


def print_load_report(report: dict[str, Any], console: Console) -> None:
    """Print tables and notes."""
    for table in tables(report):
        console.print(table)
    notes = [f"Note: {note}" for note in report["notes"]]
    left_out = [f"Left out: {policy}: {reason}" for policy, reason in report.get("left_out", {}).items()]
    print_sentences([*left_out, *notes, about(report)], console)


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """All of them: speed by load, then everything of each load, then what was drafted and verified."""
    if report["loads"]:
        yield speed_table(report["loads"])
        yield load_table(report)
        yield work_table(report["loads"])
        if any(load[BOUNDS] for load in report["loads"].values()):
            yield regret_table(report["loads"])


def speed_table(loads: Mapping[str, Any]) -> Table:
    """Tokens/s over the best fixed size: a column for each load."""
    every = list(loads.values())
    fixed = [
        TableRow(("best fixed size", *(called(load["best_fixed"]) for load in every))),
        TableRow(("its tokens/s", *(f"{load['best_fixed'][load['compared']]:.1f}" for load in every))),
    ]
    rows = [TableRow((name, *(_marked(load[POLICIES][name]) for load in every))) for name in every[0][POLICIES]]
    limits = [
        TableRow((f"{name} (bound)", *(_marked(load[BOUNDS][name]) for load in every)), "dim")
        for name in every[0][BOUNDS]
    ]
    head = ("who", *map(title, every))
    return Table("tokens/s over the best fixed size of each load", head, [fixed, rows, limits])


def load_table(report: Mapping[str, Any]) -> Table:
    """Speed and latency of the best fixed size, of policies and bounds: a section for each load."""
    limit, factor = report["settings"]["slo_tpot"], _factor(report)
    unit = "ms" if factor == 1e3 else "plain steps"
    head = ["who", "tokens/s", "over best fixed", "share of\nthe gap"]
    head += [f"first token\n{unit}, p50", "p99", f"per token\n{unit}, p50", "p99", "tokens/s\na request"]
    head += [] if limit is None else [f"% within\n{factor * limit:g} {unit}", "those\na second"]
    sections = []
    for load in report["loads"].values():
        rows = [_heading(load, len(head) + 1)]
        limits = {f"{name} (bound)": entry for name, entry in load[BOUNDS].items()}
        for who, entry in {**compared(load), **limits}.items():
            cells = [who, f"{entry['tokens_per_second']:.1f}", _over(entry)]
            cells.append(_share(entry.get("gap_share")))
            cells += [_time(entry[what], which, factor) for what in ("ttft", "tpot") for which in ("p50", "p99")]
            cells.append(f"{entry['tokens_per_second_per_request']:.1f}")
            if limit is not None:
                cells += [f"{100 * entry['goodput']['share']:.0f}", f"{entry['goodput']['requests_per_second']:.2f}"]
            cells.append("-" if entry["decision_us"] is None else f"{entry['decision_us']:.0f}")
            rows.append(TableRow(cells, "dim" if who in limits else None))
        sections.append(rows)
    return Table("each load", [*head, "decision\nus"], sections)


def work_table(loads: Mapping[str, Any]) -> Table:
    """What was drafted and verified for an output token."""
    head = ("who", "rows", "acceptance\nlength", "drafted\na token", "verified\na token", "wasted\na token")
    columns = ("rows", "acceptance_length", "drafted_per_token", "verified_per_token", "wasted_per_token")
    sections = []
    for load in loads.values():
        rows = [TableRow((who, *(f"{entry[name]:.2f}" for name in columns))) for who, entry in compared(load).items()]
        sections.append([_heading(load, len(head)), *rows])
    return Table("positions for an output token", head, sections)


def regret_table(loads: Mapping[str, Any]) -> Table:
    """Where policies lose time against the bound, in percent of their own."""
    known = [load for load in loads.values() if load[BOUNDS]]
    shares = [entry["regret"] for load in known for entry in load[POLICIES].values() if REASON not in entry["regret"]]
    kinds = list(shares[0]) if shares else []
    head = ("who", *(kind.replace("_", "\n", 1).replace("_", " ") for kind in kinds))
    sections = []
    for load in known:
        lost = {who: entry["regret"] for who, entry in load[POLICIES].items()}
        rows = [
            TableRow((who, *(f"{100 * of[kind]:.1f}" if kind in of else "-" for kind in kinds)))
            for who, of in lost.items()
        ]
        sections.append([_heading(load, len(head)), *rows])
    return Table("time that the bound does not take, % of one's own", head, sections)


def size_table(loads: Mapping[str, Any]) -> Table:
    """Every fixed size over the best one of each load."""
    sizes = list(next(iter(loads.values()))[FIXED])
    rows = [TableRow((title(load), *(f"{load[FIXED][size][RATIO]:.3f}" for size in sizes))) for load in loads.values()]
    return Table("", ("load", *sizes), [rows])


def about(report: Mapping[str, Any]) -> str:
    """How to read all tables."""
    settings = report["settings"]
    charged = "is charged" if settings["decision_time_charged"] else "is not charged"
    spread = f"95% over {settings['seeds']} seeds, each with prompts, order and arrivals of its own"
    share = ""
    if any(load[BOUNDS] for load in report["loads"].values()):
        share = " The share is of the gap from the best fixed size to the first bound, on its seeds."
    speeds = [load["simulated_steps_per_second"] for load in report["loads"].values()]
    simulated = f" Simulated steps a second: {min(speeds):.0f} to {max(speeds):.0f}." if speeds else ""
    return (
        f"In brackets: {spread}; + and - mark intervals above and below 1. The best fixed size is chosen afterwards "
        f"for each load, on the same requests. Decision time of policies {charged}. Arrivals are compared by tokens/s "
        "a request, a changing load by its whole time." + share + simulated
    )


def title(load: Mapping[str, Any]) -> str:
    """What a load is called."""
    kinds = {
        CONCURRENCY: f"{load['rows']} at once",
        RATE: f"{load.get('rate', 0):g} a second",
        CHANGING: "-".join(map(str, load.get("levels", ()))),
    }
    return kinds[load["kind"]]


def compared(load: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The best fixed size and the policies, by what they are called."""
    return {f"best fixed: {called(load['best_fixed'])}": load["best_fixed"], **load[POLICIES]}


def _heading(load: Mapping[str, Any], columns: int) -> TableRow:
    """A line with the load alone."""
    return TableRow((title(load), *[""] * (columns - 1)), "dim")


def _over(entry: Mapping[str, Any]) -> str:
    interval = entry["interval"]
    return f"{entry[RATIO]:.3f}" + ("" if interval is None else f" {bracketed(interval, '.3f')}")


def _marked(entry: Mapping[str, Any]) -> str:
    """A ratio, with the side of 1 that its interval is on."""
    low, high = entry["interval"] or (1, 1)
    return f"{entry[RATIO]:.3f}" + ("+" if low > 1 else "-" if high < 1 else " ")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _time(quantiles: Mapping[str, float] | None, which: str, factor: float) -> str:
    return "-" if quantiles is None else f"{factor * quantiles[which]:.3g}"


def _factor(report: Mapping[str, Any]) -> float:
    return 1e3 if report["settings"]["unit"] == "seconds" else 1.0
