"""`bpkit --plugin recipes bench-model`: modelled speed against the wall clock, policies and prompts being the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bpkit.cli import completion, options, outputs
from bpkit.cli.errors import require
from bpkit.cli.outputs import Outputs
from bpkit.config import Config

DEFAULT_POLICIES = (
    "fixed:1",
    "fixed:2",
    "fixed:4",
    "fixed:6",
    "fixed:8",
    "fixed:12",
    "fixed:16",
    "threshold",
    "bandit",
)
DEFAULT_LIMIT = 10


@options.takes(files=outputs.figures, config=options.settings(options.MODELS | options.PLACE | options.threads()))
def bench_model(
    trace: Annotated[Path, typer.Argument(help="Folder that `bpkit trace` made.", metavar="TRACE")],
    cost: Annotated[
        str,
        typer.Option(
            help="What `bpkit calibrate` measured on this machine.",
            metavar="FILE|PRESET",
            autocompletion=completion.presets,
        ),
    ],
    policy: options.PolicySpecs = None,
    limit: Annotated[int, typer.Option(help="Prompts of each domain, the first ones.", min=1)] = DEFAULT_LIMIT,
    *,
    files: Outputs,
    seed: Annotated[int, typer.Option(help="Of orders and intervals.")] = 0,
    config: Config,
) -> None:
    """Compare replay's speed with the wall clock's.

    Prompts of a trace are decoded by wall clock and replayed, in turn: how far modelled speed can be trusted. Time of
    steps only, prefill left out, as in `bpkit evaluate`. Use the number of threads of the calibration.

    `bpkit --plugin recipes bench-model TRACE --cost cost.json --threads 2 --json model_bench.json`
    """
    require("pyarrow", extra="traces", purpose="A trace")
    from bpkit.cli.models import load_decoder
    from bpkit.learn.training.prompts import Part
    from bpkit.trace.collect.recompute import check_models
    from bpkit.trace.cost import read_cost
    from bpkit.trace.store.joined import open_trace
    from recipes.modelled.measure import bench_model as measure

    opened, table = open_trace(trace), read_cost(cost)
    decoder = load_decoder(config, "fixed")
    check_models(decoder, opened.manifest)
    names = policy or DEFAULT_POLICIES
    with files.pending() as bar:
        report = measure(
            decoder,
            opened.manifest,
            Part(opened, range(len(opened)), limit=limit),
            dict(zip(names, names, strict=True)),
            table,
            seed=seed,
            progress=bar,
        )
    files.deliver(report, print_model_report)


def print_model_report(report: dict[str, Any], out: Console) -> None:
    """A row for each policy."""
    from bpkit.judge.tables import Table, TableRow, bracketed

    prompts = len(report["settings"]["prompts"])
    rows = []
    for name, entry in report["policies"].items():
        ratio = entry["modelled_over_measured"]
        rows.append(
            TableRow(
                (
                    name,
                    f"{entry['measured_tokens_per_second']:.1f}",
                    f"{entry['modelled_tokens_per_second']:.1f}",
                    f"{ratio['value']:.3f} {bracketed(ratio['interval'], '.3f')}",
                    f"{entry['prompts_with_the_same_steps']}/{prompts}",
                )
            )
        )
    head = ("policy", "measured\ntokens/s", "modelled\ntokens/s", "modelled / measured", "same steps")
    out.print(Table(f"{prompts} prompts, time of steps", head, [rows]))
