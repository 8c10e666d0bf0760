"""MkDocs hook: terms of the glossary say what they mean where they are used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_TERM = re.compile(r"^### (?P<term>[^\n]+)\n\n(?P<meaning>.+?)(?:\n\n|\Z)", re.M | re.S)
NOT_EVERYWHERE = {
    "target",
    "drafter",
    "policy",
    "step",
    "trace",
    "feature",
    "memory",
    "prefill",
    "replay",
    "step cost",
    "anchor",
}
"""Words that nearly every sentence has, or that mean other things, too."""


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Append abbreviations, from the page that holds the terms, to all other pages of the documentation."""
    if page.file.src_uri == "glossary.md" or page.file.src_uri.startswith("source/"):
        return markdown
    glossary = (Path(config.docs_dir) / "glossary.md").read_text(encoding="utf-8")
    told = (
        f"*[{term}{plural}]: {meaning}"
        for term, meaning in terms(glossary).items()
        if term not in NOT_EVERYWHERE
        for plural in ("", "s")
    )
    return markdown + "\n\n" + "\n".join(told) + "\n"


def terms(glossary: str) -> dict[str, str]:
    """The first sentence of every term, as plain text; a heading may hold several terms, with commas between."""
    found = {}
    for match in _TERM.finditer(glossary):
        meaning = " ".join(match["meaning"].split())
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", meaning).replace("`", "").replace("*", "")
        first = re.split(r"(?<=\.) (?=[A-Z])", plain)[0]
        for term in match["term"].split(", "):
            found[term.replace("`", "").strip()] = first
    return found
