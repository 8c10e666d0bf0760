"""`bpkit bench`: compare policies by wall clock, on the same prompts, against plain decoding; and its commands."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from bpkit.cli import options, outputs
from bpkit.cli.bench_policy import bench_policy
from bpkit.cli.outputs import Outputs
from bpkit.cli.terminal import say
from bpkit.config import Config
from bpkit.policy import PolicyError
from bpkit.prompts import Prompt

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.registry.resolve import PolicyLike

DEFAULT_POLICIES = ("fixed:4", "fixed:8", "fixed:16", "threshold", "bandit")
DEFAULT_ROWS_POLICIES = ("fixed:2", "fixed:3", "fixed:4", "fixed:6", "fixed:8", "threshold", "bandit")
"""At several batch sizes: the more rows share a pass, the smaller the best size."""
DEFAULT_NEW_TOKENS = 128
_comparison = partial(typer.Option, rich_help_panel="Comparison")

app = typer.Typer(invoke_without_command=True)
app.command("policy")(bench_policy)


@app.callback()
@options.takes(
    texts=options.prompts(),
    files=outputs.figures_and_plot,
    config=options.settings(
        options.MODELS
        | options.SAMPLING
        | options.seed("Of orders, intervals and sampling noise; by default 0.")
        | options.RUNTIME
    ),
)
def bench(
    context: typer.Context,
    policy: options.PolicySpecs = None,
    against: Annotated[
        list[str] | None,
        _comparison(
            help="Also run this decoder: `transformers-dflash`.",
            metavar="NAME",
            autocompletion=lambda: ["transformers-dflash"],
        ),
    ] = None,
    *,
    texts: list[Prompt],
    repeats: Annotated[int, _comparison(help="Runs of each policy on each prompt.", min=1)] = 1,
    batch_size: Annotated[
        str,
        _comparison(
            help="Prompts that run at once, one number or several: `1,4,16`. Above 1, transformers' `generate` at the "
            "same batch size takes part, and whole sets of prompts are timed.",
            metavar="N,...",
        ),
    ] = "1",
    files: Outputs,
    config: Config,
) -> None:
    """Compare policies by wall clock, against plain decoding.

    Tokens/s, speed-up over plain decoding, acceptance length, and where time goes. Reads prompts, the shipped ones by
    default, and writes what `--json` and `--plot` name. Runs are interleaved, so that drift of the machine meets all
    alike, and every text is compared with plain decoding's. Greedy unless a temperature is given.

    `bpkit bench --policy fixed:4 --policy fixed:16 --policy threshold --policy bandit --json bench.json`

    `bpkit bench --policy fixed:16 --against transformers-dflash --domain structured --plot bench.png`

    `bpkit bench --drafter block-diffusion:branches=4 --policy tree --policy fixed:6@block-diffusion`

    `bpkit bench --batch-size 1,4,16 --policy fixed:3 --policy fixed:4 --json rows.json --plot rows.png`

    Next: `bpkit trace` and `bpkit evaluate` say how much of the possible gain a policy takes.
    """
    if context.invoked_subcommand is not None:
        return refuse_options_before(context)
    batch_sizes = parse_batch_sizes(batch_size)
    default = DEFAULT_POLICIES if batch_sizes == [1] else DEFAULT_ROWS_POLICIES
    own_drafters = split_drafters(policy or [])
    specs = {name: of_policy for name, (of_policy, _) in own_drafters.items()}
    named = options.named_policies(policy or [], config, specs) or {name: name for name in default}
    from bpkit.cli.models import in_chat, load_decoder
    from bpkit.judge.wall_clock.bench import BenchSettings, run_bench
    from bpkit.judge.wall_clock.decoders import check_peers
    from bpkit.judge.wall_clock.report import plot_report, print_report
    from bpkit.judge.wall_clock.rows.bench import run_rows_bench
    from bpkit.judge.wall_clock.rows.report import plot_rows_report, print_rows_report

    check_peers(tuple(against or ()))
    if against and batch_sizes != [1]:
        raise ValueError(f"--against {against[0]} decodes one prompt at a time: leave out --batch-size")
    first, watchers = next(iter(named.values())), config.observers or ()
    with files.pending() as bar, closing(load_decoder(config, first, observers=watchers)) as decoder:
        texts = in_chat(decoder, texts)
        settings = BenchSettings(
            policies=those_that_fit(decoder, named) if tuple(named) == default else named,
            options=config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS, temperature=0.0),
            against=tuple(against or ()),
            repeats=repeats,
            threads=config.runtime.threads,
            seed=config.sampling.seed or 0,
            drafters={name: drafter for name, (_, drafter) in own_drafters.items()},
        )
        if batch_sizes == [1]:
            report = run_bench(decoder, texts, settings, bar)
        else:
            report = run_rows_bench(decoder, texts, settings, batch_sizes, bar)
    if batch_sizes == [1]:
        files.deliver(report, print_report, plot_report)
    else:
        files.deliver(report, print_rows_report, plot_rows_report)


def split_drafters(given: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Policy and drafter of those that are typed `POLICY@DRAFTER`, the drafter being one that is registered.

    >>> split_drafters(["fixed:4@ngram:max_ngram=2", "fixed:8", "org/policy@v1"])
    {'fixed:4@ngram:max_ngram=2': ('fixed:4', 'ngram:max_ngram=2')}
    """
    from bpkit.registry.discovery import registry

    parts = {name: name.rpartition("@")[::2] for name in given if "@" in name}
    known = registry().drafters if parts else {}
    return {name: (policy, drafter) for name, (policy, drafter) in parts.items() if drafter.partition(":")[0] in known}


def parse_batch_sizes(text: str) -> list[int]:
    """Batch sizes as typed, each once, in rising order. Raises ValueError.

    >>> parse_batch_sizes("16,1,4")
    [1, 4, 16]
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--batch-size {text}: write numbers of 1 or more, such as 8 or 1,4,16")
    return sorted({int(part) for part in parts})


def refuse_options_before(context: typer.Context) -> None:
    """Options of `bench` that stand before the name of a command would be ignored."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            command = context.invoked_subcommand
            raise ValueError(f"`bpkit bench {command}` has options of its own: write them after `{command}`")


def those_that_fit(decoder: SpeculativeDecoder, policies: dict[str, PolicyLike]) -> dict[str, PolicyLike]:
    """The policies that this drafter can serve; nobody asked for the default ones by name."""
    fitting = {}
    for name, policy in policies.items():
        try:
            decoder.with_policy(policy)
        except PolicyError as error:
            say(f"Left out: {error}")
        else:
            fitting[name] = policy
    return fitting
