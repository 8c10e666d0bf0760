"""The frame and style of a page that is whole by itself, its paragraphs and pictures. Texts are escaped here."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 62rem;
  padding: 1rem 1.2rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .6rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; max-width: 36rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { font-weight: 600; color: #555; vertical-align: bottom; white-space: normal; }
table.text td:last-child, table.text th:last-child { text-align: left; white-space: normal; min-width: 11rem;
  overflow-wrap: anywhere; }
tr.dim td { color: #777; }
.note { background: #fff8e5; border-left: 4px solid #e6a700; padding: .3rem 1rem; margin: 1rem 0; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: #0060a0; }
pre { font-size: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: .8rem; }
dt { font-weight: 600; margin-top: .6rem; overflow-wrap: anywhere; }
dd { margin: 0 0 0 1rem; max-width: 46rem; }
"""

PAGE = (
    "<!doctype html>\n"
    '<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    "<title>{title}</title><style>" + STYLE.replace("{", "{{").replace("}", "}}") + "</style></head>\n"
    "<body>\n{body}\n</body></html>\n"
)
"""To be formatted with `title` and `body`, both HTML."""


def paragraphs(texts: Iterable[str]) -> str:
    """A paragraph for each text."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def figure_element(data_uri: str, caption: str) -> str:
    """A picture that is part of the page, with a caption that also says it to those who cannot see it."""
    said = escape(caption)
    return f'<figure><img src="{data_uri}" alt="{said}"><figcaption>{said}</figcaption></figure>'
