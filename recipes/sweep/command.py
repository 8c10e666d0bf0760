"""`bpkit --plugin recipes sweep`: what a table of prompt by block size says, and how much of it is luck."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpkit.cli import options, outputs
from bpkit.cli.outputs import Outputs
from bpkit.sizes import parse_sizes


@options.takes(files=outputs.figures_and_plot)
def sweep(
    file: Annotated[Path, typer.Argument(help="JSON or CSV: values by prompt and block size.", metavar="FILE")],
    sizes: Annotated[
        str | None,
        typer.Option(help="Look at these sizes alone too: `14-18`, `4+8+16`, `2-8+16`.", metavar="SIZES"),
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option(
            help="`acceptance_length` or `tokens_per_second`, where the file does not say or holds both.",
            metavar="NAME",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of intervals and permutations.", min=0, metavar="N")] = 0,
    *,
    files: Outputs,
) -> None:
    """Say what a table of prompts by block sizes shows.

    The best fixed size, the per-prompt oracle, and how much of its gain chance alone would give.

    Reads the published BlockPilot layout, and CSV or JSON of your own.

    `bpkit --plugin recipes sweep sweep.json --sizes 14-18`

    `bpkit --plugin recipes sweep rates.csv --figure tokens_per_second --json figures.json --plot sweep.png`
    """
    wanted = None if sizes is None else parse_sizes(sizes)
    from recipes.sweep.figures import summarise_sweep
    from recipes.sweep.read import read_sweep
    from recipes.sweep.report import plot_sweep, print_sweep

    table = read_sweep(file, figure=figure)
    report = summarise_sweep(table, wanted, seed)
    files.deliver(report, print_sweep, lambda report, path: plot_sweep(table, report, path))
