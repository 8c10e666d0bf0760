"""Links of Markdown pages, code left alone."""

from __future__ import annotations

import re
from collections.abc import Callable

_CODE = re.compile(
    r"""
    ^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[`~]*\s*$  # a block between fences
    | (?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)  # a piece of a line or paragraph
    """,
    re.M | re.S | re.X,
)
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?(?=\))")


def links(markdown: str) -> list[tuple[str, str]]:
    """Path and anchor (with its `#`, or empty) of every link and picture; those to other hosts included."""
    return [(m["target"], m["anchor"] or "") for m in _LINK.finditer(_without_code(markdown))]


def relinked(markdown: str, change: Callable[[str], str]) -> str:
    """The page with the path of every link changed, and anchors kept."""
    hidden = _without_code(markdown)  # of the same length, so that places agree
    parts, end = [], 0
    for match in _LINK.finditer(hidden):
        parts += [markdown[end : match.start()], change(match["target"]), match["anchor"] or ""]
        end = match.end()
    return "".join([*parts, markdown[end:]])


def _without_code(markdown: str) -> str:
    return _CODE.sub(_blanked, markdown)


def _blanked(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])
