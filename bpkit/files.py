"""Files: written so that no reader ever sees half of one; and what is wrong with one, in words."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

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
    """Write plain values or a pydantic model as JSON, at once. Raises ValueError for NaN and infinity."""
    write_at_once(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes. Raises ValueError for NaN and infinity."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def utc(seconds: float | None = None) -> str:
    """A time in seconds since 1970, now if it is left out, as it is written into files."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def faults(error: ValidationError, *, most: int = 5) -> str:
    """What pydantic refused in a file, as `key: what is wrong`. Short, however large or hostile the file is."""
    found = error.errors(include_input=False, include_url=False)
    said = []
    for fault in found[:most]:
        place, what = ".".join(map(str, fault["loc"]))[:120], fault["msg"].removeprefix("Value error, ")[:200]
        wrong = f"{place}: {what}" if place else what  # without a place it is about the whole
        said.append(f"unknown key {place}" if fault["type"] == "extra_forbidden" else wrong)
    return "; ".join(said) + (f"; and {len(found) - most} more" if len(found) > most else "")


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
