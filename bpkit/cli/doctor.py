"""`bpkit doctor`: what is installed, whether it works together, and what to do where it does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from bpkit.cli.errors import FAILED
from bpkit.cli.terminal import console

if TYPE_CHECKING:
    from bpkit.doctor import Finding

_STYLES = {"ok": "green", "missing": "dim", "warning": "yellow", "broken": "bold red"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """See what is installed and whether it works together: plug-ins, torch, CUDA, onnxruntime, optional parts.

    Each fault comes with the command that mends it. Exit code 1 if something is broken; what is merely missing or odd
    is not. Put the output of `bpkit doctor --json` into a bug report.
    """
    from bpkit.doctor import as_json as plain
    from bpkit.doctor import broken, examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps(plain(findings), indent=2))
    else:
        out = console()
        out.print(table(findings))
        for finding in findings:
            if finding.advice and finding.state in ("warning", "broken"):
                out.print(f"[{_STYLES[finding.state]}]{finding.state}[/] {escape(_sentence(finding))}", soft_wrap=True)
    if broken(findings):
        raise typer.Exit(FAILED)


def table(findings: list[Finding]) -> Table:
    """A row for each finding."""
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("", style="bold")
    for name in ("what", "state", "found", "what to do"):
        made.add_column(name, overflow="fold")
    before = ""
    for finding in findings:
        state = f"[{_STYLES[finding.state]}]{finding.state}[/]"
        section = finding.section if finding.section != before else ""
        made.add_row(section, escape(finding.name), state, escape(finding.value), escape(finding.advice))
        before = finding.section
    return made


def _sentence(finding: Finding) -> str:
    return f"{finding.section}, {finding.name}: {finding.value}. To mend it: {finding.advice}"
