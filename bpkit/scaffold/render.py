"""From templates to the text of files. A template is a file `templates/KIND/PATH.tmpl` with `$name` to fill in.

In a path `PACKAGE` and `POLICY` stand for the names, and `dot_` for a dot, because wheels leave out hidden files; the
rest of the path is that of the made file.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from pathlib import Path, PurePosixPath
from string import Template

from bpkit import __version__
from bpkit.installation.distribution import DISTRIBUTION
from bpkit.scaffold.kinds import EXTRAS, EXTRAS_FOR, SUMMARIES, Kind
from bpkit.scaffold.names import Names, ScaffoldError

TEMPLATES = Path(__file__).parent / "templates"
SUFFIX = ".tmpl"
MAX_SUMMARY = 90
"""Characters of a summary: one line of the made files."""


def render(names: Names, kind: Kind, *, summary: str | None = None, author: str | None = None) -> dict[str, str]:
    """The files of a new package: path -> text, sorted.

    Args:
        summary: one line that says what the policy decides and when; by default that of the kind.
        author: as it shall stand in the metadata; nobody by default.

    Raises:
        ScaffoldError: the class would have a name that the files use for something else, or a text cannot stand in
            them.
    """
    values = {
        "distribution": names.distribution,
        "package": names.package,
        "policy": names.policy,
        "Class": names.class_name,
        "summary": _sentence(_one_line(summary, "--summary", MAX_SUMMARY) if summary else SUMMARIES[kind]),
        "authors": f"[{{ name = {_quoted(_one_line(author, '--author', MAX_SUMMARY))} }}]" if author else "[]",
        "bpkit_distribution": DISTRIBUTION,
        "bpkit_version": __version__,
        "extras": EXTRAS[kind],
        "extras_for": EXTRAS_FOR[kind],
    }
    files = {}
    for template in _templates(kind):
        path = _path(template, names)
        text = template.read_text(encoding="utf-8")
        files[path] = text if path == "LICENSE" else Template(text).substitute(values)
    _refuse_shadowed(files, names)
    return dict(sorted(files.items()))


def _templates(kind: Kind) -> list[Path]:
    """Those of every package, and those of the kind."""
    return [file for folder in ("common", kind) for file in (TEMPLATES / folder).rglob(f"*{SUFFIX}")]


def _path(template: Path, names: Names) -> str:
    """Where the made file lies in the package."""
    parts = template.relative_to(TEMPLATES).parts[1:]  # without the folder of the kind
    inside = str(PurePosixPath(*(re.sub("^dot_", ".", part) for part in parts))).removesuffix(SUFFIX)
    return inside.replace("PACKAGE", names.package).replace("POLICY", names.policy)


def _one_line(text: str, option: str, most: int) -> str:
    """The text, if it can stand between quotes in TOML, Python and Markdown. Raises ScaffoldError."""
    text = text.strip()
    if not text or not text.isprintable() or any(character in text for character in '"\\`'):
        raise ScaffoldError(f"{option} {text!r}: write one line, without double quotes, backquotes and backslashes")
    if len(text) > most:
        raise ScaffoldError(f"{option} has {len(text)} characters: use at most {most}, the README has room for more")
    return text


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _refuse_shadowed(files: dict[str, str], names: Names) -> None:
    """Raise ScaffoldError if a class of the made files has the name of something that they import or call."""
    used = set(dir(builtins))
    for path, text in files.items():
        if path.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(f"{names.package}."):
                    used |= {alias.asname or alias.name for alias in node.names}
    for made in (names.class_name, f"{names.class_name}Config"):
        if made in used:
            raise ScaffoldError(
                f"{names.distribution!r} would need a class {made!r}, a name that its files use for something else: "
                f"choose another name, such as 'bpkit-{names.policy.replace('_', '-')}-mine'"
            )
