"""A report as one HTML file: no script, nothing from outside. Texts are escaped where they become elements."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpkit.judge.pictures import data_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("page.css")


def html_page(title: str, body: Iterable[str]) -> str:
    """The whole page, of a title and elements that are HTML already."""
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>",
            f"{STYLE.read_text(encoding='utf-8')}</style></head>",
            "<body>",
            *body,
            "</body></html>\n",
        )
    )


def definitions(terms: Mapping[str, str]) -> str:
    """A chapter of terms."""
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<h2>Terms</h2><dl>{listed}</dl>"


def origin(said: Sequence[str], report: Mapping[str, Any], parts: Iterable[str]) -> str:
    """A chapter of where figures come from: sentences, the command, and parts of the report to be unfolded."""
    command = report.get("provenance", {}).get("command")
    made_by = [f"Made by: {command}"] if command else []
    details = "".join(
        f"<details><summary>{part}</summary><pre>{escape(json.dumps(report[part], indent=1))}</pre></details>"
        for part in parts
        if report.get(part)
    )
    return f"<h2>Where this comes from</h2>{paragraphs([*said, *made_by])}{details}"


def paragraphs(texts: Iterable[str]) -> str:
    """A paragraph for each text."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def picture(figure: Figure, caption: str) -> str:
    """A picture that is part of the page, with a caption that also says it to those who cannot see it."""
    said = escape(caption)
    return f'<figure><img src="{data_uri(figure)}" alt="{said}"><figcaption>{said}</figcaption></figure>'
