"""Writing files so that no reader ever sees half of one, and no minutes are spent on what cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PICTURES = (".png", ".svg", ".pdf")
"""Formats of plots, by suffix."""


def write_at_once(path: Path, data: bytes | str) -> None:
    """Replace a file, text as UTF-8: whoever reads it sees the old one or the whole new one. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, at once. Raises ValueError for infinite ones."""
    write_at_once(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_writable(path: Path, *, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a result path before minutes of work. Raises ValueError or OSError."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: name a file that ends in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: you have no permission to")
