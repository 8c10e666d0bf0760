"""`bpkit --plugin recipes bench-trace`: how fast prompts are traced, against brute force over the same block sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bpkit.cli import options, outputs
from bpkit.cli.errors import require
from bpkit.cli.outputs import Outputs
from bpkit.config import Config
from bpkit.prompts import BATCH_SIZE, Prompt
from bpkit.sizes import parse_sizes

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder

DEFAULT_SIZES, DEFAULT_LIMIT = "2-6+8+10+12+16", 5
_COMPARISON = "Comparison"


@options.takes(
    texts=options.prompts(DEFAULT_LIMIT),
    files=outputs.figures,
    config=options.settings(
        options.MODELS
        | options.SAMPLING
        | options.seed("Of positions, intervals and sampling noise; by default 0.")
        | options.PLACE
        | options.threads()
    ),
)
def bench_trace(
    block_sizes: Annotated[
        str, typer.Option(help="Sizes to trace and to try by force.", metavar="SIZES", rich_help_panel=_COMPARISON)
    ] = DEFAULT_SIZES,
    positions: Annotated[
        int,
        typer.Option(
            help="Positions of each prompt, drawn at random, from which the live decoder is run with every size; "
            "scaled to all positions. 0 leaves it out.",
            min=0,
            rich_help_panel=_COMPARISON,
        ),
    ] = 8,
    batch_size: Annotated[
        int, typer.Option(help="Prompts that are traced together.", min=1, rich_help_panel=_COMPARISON)
    ] = BATCH_SIZE,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Checkout of an earlier commit (`git worktree add FOLDER COMMIT`), which traces the same prompts in a "
            "process of its own, in turn with this one.",
            metavar="FOLDER",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    *,
    texts: list[Prompt],
    files: Outputs,
    config: Config,
) -> None:
    """Time tracing, against brute force over the same block sizes.

    Traced prompts per minute, one at a time and together, all in turn. Two brute forces: one generation for each block
    size, and the live decoder from every position with every block size, which is what a trace holds and so slow that
    it is scaled from a sample. Threads are torch's own choice.

    `bpkit --plugin recipes bench-trace --threads 1 --json trace_bench.json`
    """
    require("pyarrow", extra="traces", purpose="A trace")
    sizes = parse_sizes(block_sizes, smallest=2)
    from bpkit.cli.models import in_chat, load_decoder
    from bpkit.cli.trace import trace_options
    from bpkit.trace.collect import GENERATE_WITH
    from recipes.tracing.measure import bench_tracing
    from recipes.tracing.table import print_trace_report

    decoder: SpeculativeDecoder = load_decoder(config, f"fixed:{GENERATE_WITH}")
    models = {
        "target": config.target,
        "drafter": config.drafter,
        **config.runtime.model_dump(include={"dtype", "device"}),
    }
    with files.pending() as bar:
        report = bench_tracing(
            decoder,
            in_chat(decoder, texts),
            trace_options(config, sizes, frozenset()),
            sampled_positions=positions,
            seed=config.sampling.seed or 0,
            batch_size=batch_size,
            against=None if against is None else (against, models),
            progress=bar,
        )
    files.deliver(report, print_trace_report)
