"""`bpkit --plugin recipes bench-rows`: many rows at once, into one file with a headline."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bpkit.cli import options, outputs
from bpkit.cli.outputs import Outputs, portable
from bpkit.config import Config
from bpkit.prompts import Prompt

DEFAULT_LIMIT, DEFAULT_NEW_TOKENS = 16, 128
DEFAULT_POLICIES = ("fixed:2", "fixed:3", "fixed:4", "fixed:6", "bandit")
DEFAULT_BATCH_SIZES = "8,16"
_comparison = partial(typer.Option, rich_help_panel="Comparison")
_elsewhere = partial(typer.Option, rich_help_panel="Figures of other commands", metavar="FILE")


@options.takes(
    texts=options.prompts(DEFAULT_LIMIT),
    files=outputs.figures,
    config=options.settings(
        options.MODELS
        | options.SAMPLING
        | options.seed("Of orders, intervals and sampling noise; by default 0.")
        | options.PLACE
        | options.threads()
        | options.COST
    ),
)
def bench_rows(
    policy: options.PolicySpecs = None,
    batch_size: Annotated[
        str, _comparison(help="Prompts that run at once; 8 and 16 must be among them.", metavar="N,...")
    ] = DEFAULT_BATCH_SIZES,
    repeats: Annotated[int, _comparison(help="Runs of each policy on each set of prompts.", min=1)] = 1,
    cost_table: Annotated[
        Path | None, _elsewhere(help="Cost table of `bpkit calibrate --batch-sizes`: its error on what was held out.")
    ] = None,
    trace_bench: Annotated[
        Path | None, _elsewhere(help="Figures of `bpkit --plugin recipes bench-trace`: its ratio at batch.")
    ] = None,
    *,
    texts: list[Prompt],
    files: Outputs,
    config: Config,
) -> None:
    """Time many rows at once, with the pair and with n-gram drafts.

    `bpkit bench --batch-size` with the drafter of the pair, then with n-gram drafts, and a headline: texts that are
    what they are alone, plain decoding at batch 16 over transformers' `generate`, the fastest policy at batch 8 over
    plain decoding. Five to eight minutes on two quiet cores.

    `bpkit --plugin recipes bench-rows --cost-table costs.json --trace-bench trace_bench.json --json rows.json`
    """
    from bpkit.cli.bench import parse_batch_sizes
    from bpkit.cli.models import in_chat, load_decoder
    from bpkit.judge.wall_clock.bench import BenchSettings
    from recipes.rows import measure

    sizes = parse_batch_sizes(batch_size)
    if not {measure.PLAIN_AT, measure.SPEEDUP_AT} <= set(sizes):
        raise ValueError(f"--batch-size {batch_size}: the headline needs {measure.SPEEDUP_AT} and {measure.PLAIN_AT}")
    elsewhere: dict[str, float] = {}
    if cost_table is not None:
        elsewhere["cost_error_percent"] = 100 * measure.figure_of(cost_table, measure.COST_ERROR)
    if trace_bench is not None:
        elsewhere["trace_ratio"] = measure.figure_of(trace_bench, measure.TRACE_RATIO)
    named = options.named_policies(policy or DEFAULT_POLICIES, config)
    settings = BenchSettings(
        named,
        config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS, temperature=0.0),
        repeats=repeats,
        threads=config.runtime.threads,
        seed=config.sampling.seed or 0,
    )
    decoder = load_decoder(config, "fixed:1")
    with files.pending() as bar:
        report = {
            "command": portable(sys.argv[1:]),
            **measure.bench_rows(decoder, in_chat(decoder, texts), settings, sizes, bar),
        }
    report["headline"] |= elsewhere
    files.deliver(report, print_rows)


def print_rows(report: dict[str, Any], out: Console) -> None:
    """The tables of each drafter, and the headline."""
    from bpkit.judge.wall_clock.rows.report import print_rows_report

    for name, of_drafter in report["reports"].items():
        out.print(f"\n[bold]{name}[/bold]")
        print_rows_report(of_drafter, out)
    out.print("\n[bold]headline[/bold]")
    for name, value in report["headline"].items():
        if not name.endswith("_interval"):
            out.print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    free = report["drafts_for_free"]
    for name, sizes in free.items():
        for size, policies in sizes.items():
            said = ", ".join(f"{policy} {ratio:.2f}x" for policy, ratio in policies.items())
            out.print(f"{name} at {size}, if drafts took no time: {said}", soft_wrap=True)
