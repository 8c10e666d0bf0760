"""What made an artifact, beside it: recipe, arguments, data, versions, revision."""

from __future__ import annotations

import hashlib
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bpkit import __version__
from bpkit.files import write_json


def fingerprint(texts: Iterable[str]) -> str:
    """SHA-256 over texts, in order."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()


def write_provenance(
    out: Path, recipe: str, arguments: Mapping[str, Any], data: Mapping[str, str], *, name: str = "provenance.json"
) -> None:
    """Write `out/provenance.json`, or `name` there, at once.

    Args:
        recipe: the function that ran. arguments: plain values; of paths only the name is kept.
        data: fingerprints by kind of data.
    """
    facts = {
        "recipe": recipe,
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        "data": dict(data),
        "versions": {
            "python": platform.python_version(),
            "bpkit": __version__,
            **{name: version(name) for name in ("torch", "transformers", "lightning") if find_spec(name) is not None},
        },
        "git_revision": _revision(),
    }
    write_json(out / name, facts)


def _plain(value: Any) -> Any:
    """The name of a path, and an infinite budget in a word: JSON has no such number."""
    if isinstance(value, Path):
        return value.name
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _revision() -> str | None:
    """Of the checkout that this code runs from, if it is one."""
    folder = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
