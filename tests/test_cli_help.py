"""Help and listings: what values are called, panels, widths, and no escape codes where none are wanted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len

from bpkit.cli import main
from bpkit.cli.terminal import console, plain, shows_bars
from bpkit.registry.discovery import build, choose_plugins
from bpkit.registry.hookspecs import hookimpl

LISTINGS = (
    ["policies"],
    ["policies", "threshold"],
    ["drafters", "ngram"],
    ["observers"],
    ["hooks"],
    ["check", "--list"],
    ["calibrate", "--list-presets"],
    ["calibrate", "--show", "dflash-h200-qwen3-4b"],
)
PROGRAM = """
import contextlib, json, sys
import bpkit.cli.main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["bpkit", *arguments]
    with contextlib.suppress(SystemExit):
        bpkit.cli.main.main()
"""


def every_command(*plugins: str) -> Iterator[tuple[list[str], Any]]:
    """Words of every command and group, those of the modules `plugins` included, and the command."""

    def below(words: list[str], command: Any, context: Any) -> Iterator[tuple[list[str], Any]]:
        yield words, command
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            child = command.get_command(context, name)
            yield from below([*words, name], child, child.context_class(child, info_name=name, parent=context))

    root: Any = typer.main.get_command(main.build_app([part for name in plugins for part in ("--plugin", name)]))
    choose_plugins(())
    yield from below([], root, root.context_class(root, info_name="bpkit"))


def run_all(commands: list[list[str]], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other in one process, with both streams in pipes."""
    import json

    names = (
        "NO_COLOR",
        "FORCE_COLOR",
        "COLUMNS",
        "TERM",
        "GITHUB_ACTIONS",
        "PY_COLORS",
        "_TYPER_FORCE_DISABLE_TERMINAL",
    )
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_every_value_in_the_help_is_called_by_what_it_is() -> None:
    for words, command in every_command("recipes"):
        context = command.context_class(command, info_name="bpkit")
        for parameter in command.get_params(context):
            shown = parameter.display_type_rich(context)
            where = f"bpkit {' '.join(words)}: {parameter.name}"
            assert shown is None or not re.search(r"[<>\[\]]|str|int|bool|^VALUE$", shown), f"{where} takes {shown}"
            assert not (getattr(parameter, "is_flag", False) and shown), f"{where} takes nothing"
        usage = " ".join(command.collect_usage_pieces(context))
        assert "{" not in usage, usage
        assert "[[" not in usage, usage


def test_summaries_fit_a_line_of_80_columns() -> None:
    for words, command in every_command("recipes"):
        if len(words) == 1:
            summary = (command.short_help or command.help).split("\n\n")[0]
            assert len(" ".join(summary.split())) <= 65, words
        if words:
            assert re.search(r"^ *`(echo .* )?bpkit .*`$", command.help, re.M), f"{words}: no example"


def test_the_top_help_groups_commands_by_what_they_are_for() -> None:
    root: Any = typer.main.get_command(main.build_app())
    context = root.context_class(root, info_name="bpkit")
    panels: dict[str, list[str]] = {}
    for name in root.list_commands(context):
        panels.setdefault(root.get_command(context, name).rich_help_panel, []).append(name)
    assert list(panels) == ["Decode", "Write a policy", "Measure", "Train and export", "Installation"]
    assert panels["Measure"] == ["bench", "trace", "calibrate", "evaluate", "evaluate-load"]


class _Commands:
    @staticmethod
    @hookimpl
    def bpkit_register_commands(app: typer.Typer) -> None:
        more = typer.Typer()

        @more.command()
        def inner(fast: bool = False, debug: bool = False) -> None:
            typer.echo(f"inner {fast} {debug}")

        @app.command()
        def hello() -> None:
            """Say hello."""

        @app.command(rich_help_panel="Measure")
        def gauge() -> None:
            """Measure something."""

        app.add_typer(more, name="more")
        more.callback()(lambda: None)


def test_commands_of_plugins_have_a_panel_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = build([])
    made.manager.register(_Commands(), "greetings")
    monkeypatch.setattr(main, "registry", lambda: made)
    monkeypatch.setenv("COLUMNS", "80")
    root: Any = typer.main.get_command(main.build_app())
    context = root.context_class(root, info_name="bpkit")
    panels = {name: root.get_command(context, name).rich_help_panel for name in root.list_commands(context)}
    assert (panels["hello"], panels["more"], panels["gauge"]) == ("Plug-in greetings", "Plug-in greetings", "Measure")
    assert list(panels)[-1] == "more"
    with pytest.raises(SystemExit):
        root(["more", "inner", "--help"], prog_name="bpkit")
    assert "bool" not in capsys.readouterr().out
    with pytest.raises(SystemExit):  # an option of its own by a name that bpkit's commands share
        root(["more", "inner", "--debug"], prog_name="bpkit")
    assert capsys.readouterr().out == "inner False True\n"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"},
        {"TERM": "dumb", "FORCE_COLOR": "1"},
        {"GITHUB_ACTIONS": "true"},
    ],
    ids=str,
)
def test_no_escape_codes_where_none_are_wanted(environment: dict[str, str]) -> None:
    helps = (
        [[*words, "--help"] for words, _ in every_command()] if not environment else [["--help"], ["bench", "--help"]]
    )
    wrong = [["generate", "--nonsense"], ["nonsense"], ["policies", "nonsense"], ["calibrate"]]
    done = run_all([*helps, *LISTINGS, *wrong], **environment)
    assert "\x1b" not in done.stdout
    assert "\x1b" not in done.stderr
    assert done.stdout.count("Usage: ") == len(helps)
    assert done.stderr.count("rror") >= len(wrong)


def test_colours_can_be_forced() -> None:
    for arguments in (["--help"], ["policies"]):
        assert "\x1b[" in run_all([arguments], FORCE_COLOR="1", TERM="xterm-256color").stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_cut_off_or_wider_than_the_terminal(columns: int) -> None:
    listings = [arguments for arguments in LISTINGS if arguments[0] not in ("calibrate",) and len(arguments) == 1]
    done = run_all([["--help"], ["generate", "--help"], ["evaluate", "--help"], *listings], COLUMNS=str(columns))
    assert max(cell_len(line) for line in done.stdout.splitlines()) <= columns
    assert "…" not in done.stdout
    for word in ("block_sizes=1+2+4+6+8+12+16", "bpkit_register_policies(register)"):
        assert word in done.stdout


def test_without_a_terminal_there_are_neither_colours_nor_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen:
        def __init__(self, terminal: bool) -> None:
            self.terminal = terminal

        def isatty(self) -> bool:
            return self.terminal

    screen: Any = Screen(True)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    assert (plain(screen), shows_bars()) == (False, True)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert (plain(screen), shows_bars()) == (True, False)
    monkeypatch.setattr(sys, "stderr", Screen(False))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert (plain(sys.stderr), shows_bars()) == (False, False)


def test_a_plain_console_prints_text_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console().print("[bold red]failed[/] [dim]quietly[/]")
    assert capsys.readouterr().out == "failed quietly\n"


def test_a_bug_report_names_versions_and_no_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bpkit.installation.doctor import Finding, as_markdown, without_home

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BPKIT_PLUGINS", f"{tmp_path}/mine.py")
    text = as_markdown(
        [Finding("packages", "torch", f"cannot be\nimported: {tmp_path}/lib/x.so", "broken", "reinstall")]
    )
    assert str(tmp_path) not in text
    assert "BROKEN cannot be imported: ~/lib/x.so" in text
    assert "BPKIT_PLUGINS=~/mine.py" in text
    assert text.count("```") == 4
    assert without_home(f"{tmp_path}ly/x") == f"{tmp_path}ly/x"


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_figures_are_never_cut_off(width: int) -> None:
    from rich.console import Console

    from bpkit.judge.tables import Table, TableRow

    head = ("decoding", "tokens/s", "speed-up", "acceptance\nlength", "time %")
    name, figures = (
        "threshold:threshold=0.6,block_size=8",
        ("165.8 (137.9..203.0)", "1.54x (1.30..1.91)", "2.46", "77/18/2/3"),
    )
    table = Table("overall (3 prompts)", head, [[TableRow((name, *figures))]])
    out = Console(width=width, color_system=None)
    with out.capture() as printed:
        out.print(table)
    text = printed.get()
    assert "…" not in text
    assert max(cell_len(line) for line in text.splitlines()) <= width
    for figure in " ".join(figures).split():
        assert figure in text
    if width == 200:
        assert f"{name}   165.8 (137.9..203.0)" in text


def test_the_page_on_the_command_line_has_every_key_variable_and_exit_code() -> None:
    from bpkit.cli.errors import BAD_INPUT, FAILED, INTERRUPTED, TERMINATED
    from bpkit.config import Config, Runtime, Sampling
    from bpkit.registry.plugin_choice import NO_AUTOLOAD, PLUGINS

    page = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text(encoding="utf-8")
    keys = {*Config.model_fields} - {"sampling", "runtime"}
    keys |= {f"sampling: {name}" for name in Sampling.model_fields} | {
        f"runtime: {name}" for name in Runtime.model_fields
    }
    assert set(re.findall(r"^\| `([a-z_: ]+)` \| `--", page, re.M)) == keys
    for word in (PLUGINS, NO_AUTOLOAD, "NO_COLOR", "FORCE_COLOR", "HF_HUB_OFFLINE", "--install-completion"):
        assert f"`{word}" in page or f" {word}" in page, word
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}
    assert codes == {0, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED}
