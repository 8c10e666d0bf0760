"""MkDocs hook: what pages link to outside of docs/ becomes part of the site, as a page that shows it.

In the repository such a link leads to the file. On the site it leads to `source/`: code with highlighting, folders as
lists under their README, Markdown as it is.
"""

from __future__ import annotations

import os.path
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from pygments.lexers import get_lexer_for_filename, guess_lexer
from pygments.util import ClassNotFound

sys.path.insert(0, str(Path(__file__).parent))
from links import links, relinked

FOLDER = "source"
LARGEST = 64 * 1024
"""Bytes of a file that is shown; a larger one is only listed in its folder."""
NOT_SHOWN = {"__pycache__"}


def on_files(files: Files, *, config: Any) -> Files:
    """Add a page for everything outside of docs/ that some page links to, and for what lies in such folders."""
    docs = Path(config.docs_dir)
    wanted = {
        path
        for file in files.documentation_pages()
        for path in _outside(docs / file.src_uri, file.content_string, docs)
    }
    done: set[Path] = set()
    while wanted - done:
        path = (wanted - done).pop()
        done.add(path)
        wanted.update(_further(path, docs))
    for path in sorted(done):
        page = File.generated(config, page_of(path, docs.parent), content=_content(path, docs.parent))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Let links out of docs/ lead to those pages."""
    docs, here = Path(config.docs_dir), page.file.src_uri
    original = _document(here, docs)
    if original is None:
        return markdown

    def on_site(target: str) -> str:
        path = _resolved(original, target, docs.parent)
        if path is None:
            return target
        uri = path.relative_to(docs).as_posix() if path.is_relative_to(docs) else page_of(path, docs.parent)
        return os.path.relpath(uri, os.path.dirname(here) or ".")

    return relinked(markdown, on_site)


def page_of(path: Path, root: Path) -> str:
    """Where on the site a file or folder of the repository is shown, as a page in docs/."""
    path = _with_folder(path, root)
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return f"{FOLDER}/{name}/index.md"
    return f"{FOLDER}/{name}" if path.suffix == ".md" else f"{FOLDER}/{name}.md"


def _document(uri: str, docs: Path) -> Path | None:
    """The Markdown file that a page was made from, or None for a page that shows code or a bare list."""
    if not uri.startswith(f"{FOLDER}/"):
        return docs / uri
    path = docs.parent / uri.removeprefix(f"{FOLDER}/")
    if path.name == "index.md":
        path = path.with_name("README.md")
    return path if path.is_file() else None


def _further(path: Path, docs: Path) -> Iterator[Path]:
    """What the page of a file or folder leads to."""
    if path.is_dir():
        yield from (_with_folder(child, docs.parent) for child in _children(path) if _has_page(child))
        path = path / "README.md"
    if path.suffix == ".md" and path.is_file():
        yield from _outside(path, path.read_text(encoding="utf-8"), docs)


def _outside(page: Path, markdown: str, docs: Path) -> Iterator[Path]:
    for target, _ in links(markdown):
        path = _resolved(page, target, docs.parent)
        if path is not None and not path.is_relative_to(docs):
            yield _with_folder(path, docs.parent)


def _resolved(page: Path, target: str, root: Path) -> Path | None:
    """The file or folder of the repository that a link names, or None."""
    if not target or ":" in target:
        return None
    path = Path(os.path.normpath(page.parent / target))
    return path if path.exists() and path.is_relative_to(root) else None


def _with_folder(path: Path, root: Path) -> Path:
    """A folder's README is shown on the folder's page."""
    return path.parent if path.name == "README.md" and path.parent != root else path


def _children(folder: Path) -> list[Path]:
    shown = (p for p in folder.iterdir() if p.name not in NOT_SHOWN and not p.name.startswith("."))
    return sorted(shown, key=lambda p: (p.is_file(), p.name))


def _has_page(path: Path) -> bool:
    if path.is_dir() or path.suffix == ".md":
        return True
    return path.stat().st_size <= LARGEST and b"\0" not in path.read_bytes()


def _content(path: Path, root: Path) -> str:
    """The page of a file or folder. Raises ValueError for a file that cannot be shown."""
    if path.is_dir():
        readme = path / "README.md"
        if readme.is_file():
            return f"{readme.read_text(encoding='utf-8').rstrip()}\n\n## In this folder\n\n{_listing(path, root)}"
        return _head(path, root) + _listing(path, root)
    if not _has_page(path):
        name = path.relative_to(root)
        raise ValueError(f"{name} is linked to, but cannot be shown: link to its folder if it is no text or too long")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    fence = "~" * 8
    return f'{_head(path, root)}{fence}{{.{_language(path, text)} linenums="1"}}\n{text.rstrip()}\n{fence}\n'


def _head(path: Path, root: Path) -> str:
    """Of pages that the search leaves out: a hit in a file helps less than one in a page about it."""
    name = path.relative_to(root).as_posix()
    return f"---\ntitle: {name}\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {path.name}\n\n`{name}`\n\n"


def _listing(folder: Path, root: Path) -> str:
    """A list of what is in the folder, but its README."""
    here = os.path.dirname(page_of(folder, root))
    lines = []
    for path in _children(folder):
        if path.name == "README.md":
            continue
        if _has_page(path):
            lines.append(f"- [{path.name}]({os.path.relpath(page_of(path, root), here)})")
        else:
            lines.append(f"- {path.name}, {path.stat().st_size:,} bytes")
    return "\n".join(lines) + "\n"


def _language(path: Path, text: str) -> str:
    """What Pygments calls the language of a file, by its name or its first line."""
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = guess_lexer(text)
    return str(lexer.aliases[0])
