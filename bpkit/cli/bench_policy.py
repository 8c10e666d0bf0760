"""`bpkit bench policy`: how long a decision takes, in torch and in onnxruntime."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bpkit.cli import completion, options, outputs
from bpkit.cli.errors import require
from bpkit.cli.outputs import Outputs, portable
from bpkit.cli.terminal import say
from bpkit.config import Config
from bpkit.export.core import Exportable
from bpkit.export.policy import Onnx
from bpkit.policy import PolicyError
from bpkit.prompts import Prompt
from bpkit.registry.discovery import registry
from bpkit.registry.policy_folder import shipped_folders
from bpkit.registry.resolve import resolve_policy

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.judge.latency.backends import Backends

DEFAULT_BATCHES, DEFAULT_LIMIT, DEFAULT_CALLS, DEFAULT_NEW_TOKENS = "1+8+64", 8, 1000, 64
_timing = partial(typer.Option, rich_help_panel="Timing")


@options.takes(
    texts=options.prompts(DEFAULT_LIMIT),
    files=outputs.figures_and_plot,
    config=options.settings(
        options.MODELS
        | {"max_new_tokens": options.SAMPLING["max_new_tokens"]}
        | options.PLACE
        | options.threads("Threads of torch while the models run, by default 1; decisions always take one.")
    ),
)
def bench_policy(
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            help="Policies to time: names, `name:key=value`, folders of trained policies, or `onnx:FOLDER`, files of "
            "`bpkit export`. By default every trained policy that ships.",
            metavar="POLICY",
            autocompletion=completion.policies,
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Time every policy that is registered and serves the pair, beside POLICY.")
    ] = False,
    batch: Annotated[str, _timing(help="Batch sizes.", metavar="SIZES")] = DEFAULT_BATCHES,
    calls: Annotated[int, _timing(help="Timed calls of each method, backend and batch size.", min=20)] = DEFAULT_CALLS,
    warm_up: Annotated[int, _timing(help="Calls before them.", min=1)] = 100,
    block_size: Annotated[
        int | None,
        _timing(
            help="Of the steps that decisions are compared with; by default the fastest fixed one, found first.", min=2
        ),
    ] = None,
    provider: Annotated[str, _timing(help="Of onnxruntime: `cpu` or `cuda`.")] = "cpu",
    weights: Annotated[
        Path | None,
        _timing(
            help="Trained folder that `onnx:FOLDER` was exported from; by default the weights that ship.",
            metavar="FOLDER",
        ),
    ] = None,
    *,
    texts: list[Prompt],
    files: Outputs,
    config: Config,
) -> None:
    """Time a policy's decisions, in torch and, where it can be exported, in onnxruntime.

    p50 and p99 by batch size, on what live decoding asks: of each method, and of all that a step asks. A policy is
    exported on the fly; both backends are asked in turn, a few calls each, in one process. Beside the latencies: what a
    large batch takes over a small one, how many decisions are the same, and what share of a prefill and of a step of
    the pair a decision takes.

    `bpkit bench policy --json latency.json --plot latency.png`

    `bpkit bench policy goodput forecast:truncate=true onnx:exported/forecast --calls 4000`
    """
    sizes = batch_sizes(batch)
    named = [resolve_policy(spec) for spec in policies or []]  # a mistyped one is told before any weights are read
    if every or not named or any(isinstance(policy, Exportable | Onnx) for policy in named):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, extra="export", purpose="A comparison with onnxruntime")
    from bpkit.cli.models import in_chat, load_decoder
    from bpkit.judge.latency.measure import LatencySettings, bench_latency
    from bpkit.judge.latency.report import plot_latency, print_latency_report

    settings = LatencySettings(
        batch_sizes=sizes,
        calls=calls,
        warm_up=warm_up,
        max_new_tokens=config.sampling.max_new_tokens or DEFAULT_NEW_TOKENS,
        threads=config.runtime.threads if isinstance(config.runtime.threads, int) else 1,
        block_size=block_size,
        provider=provider,
    )
    with files.pending() as bar:
        decoder = load_decoder(config, "fixed")
        timed = chosen(policies or [], decoder, provider, weights, every=every)
        report = bench_latency(decoder, timed, in_chat(decoder, texts), settings, bar)
    files.deliver({"command": portable(sys.argv[1:]), **report}, print_latency_report, plot_latency)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes, ascending and each once. Raises ValueError for anything else.

    >>> batch_sizes("64+1+8")
    (1, 8, 64)
    """
    parts = [part.strip() for part in text.split("+")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--batch {text!r}: write batch sizes with + between them, such as {DEFAULT_BATCHES}")
    return tuple(sorted({int(part) for part in parts}))


def chosen(
    specs: list[str], decoder: SpeculativeDecoder, provider: str, weights: Path | None, *, every: bool = False
) -> list[Backends]:
    """The policies that were named, and `every` registered one; where none is, every trained one that ships.

    Of those that were not named, the ones that serve this pair.
    """
    from bpkit.judge.latency.backends import backends_of

    found = [backends_of(s, decoder, provider=provider, weights=weights) for s in dict.fromkeys(specs)]
    if specs and not every:
        return found
    others = sorted(registry().policies)
    for spec in (name for name in others if every or shipped_folders(name)):
        if spec in specs or spec == "onnx":  # which needs a folder
            continue
        try:
            found.append(backends_of(spec, decoder, provider=provider))
        except PolicyError as error:
            say(f"Left out: {error}")
    if not found:
        raise PolicyError("no trained policy that ships serves this pair: name one, such as a folder of `bpkit train`")
    return found
