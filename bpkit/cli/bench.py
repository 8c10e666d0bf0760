"""`bpkit bench`: compare policies by wall clock, on the same prompts, against plain decoding; and its commands."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit.cli import options
from bpkit.cli.bench_model import bench_model
from bpkit.cli.bench_policy import bench_policy
from bpkit.cli.errors import nothing_written, require, when_interrupted
from bpkit.cli.terminal import console, progress_bar, say
from bpkit.config import Config
from bpkit.policy import PolicyError
from bpkit.registry.resolve import written

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.registry.resolve import PolicyLike

DEFAULT_POLICIES = ("fixed:4", "fixed:8", "fixed:16", "threshold", "bandit")
DEFAULT_NEW_TOKENS, DEFAULT_SEED = 128, 0


app = typer.Typer(invoke_without_command=True)
app.command("model")(bench_model)
app.command("policy")(bench_policy)


@app.callback()
def bench(
    context: typer.Context,
    policy: options.PolicySpecs = None,
    against: options.Against = None,
    domain: options.Domains = None,
    limit: options.Limit = None,
    prompts: options.Prompts = None,
    repeats: options.Repeats = 1,
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture here (.png, .svg or .pdf).", metavar="FILE")] = None,
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
        int | None, typer.Option(help="Of orders, intervals and sampling noise; by default 0.", metavar="N")
    ] = None,
    rule: options.Rule = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    cost: options.Cost = None,
    observe: options.Observe = None,
) -> None:
    """Compare policies by wall clock, against plain decoding.

    Tokens/s, speed-up over plain decoding, acceptance length, and where time goes. Reads prompts, the shipped ones by
    default, and writes what `--json` and `--plot` name. Runs are interleaved, so that drift of the machine meets all
    alike, and every text is compared with plain decoding's. Greedy unless a temperature is given.

    `bpkit bench --policy fixed:4 --policy fixed:16 --policy threshold --policy bandit --json bench.json`

    `bpkit bench --policy fixed:16 --against transformers-dflash --domain structured --plot bench.png`

    Next: `bpkit trace` and `bpkit evaluate` say how much of the possible gain a policy takes.
    """
    if context.invoked_subcommand is not None:
        return refuse_options_before(context)
    settled = options.settled(context)
    chosen = named_policies(policy or [], settled)
    check_outputs(json, plot)
    from bpkit.prompts import choose_prompts

    texts = choose_prompts(prompts, domain or [], limit)
    with when_interrupted(nothing_written(json, plot)):
        report = compare(settled, chosen, texts, against=tuple(against or ()), repeats=repeats)
    deliver(report, json, plot)


def refuse_options_before(context: typer.Context) -> None:
    """Options of `bench` that stand before the name of a command would be ignored."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            command = context.invoked_subcommand
            raise ValueError(f"`bpkit bench {command}` has options of its own: write them after `{command}`")


def named_policies(given: list[str], config: Config) -> dict[str, PolicyLike]:
    """The contestants by name: those of the flags, else the config's one, else the default ones."""
    if given:
        repeated = {name for name in given if given.count(name) > 1}
        if repeated:
            raise ValueError(f"--policy {', '.join(sorted(repeated))} is given more than once")
        return dict(zip(given, given, strict=True))
    if config.policy is not None:
        return {policy_name(config.policy): config.policy}
    return dict(zip(DEFAULT_POLICIES, DEFAULT_POLICIES, strict=True))


def policy_name(policy: str | Mapping[str, Any]) -> str:
    """A policy given as a mapping, as it would be typed.

    >>> policy_name({"name": "threshold", "threshold": 0.6, "block_size": 8})
    'threshold:threshold=0.6,block_size=8'
    """
    return written(policy)


def check_outputs(json: Path | None, plot: Path | None) -> None:
    """Fail now rather than after minutes of measuring."""
    from bpkit.files import PICTURES, check_writable

    if json is not None:
        check_writable(json)
    if plot is not None:
        require("matplotlib", extra="plot", purpose="A plot")
        check_writable(plot, suffixes=PICTURES)


def compare(
    config: Config, policies: dict[str, PolicyLike], prompts: list[Any], *, against: tuple[str, ...], repeats: int
) -> dict[str, Any]:
    """Load the models, measure, and return the report."""
    from bpkit.cli.models import load_decoder
    from bpkit.judge.wall_clock.bench import BenchSettings, run_bench
    from bpkit.judge.wall_clock.decoders import check_peers
    from bpkit.registry.resolve import resolve_policy

    check_peers(against)
    for spec in policies.values():
        resolve_policy(spec)
    decoder = load_decoder(config, next(iter(policies.values())), observers=config.observers or ())
    if tuple(policies) == DEFAULT_POLICIES:
        policies = those_that_fit(decoder, policies)
    settings = BenchSettings(
        policies=policies,
        options=config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS, temperature=0.0),
        against=against,
        repeats=repeats,
        threads=config.runtime.threads,
        seed=DEFAULT_SEED if config.sampling.seed is None else config.sampling.seed,
    )
    with closing(decoder), progress_bar() as bar:
        return run_bench(decoder, prompts, settings, bar)


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


def deliver(report: dict[str, Any], json: Path | None, plot: Path | None) -> None:
    """Print the tables and write the files that were asked for."""
    from bpkit.files import write_json
    from bpkit.judge.wall_clock.plot import plot_report
    from bpkit.judge.wall_clock.report import print_report

    if json is not None:
        write_json(json, report)
    print_report(report, console())
    if plot is not None:
        plot_report(report, plot)
    for path in (json, plot):
        if path is not None:
            say(f"wrote {path}")
