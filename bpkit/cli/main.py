"""The `bpkit` command line. Importing this imports neither torch nor transformers: commands do when they run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.main import get_group
from typer.models import DefaultPlaceholder

from bpkit import __version__
from bpkit.cli import (
    bench,
    calibrate,
    check,
    completion,
    demo,
    doctor,
    evaluate,
    evaluate_load,
    export,
    fetch,
    generate,
    new,
    plugins,
    store,
    trace,
    train,
)
from bpkit.cli.errors import DEBUG, EXIT_CODES, ExplainingGroup, end_when_terminated, exit_code, explain
from bpkit.cli.terminal import be_plain_where_asked, say
from bpkit.installation.distribution import installed
from bpkit.names import did_you_mean
from bpkit.policy import PolicyError
from bpkit.registry.discovery import Registry, call, choose_plugins, registry
from bpkit.registry.plugin_choice import PLUGINS, choice_of, plugin_flags

_HELP = """Speculative decoding with block-size policies as plug-ins.

Start with `bpkit demo`, list what there is with `bpkit policies`, and compare with `bpkit bench`. Every command has a
`--help` with examples.
"""

_DECODE, _WRITE, _MEASURE = "Decode", "Write a policy", "Measure"
_TRAIN, _INSTALLATION = "Train and export", "Installation"
_COMMANDS: dict[str, tuple[Callable[..., Any] | typer.Typer, str]] = {
    "demo": (demo.demo, _DECODE),
    "generate": (generate.generate, _DECODE),
    "models": (fetch.app, _DECODE),
    "policies": (plugins.policies, _WRITE),
    "drafters": (plugins.drafters, _WRITE),
    "observers": (plugins.observers, _WRITE),
    "hooks": (plugins.hooks, _WRITE),
    "new": (new.new, _WRITE),
    "check": (check.check, _WRITE),
    "bench": (bench.app, _MEASURE),
    "trace": (trace.trace, _MEASURE),
    "calibrate": (calibrate.calibrate, _MEASURE),
    "evaluate": (evaluate.evaluate, _MEASURE),
    "evaluate-load": (evaluate_load.evaluate_load, _MEASURE),
    "train": (train.app, _TRAIN),
    "store": (store.app, _TRAIN),
    "export": (export.export, _TRAIN),
    "doctor": (doctor.doctor, _INSTALLATION),
}
"""By name, in the order of the help: what runs, and the panel that it stands in."""


class _Bpkit(ExplainingGroup):
    own = tuple(_COMMANDS)


def _show_version(wanted: bool) -> None:
    """The first line is bpkit's alone, for programs that read it."""
    if wanted:
        typer.echo(f"bpkit {__version__}")
        typer.echo(f"Python {platform.python_version()}")
        for name in ("torch", "transformers"):
            typer.echo(f"{name} {installed(name) or 'not installed'}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of bpkit, Python, torch and transformers, and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show a traceback when a command fails; may also stand after the command.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            metavar="NAME",
            help="`no:NAME` leaves a plug-in out; `NAME` loads one, or a module that is not installed as one; repeat.",
            autocompletion=completion.plugin_choices,
        ),
    ] = None,
) -> None:
    """Options before the command; `ExplainingGroup` reads `debug`, and `plugin_flags` has read `plugin` by now."""


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The command line with the commands of all plug-ins.

    Args:
        arguments: of the command line, of which only `--plugin` before the command is read.
    """
    choose_plugins(plugin_flags(arguments))
    app = typer.Typer(
        name="bpkit",
        help=_HELP,
        epilog=EXIT_CODES,
        cls=_Bpkit,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    app.callback()(_global_options)
    for name, (command, panel) in _COMMANDS.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(command)
    add_plugin_commands(app, registry())
    return app


def add_plugin_commands(app: typer.Typer, known: Registry) -> None:
    """Let each plug-in make its commands, in the order of hook calls, and add them to those of bpkit.

    One that fails is noted, adds nothing and takes nobody along.
    """
    whose = dict.fromkeys(_COMMANDS, "of bpkit itself")
    for implementation in known.calls("bpkit_register_commands"):
        plugin, made = implementation.plugin_name, typer.Typer()
        try:
            call(implementation, app=made)
            names = _checked_names(made, whose)
        except (Exception, SystemExit) as error:
            known.fail(plugin, f"its commands: {type(error).__name__}: {error}")
            continue
        added: list[Any] = [*made.registered_commands, *made.registered_groups]
        for one in added:
            if isinstance(one.rich_help_panel, DefaultPlaceholder) or one.rich_help_panel is None:
                one.rich_help_panel = f"Plug-in {plugin}"
        app.registered_commands += made.registered_commands
        app.registered_groups += made.registered_groups
        whose.update(dict.fromkeys(names, f"of plug-in {plugin!r}"))


def _checked_names(made: typer.Typer, whose: dict[str, str]) -> list[str]:
    """The names of what a plug-in made. Raises ValueError if they will not do."""
    if made.registered_callback is not None:
        raise ValueError("it replaced the options before the command")
    names = list(get_group(made).commands)
    if len(names) < len(made.registered_commands) + len(made.registered_groups):
        raise ValueError("it has two commands of one name")
    for name in names:
        if name in whose:
            raise ValueError(f"command {name!r} is there already, {whose[name]}")
    return names


def pass_on(flags: Sequence[str]) -> None:
    """Let processes that a command starts choose the same plug-ins."""
    if flags:
        before = os.environ.get(PLUGINS, "")
        os.environ[PLUGINS] = ",".join([*filter(None, [before]), *flags])


def check_choice(known: Registry) -> None:
    """Warn of names that no plug-in has. Raises PolicyError for a plug-in that was named and failed."""
    names = {name for plugin in known.plugins.values() for name in plugin.names}
    for name, how in known.unheard.items():
        hint = did_you_mean(name, names) or f" The plug-ins are: {', '.join(sorted(known.plugins))}"
        say(f"Warning: {how}: there is no plug-in {name!r}.{hint}")
    for name, how in choice_of(plugin_flags(sys.argv[1:])).named.items():
        for plugin in known.plugins.values():
            if name in plugin.names and plugin.name in known.failures:
                raise PolicyError(f"{how}: plug-in {name!r} could not be loaded ({known.failures[plugin.name]})")


def main() -> None:
    """Run the command line and exit."""
    be_plain_where_asked()
    end_when_terminated()
    arguments = sys.argv[1:]
    try:
        app = build_app(arguments)
        check_choice(registry())
        pass_on(plugin_flags(arguments))
    except (PolicyError, KeyboardInterrupt) as error:
        say(explain(error))
        sys.exit(exit_code(error))
    app(prog_name="bpkit")
