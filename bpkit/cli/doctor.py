"""`bpkit doctor`: what is installed, whether it works together, and what to do where it does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from bpkit.cli.errors import FAILED
from bpkit.cli.terminal import console, text_table

if TYPE_CHECKING:
    from bpkit.installation.doctor import Finding

_STYLES = {"ok": "green", "missing": "dim", "warning": "yellow", "broken": "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Print Markdown to paste into a bug report, without the name of your home folder."
        ),
    ] = False,
) -> None:
    """See what is installed, and whether it works together.

    Plug-ins, torch, CUDA, onnxruntime and optional parts. Each fault comes with the command that mends it. Exit code 1
    if something is broken; what is merely missing or odd is not.

    `bpkit doctor`

    `bpkit doctor --report`
    """
    from bpkit.installation.doctor import as_json as plain
    from bpkit.installation.doctor import as_markdown, broken, examine

    if as_json and report:
        raise ValueError("--json and --report exclude each other: give one of them")
    findings = examine()
    if report:
        typer.echo(as_markdown(findings))
    elif as_json:
        typer.echo(json.dumps(plain(findings), indent=2))
    else:
        out = console()
        out.print(_table(findings))
        for finding in findings:
            if finding.advice:
                mends = "To mend it" if finding.state in ("warning", "broken") else "If you want it otherwise"
                said = f"{finding.section}, {finding.name}: {finding.value}. {mends}: {finding.advice}"
                out.print(f"[{_STYLES[finding.state]}]{finding.state}[/] {escape(said)}", soft_wrap=True)
    if broken(findings):
        raise typer.Exit(FAILED)


def _table(findings: list[Finding]) -> Table:
    """A row for each finding."""
    made = text_table("", "what", "state", "found")
    before = ""
    for finding in findings:
        state = f"[{_STYLES[finding.state]}]{finding.state}[/]"
        section = finding.section if finding.section != before else ""
        made.add_row(section, escape(finding.name), state, escape(finding.value))
        before = finding.section
    return made
