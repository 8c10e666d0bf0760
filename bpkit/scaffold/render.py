"""From templates to files, and files to a folder: all of them or nothing.

A template is a file `templates/KIND/PATH.tmpl` with `$name` to fill in. In its path `PACKAGE` and `POLICY` stand for
the names, and `dot_` for a dot, because wheels leave out hidden files; the rest is the path of the made file.
"""

from __future__ import annotations

import ast
import builtins
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from string import Template

from bpkit import __version__
from bpkit.installation.distribution import DISTRIBUTION
from bpkit.scaffold.names import Kind, Names, ScaffoldError, another

TEMPLATES = Path(__file__).parent / "templates"
SUFFIX = ".tmpl"
MAX_SUMMARY = 90
"""Characters of a summary: one line of the made files."""

SUMMARIES = {
    Kind.STATELESS: "Drafts a long block after a token that the target was sure of, else a short one.",
    Kind.FEEDBACK: "Before each draft: as much as recent steps accepted on average, and a little more.",
    Kind.TRAINED: "Before each draft, a small trained network picks the block size.",
}
"""What the made policy does, for `bpkit policies`, unless its author says it."""


def render(names: Names, kind: Kind, *, summary: str | None = None, author: str | None = None) -> dict[str, str]:
    """The files of a new package: path -> text, sorted.

    Args:
        summary: one line that says what the policy decides and when; by default that of the kind.
        author: as it shall stand in the metadata; nobody by default.

    Raises:
        ScaffoldError: the class would have a name that the files use for something else, or a text cannot stand in
            them.
    """
    said = _one_line(summary, "--summary", MAX_SUMMARY) if summary else SUMMARIES[kind]
    values = {
        "distribution": names.distribution,
        "package": names.package,
        "policy": names.policy,
        "Class": names.class_name,
        "summary": said if said.endswith((".", "!", "?")) else f"{said}.",
        "authors": f'[{{ name = "{_one_line(author, "--author", MAX_SUMMARY)}" }}]' if author else "[]",
        "bpkit_distribution": DISTRIBUTION,
        "bpkit_version": __version__,
        # Extras of bpkit that the author of such a policy needs; and what for, after "reading traces".
        "extras": "export,train" if kind is Kind.TRAINED else "traces",
        "extras_for": ", training and exporting" if kind is Kind.TRAINED else "",
    }
    files = {}
    for template in (file for folder in ("common", kind) for file in (TEMPLATES / folder).rglob(f"*{SUFFIX}")):
        parts = template.relative_to(TEMPLATES).parts[1:]  # without the folder of the kind
        path = str(PurePosixPath(*(re.sub("^dot_", ".", part) for part in parts))).removesuffix(SUFFIX)
        path = path.replace("PACKAGE", names.package).replace("POLICY", names.policy)
        text = template.read_text(encoding="utf-8")
        files[path] = text if path == "LICENSE" else Template(text).substitute(values)
    _refuse_shadowed(files, names)
    return dict(sorted(files.items()))


def _one_line(text: str, option: str, most: int) -> str:
    """The text, if it can stand between quotes in TOML, Python and Markdown. Raises ScaffoldError."""
    text = text.strip()
    if not text or not text.isprintable() or any(character in text for character in '"\\`'):
        raise ScaffoldError(f"{option} {text!r}: write one line, without double quotes, backquotes and backslashes")
    if len(text) > most:
        raise ScaffoldError(f"{option} has {len(text)} characters: use at most {most}, the README has room for more")
    return text


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
                f"{another(names.distribution)}"
            )


def refuse_folder_in_use(folder: Path) -> None:
    """Raise ScaffoldError unless the folder is empty or not there."""
    if folder.is_dir():
        inside = next(folder.iterdir(), None)
        if inside is not None:
            raise ScaffoldError(
                f"{folder} is not empty (it has {inside.name}), and nothing is overwritten: choose another folder with "
                "`--out`, or move it away"
            )
    elif folder.exists() or folder.is_symlink():
        raise ScaffoldError(f"{folder} is a file: choose another folder with `--out`")


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files, path -> text, beside the folder first, so that an error or an interrupt leaves none of them.

    Raises:
        ScaffoldError: there is something in the folder.
    """
    refuse_folder_in_use(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        made = Path(partial) / "made"  # the temporary folder itself can be read by its owner only
        for path, text in files.items():
            file = made / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        if folder.exists():  # and empty: it may be where the user stands, so it is filled and not replaced
            for entry in sorted(made.iterdir()):
                shutil.move(entry, folder / entry.name)
        else:
            made.rename(folder)
