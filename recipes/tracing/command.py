"""`bpkit --plugin recipes bench-trace`: how fast prompts are traced, against brute force over the same block sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bpkit.cli import options
from bpkit.cli.errors import nothing_written, require, when_interrupted
from bpkit.cli.terminal import console, progress_bar, say
from bpkit.sizes import parse_sizes

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.prompts import Prompt

DEFAULT_SIZES, DEFAULT_LIMIT = "2-6+8+10+12+16", 5
_COMPARISON = "Comparison"


def bench_trace(
    context: typer.Context,
    block_sizes: Annotated[
        str, typer.Option(help="Sizes to trace and to try by force.", metavar="SIZES", rich_help_panel=_COMPARISON)
    ] = DEFAULT_SIZES,
    positions: Annotated[
        int,
        typer.Option(
            help="Positions of each prompt, drawn at random, from which the live decoder is run with every size; "
            "scaled to all positions.",
            min=1,
            rich_help_panel=_COMPARISON,
        ),
    ] = 8,
    domain: options.Domains = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help=f"Prompts of each domain; by default {DEFAULT_LIMIT} of the shipped ones, and all of a file.",
            min=1,
            metavar="N",
            rich_help_panel=options.PROMPTS,
        ),
    ] = None,
    prompts: options.Prompts = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    # `options.settled` reads these from the context: flags win over the config file.
    target: options.Target = None,
    drafter: options.Drafter = None,
    config: options.ConfigFile = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: Annotated[
        int | None, typer.Option(help="Of positions, intervals and sampling noise; by default 0.", metavar="N")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Time tracing, against brute force over the same block sizes.

    Traced prompts per minute, interleaved in one process. Two brute forces: one generation for each block size, and the
    live decoder from every position with every block size, which is what a trace holds and so slow that it is scaled
    from a sample. Threads are torch's own choice.

    `bpkit --plugin recipes bench-trace --threads 1 --json trace_bench.json`
    """
    require("pyarrow", extra="traces", purpose="A trace")
    settled = options.settled(context)
    sizes = parse_sizes(block_sizes, smallest=2)
    from bpkit.cli.models import load_decoder
    from bpkit.cli.trace import trace_options
    from bpkit.files import check_writable, write_json
    from bpkit.prompts import choose_prompts
    from bpkit.trace.collect import GENERATE_WITH
    from recipes.tracing.measure import bench_tracing
    from recipes.tracing.table import print_trace_report

    if json is not None:
        check_writable(json)
    texts: list[Prompt] = choose_prompts(prompts, domain or [], limit, shipped_limit=DEFAULT_LIMIT)
    decoder: SpeculativeDecoder = load_decoder(settled, f"fixed:{GENERATE_WITH}")
    with when_interrupted(nothing_written(json)), progress_bar() as bar:
        report = bench_tracing(
            decoder,
            texts,
            trace_options(settled, sizes, frozenset()),
            sampled_positions=positions,
            seed=settled.sampling.seed or 0,
            progress=bar,
        )
    if json is not None:
        write_json(json, report)
    print_trace_report(report, console())
    if json is not None:
        say(f"wrote {json}")
