"""`bpkit --plugin recipes bench-fold`: what folding a policy on raw logits into the target's head saves."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bpkit.cli import options, outputs
from bpkit.cli.outputs import Outputs, portable

_SIZES = "Sizes"


@options.takes(files=outputs.figures)
def bench_fold(
    vocab_size: Annotated[int, typer.Option(help="Of the head.", min=2, rich_help_panel=_SIZES)] = 151_936,
    hidden_size: Annotated[int, typer.Option(help="Of the head.", min=1, rich_help_panel=_SIZES)] = 2560,
    width: Annotated[
        int, typer.Option(help="Neurons of each layer of the policy.", min=1, rich_help_panel=_SIZES)
    ] = 2048,
    states: Annotated[int, typer.Option(help="Random hidden states on which decisions are compared.", min=1)] = 256,
    rounds: Annotated[
        int, typer.Option(help="Calls of the raw form; each is followed by several of the folded one.", min=2)
    ] = 50,
    threads: Annotated[int, typer.Option(help="Of torch while calls are timed.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of weights and hidden states.")] = 0,
    device: Annotated[str, typer.Option(help="Such as `cpu` or `cuda`.")] = "cpu",
    *,
    files: Outputs,
) -> None:
    """Time BlockPilot's published form against its fold.

    The published form is vocabulary -> 2048 -> 2048 -> sizes; the fold into the target's head is exact. The raw form
    reads the logits of the whole vocabulary; folded, it reads the hidden state that they come from and decides the same
    (`bpkit export --fold`). Weights are random, sizes those of Qwen3-4B by default: about 5 GB of memory, and a minute
    or two for the fold. Try `--vocab-size 4096 --hidden-size 256` first.

    `bpkit --plugin recipes bench-fold --json fold.json`
    """
    from recipes.fold.measure import FoldSettings
    from recipes.fold.measure import bench_fold as measure

    settings = FoldSettings(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        width=width,
        states=states,
        rounds=rounds,
        threads=threads,
        seed=seed,
        device=device,
    )
    with files.pending() as bar:
        report = {"command": portable(sys.argv[1:]), **measure(settings, bar)}
    files.deliver(report, print_fold_report)


def print_fold_report(report: dict[str, Any], out: Console) -> None:
    """Latencies, and the sentences that say what they are."""
    settings = report["settings"]
    title = f"a decision: {settings['vocab_size']:,} logits, or {settings['hidden_size']:,} hidden numbers"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("form", style="bold")
    for name in ("p50 ms", "p99 ms", "faster than raw (95%)"):
        table.add_column(name, justify="right")
    for name, shown, ratio in (
        ("raw", "raw", None),
        ("folded", "folded", "raw_over_folded"),
        ("folded_cold", "folded, caches cold", "raw_over_folded_cold"),
    ):
        entry = report[name]
        faster = _ratio(report[ratio]) if ratio else ""
        table.add_row(shown, f"{entry['p50_ms']:.3f}", f"{entry['p99_ms']:.3f}", faster)
    out.print(table)
    for sentence in sentences(report):
        out.print(escape(sentence), soft_wrap=True)


def sentences(report: dict[str, Any]) -> list[str]:
    """What the figures are."""
    settings, machine, decisions, weights = (report[name] for name in ("settings", "machine", "decisions", "weights"))
    return [
        f"Same decision on {decisions['clear_agree']:,} of {decisions['clear']:,} hidden states whose best score leads "
        f"by more than {decisions['tolerance']:g}, and on {decisions['within_tolerance_agree']:,} of "
        f"{decisions['within_tolerance']:,} others; scores differ by at most {decisions['largest_difference']:.2g}.",
        f"A decision reads {weights['raw']:,} weights raw and {weights['folded']:,} folded, {weights['ratio']:.1f} "
        "times fewer; what it is faster beyond that, caches explain. Cold: the first call after one of the raw form, "
        "as after a prefill.",
        f"Random weights; folding took {settings['seconds_of_folding']:.0f} s, once. Machine: "
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{settings['threads']} thread(s).",
    ]


def _ratio(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['value']:.1f}x ({low:.1f}..{high:.1f})"
