"""`bpkit --plugin recipes bench-digits`: passes of the target for each image with drafts of the last pass."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bpkit.cli import options, outputs
from bpkit.cli.outputs import Outputs, portable
from bpkit.sizes import parse_sizes

_sizes = partial(typer.Option, rich_help_panel="Sizes", min=1)


@options.takes(files=outputs.figures_and_plot)
def bench_digits(
    images: Annotated[int, _sizes(help="Of each class, on each of the two seeds.")] = 5,
    windows: Annotated[
        str, typer.Option(help="Drafted tokens: `4+8+16`, `2-6`.", metavar="SIZES", rich_help_panel="Sizes")
    ] = "2+4+8+16+32",
    steps: Annotated[int, _sizes(help="Of training; 1,200 take a minute or two on a quiet core.")] = 1200,
    seed: Annotated[int, typer.Option(help="Of the images that are reported.")] = 2,
    tuning_seed: Annotated[int, typer.Option(help="Of those on which window and repeat are chosen.")] = 1,
    *,
    files: Outputs,
) -> None:
    """Count passes for each image with drafts of the last pass.

    Trains a small autoregressive model of scikit-learn's digits (8 x 8 pixels of 17 grey levels, raster order, the
    class as the prompt), then makes images at temperature 1: by plain decoding, with `last-pass` under both verify
    rules, and by speculative Jacobi decoding as it was published. Counts do not depend on the machine's speed.

    `bpkit --plugin recipes bench-digits --json last_pass.json --plot last_pass.png`
    """
    from recipes.digits.measure import DigitSettings
    from recipes.digits.measure import bench_digits as measure
    from recipes.digits.picture import plot_digits

    if seed == tuning_seed:
        raise ValueError("--seed and --tuning-seed must differ: what was chosen on images is not judged on them")
    settings = DigitSettings(
        images=images, windows=tuple(parse_sizes(windows)), steps=steps, seed=seed, tuning_seed=tuning_seed
    )
    with files.pending() as bar:
        report = {"command": portable(sys.argv[1:]), **measure(settings, bar)}
    files.deliver(report, print_digits, plot_digits)


def print_digits(report: dict[str, Any], out: Console) -> None:
    """A row for each window, a column for each way; of both repeats the better one on the tuning seed."""
    arms, rows = report["arms"], report["rows"]
    table = Table(title=f"passes of plain decoding ({report['plain_passes']}) over passes", box=box.SIMPLE_HEAD)
    table.add_column("window")
    for arm in arms:
        table.add_column(arm.replace("_", " "), justify="right")
    for window in report["settings"]["windows"]:
        best = [best_row(rows, arm, window) for arm in arms]
        table.add_row(str(window), *(f"{row['ratio']:.2f}x" for row in best))
    out.print(table)
    head = report["headline"]
    for arm, said in arms.items():
        at = "jacobi_passes_ratio" + ("" if arm == "coupled" else f"_{arm}")
        low, high = head[f"{at}_interval"]
        chosen = f"window {head[f'{at}_window']}, repeat {head[f'{at}_repeat']}"
        out.print(f"{said}: {head[at]:.2f}x ({low:.2f}..{high:.2f}), {chosen}", soft_wrap=True)
    out.print(f"images equal to plain decoding's, rule coupled: {head['images_equal']} of {head['images']}")


def best_row(rows: list[dict[str, Any]], arm: str, window: int) -> dict[str, Any]:
    """The row of this way and window whose repeat was better on the tuning seed."""
    return max(
        (row for row in rows if (row["arm"], row["window"]) == (arm, window)), key=lambda row: row["tuning_ratio"]
    )
