"""MkDocs hook: the page of commands, made from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

PLACE = "<!-- every command, in the order of `bpkit --help` -->"
"""A line of the page that the commands take the place of."""


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Put the commands where they belong, and leave out what is said to readers of the files alone."""
    markdown = re.sub(r"\s*In the repository this\s+page\s[^.]*\.", "", markdown)
    if page.file.src_uri != "commands.md":
        return markdown
    return with_commands(markdown)


def with_commands(markdown: str) -> str:
    """The page with every command in it. Raises ValueError if it has no place for them."""
    if markdown.count(PLACE) != 1:
        raise ValueError(f"docs/commands.md needs the line {PLACE} once")
    return markdown.replace(PLACE, "\n".join(_all()))


def _all() -> Iterator[str]:
    from bpkit.cli.main import build_app

    command: Any = typer.main.get_command(build_app())
    yield from _command(command, _context(command, "bpkit", None), like=None)


def _context(command: Any, name: str, parent: Any) -> Any:
    return command.context_class(command, info_name=name, parent=parent)


def _command(command: Any, context: Any, *, like: str | None) -> Iterator[str]:
    """A section for a command, and those of its subcommands.

    Args:
        like: the command of another name that takes the same options, which are not said again.
    """
    level = "##" if context.parent is None or context.parent.parent is None else "###"
    yield f"{level} {context.command_path}\n"
    yield f"```text\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    if like is not None:
        yield f"{_paragraphs(command.help).partition(chr(10) * 2)[0]} Takes what [`{like}`](#{_slug(like)}) takes.\n"
        return
    yield _paragraphs(command.help)
    for panel, records in _panels(command, context).items():
        yield f"\n**{panel}**\n"
        for names, help_text in records:
            yield f"`{names}`\n:   {help_text}\n"
    yield from _subcommands(command, context)
    if command.epilog and context.parent is None:
        yield f"{command.epilog}\n"


def _subcommands(command: Any, context: Any) -> Iterator[str]:
    seen: dict[tuple[str, ...], str] = {}
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        child = command.get_command(context, name)
        if child.hidden:
            continue
        inner = _context(child, name, context)
        takes = tuple(str(p.get_help_record(inner)) for p in child.get_params(inner))
        same = seen.get(takes) if len(takes) > 2 else None
        yield from _command(child, inner, like=same)
        seen.setdefault(takes, inner.command_path)


def _paragraphs(help_text: str | None) -> str:
    """Help as Markdown: paragraphs that are one piece of code are shown as code."""
    paragraphs = []
    for paragraph in (help_text or "").split("\f")[0].strip().split("\n\n"):
        alone = paragraph.startswith("`") and paragraph.endswith("`") and paragraph.count("`") == 2
        paragraphs.append(f"```sh\n{paragraph[1:-1]}\n```" if alone else paragraph)
    return "\n\n".join(paragraphs) + "\n"


def _panels(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Names and help of arguments and options, by the panel that `--help` shows them in."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        default = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = getattr(parameter, "rich_help_panel", None) or default
        panels.setdefault(panel, []).append((record[0], record[1].replace("  [", " [").replace("<", "&lt;")))
    return panels


def _slug(path: str) -> str:
    return path.replace(" ", "-").lower()
