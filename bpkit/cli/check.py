"""`bpkit check`: does a policy do what a policy must? Every failure says what was done, expected, and what happened."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from bpkit.cli import completion, options
from bpkit.cli.errors import FAILED, when_interrupted
from bpkit.cli.terminal import Bar, console, progress_bar, text_table
from bpkit.config import Config
from bpkit.policy import PolicyError

if TYPE_CHECKING:
    from bpkit.registry.resolve import PolicyLike
    from bpkit.testing.checks.report import Report

_STYLES = {"passed": "green", "skipped": "dim", "failed": "bold red"}
_what = partial(typer.Option, rich_help_panel="What is checked")
_Seed = Annotated[int | None, _what(help="Of everything that is drawn; by default 0.", min=0)]


@options.takes(config=options.settings({"seed": _Seed} | options.MODELS))
def check(
    policy: Annotated[
        str | None,
        typer.Argument(
            help=f"{options.POLICY_HELP} By default the policy of --config.",
            metavar="POLICY",
            autocompletion=completion.policies,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        _what(help="Leave out this check; repeat for more.", metavar="NAME", autocompletion=completion.checks),
    ] = None,
    only_list: Annotated[bool, _what("--list", help="List the checks and exit.")] = False,
    shipped: Annotated[
        bool,
        typer.Option(
            "--shipped", help="Also decode with the pair that ships.", rich_help_panel="With real models as well"
        ),
    ] = False,
    *,
    config: Config,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check that a policy does what a policy must.

    Lossless, in range, deterministic, rows of a batch apart, memory saved, edge cases, and more: `--list` says what.
    It decodes with tiny models that are made in memory, in seconds; trained policies get fresh weights for them. With
    --shipped, or --target and --drafter, a few shipped prompts are decoded by real models too, with the policy's own
    weights. Exit code 1 if a check fails.

    `bpkit check ./my_policy.py:MyPolicy`

    `bpkit check threshold:0.6 --shipped`

    Next: `bpkit bench --policy ./my_policy.py:MyPolicy --policy fixed:8`
    """
    if only_list:
        _list(as_json)
        return
    chosen = policy or config.policy
    if chosen is None:
        raise PolicyError("name a policy to check, as in `bpkit check ./my_policy.py:MyPolicy`")
    real = shipped or config.target is not None or config.drafter is not None
    if shipped and (config.target is not None or config.drafter is not None):
        raise ValueError("--shipped is the pair that ships with bpkit: leave out --target and --drafter")
    with when_interrupted("Nothing was written."), progress_bar() as bar:
        report = _report(config, chosen, tuple(skip or ()), real=real, bar=bar)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(FAILED)


def _list(as_json: bool) -> None:
    from bpkit.testing.checks.check import policy_checks

    if as_json:
        checks = [{"name": check.name, "summary": check.summary} for check in policy_checks()]
        typer.echo(json.dumps(checks, indent=2))
        return
    made = text_table("check", "what holds for a policy that passes")
    for check in policy_checks():
        made.add_row(check.name, escape(check.summary))
    console().print(made)


def _report(config: Config, policy: PolicyLike, skip: tuple[str, ...], *, real: bool, bar: Bar) -> Report:
    """What the checks found on the tiny pair, and on real models if those were asked for."""
    from bpkit.cli.models import load_decoder
    from bpkit.prompts import choose_prompts
    from bpkit.registry.resolve import resolve_policy
    from bpkit.testing.checks.check import report_on
    from bpkit.testing.checks.real_models import TEMPERATURES, check_models
    from bpkit.testing.checks.report import Report, Result

    seed = config.sampling.seed or 0
    try:
        report = report_on(policy, seed=seed, skip=skip, progress=bar)
    except PolicyError as error:
        if not real:  # such as an exported policy, which is for one pair
            raise
        unfit = Result("tiny pair", "all other checks, on models made in memory", "skipped", str(error))
        report = Report(str(policy), seed, (unfit,))
    if not real:
        return report
    checked, decoder, prompts = resolve_policy(policy), load_decoder(config, "fixed:1"), choose_prompts(None, (), 1)
    bar.start("models", len(prompts) * len(TEMPERATURES))
    result = check_models(decoder, checked, prompts, seed=seed, progress=bar.tick)
    return replace(report, results=(*report.results, result))


def _print(report: Report) -> None:
    out = console()
    out.print(f"[bold]{escape(report.policy)}[/]", soft_wrap=True)
    table = text_table("check", "", "what")
    for result in report.results:
        what = result.said
        if result.state == "failed":
            count = len(result.failures)
            what = f"{result.summary}: {count} failure{'s' if count > 1 else ''}, see below"
        table.add_row(result.name, f"[{_STYLES[result.state]}]{result.state}[/]", escape(what))
    out.print(table)
    for drafter, why in report.left_out:
        out.print(f"[dim]not with drafter {escape(drafter)}: {escape(why)}[/]", soft_wrap=True)
    for result in report.results:
        for note in result.notes:
            out.print(f"[dim]{escape(result.name)}: {escape(note)}[/]", soft_wrap=True)
    for result in report.failed:
        out.print()
        out.print(f"[bold red]failed[/] {escape(str(result))}", soft_wrap=True)
