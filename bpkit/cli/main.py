"""The `bpkit` command line. Importing this imports neither torch nor transformers: commands do when they run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bpkit import __version__
from bpkit.cli import bench, calibrate, demo, doctor, evaluate, export, generate, plugins, prompts, sweep, trace, train
from bpkit.cli.errors import EXIT_CODES, ExplainingGroup, exit_code, explain
from bpkit.cli.terminal import say
from bpkit.policy import PolicyError
from bpkit.registry import Registry, registry

_HELP = """Speculative decoding with block-size policies as plug-ins.

Start with `bpkit demo`, list what there is with `bpkit policies`, and compare with `bpkit bench`.
"""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bpkit {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when a command fails.")] = False,
) -> None:
    """Options before the command; `ExplainingGroup` reads `debug`."""


def build_app() -> typer.Typer:
    """The command line with the commands of all plug-ins.

    Raises:
        PolicyError: two plug-ins claim one name.
    """
    app = typer.Typer(
        name="bpkit",
        help=_HELP,
        epilog=EXIT_CODES,
        cls=ExplainingGroup,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    app.callback()(_global_options)
    for command in (
        generate.generate,
        plugins.policies,
        plugins.drafters,
        demo.demo,
        prompts.prompts,
        trace.trace,
        calibrate.calibrate,
        evaluate.evaluate,
        sweep.sweep,
        export.export,
        doctor.doctor,
    ):
        app.command()(command)
    app.add_typer(bench.app, name="bench")
    app.add_typer(train.app, name="train")
    _add_plugin_commands(app, registry())
    return app


def _add_plugin_commands(app: typer.Typer, known: Registry) -> None:
    """Let each plug-in add its commands. One that fails is noted, and does not take the others down."""
    for name, plugin in known.manager.list_name_plugin():
        hook = getattr(plugin, "bpkit_register_commands", None)
        if hook is None:
            continue
        try:
            hook(app=app)
        except Exception as error:
            known.failures[name] = f"its commands: {type(error).__name__}: {error}"


def main() -> None:
    """Run the command line and exit."""
    try:
        app = build_app()
    except PolicyError as error:
        say(explain(error))
        sys.exit(exit_code(error))
    app(prog_name="bpkit")
