"""A folder of an exported policy, loaded as if from a stranger: plain files of the folder itself, of bounded size."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bpkit.export.check import check_graph
from bpkit.export.core import Method
from bpkit.export.golden import check_golden, compare, rows_of
from bpkit.export.schema import ExportedPolicy, Network
from bpkit.export.session import Session, open_session
from bpkit.files import faults
from bpkit.policy import PolicyError

DESCRIPTION, VERSION = "policy.json", 1
LARGEST_DESCRIPTION = 8 << 20
LARGEST_FILE = 256 << 20
"""Bytes of an ONNX file: a policy is a small network."""
_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class Loaded:
    """An exported policy that passed every check.

    Attributes:
        sessions: by the method that each stands for.
    """

    description: ExportedPolicy
    sessions: dict[Method, Session]


def load_exported(path: str | Path, provider: str = "cpu") -> Loaded:
    """Read a folder, check it, and open a session for each of its files, over the very bytes that were checked.

    Args:
        path: folder that `bpkit export` made. provider: `cpu` or `cuda`.

    Raises:
        PolicyError: with one sentence that names the file, says what is wrong and how to mend it.
    """
    folder = Path(path).expanduser()
    description = read_description(folder)
    files = {
        str(folder / name): (read_network(folder, name, network), network)
        for name, network in description.networks.items()
    }
    for file, (data, network) in files.items():
        check_graph(file, data, network)
    check_golden(files)
    sessions = {network.method: open_session(data, provider) for data, network in files.values()}
    if provider != "cpu":
        for file, (_, network) in files.items():
            inputs, outputs = rows_of(file, network)
            compare(file, network, outputs, sessions[network.method].run(inputs))
    return Loaded(description, sessions)


def read_description(folder: Path) -> ExportedPolicy:
    """What `policy.json` says. Raises PolicyError with one sentence that says what is wrong with it."""
    if not folder.is_dir():
        raise PolicyError(f"there is no folder {str(folder)!r}: name one that `bpkit export` made")
    path = folder / DESCRIPTION
    if not os.path.lexists(path):
        raise PolicyError(f"{folder} holds no exported policy (no {DESCRIPTION}): name one that `bpkit export` made")
    data = read_file(folder, DESCRIPTION, LARGEST_DESCRIPTION)
    try:
        values = json.loads(data, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:  # of UnicodeDecodeError and JSONDecodeError too
        raise PolicyError(f"{path} is no JSON ({str(error)[:200]}): {_AGAIN}") from None
    _check_version(path, values)
    try:
        return ExportedPolicy.model_validate(values, strict=False)
    except (ValidationError, RecursionError) as error:
        said = faults(error) if isinstance(error, ValidationError) else "it is nested too deeply"
        raise PolicyError(f"{path} does not describe an exported policy ({said}): export it again") from None


def _check_version(path: Path, values: Any) -> None:
    if not isinstance(values, dict):
        raise PolicyError(f"{path} does not describe an exported policy: it holds no JSON object; export it again")
    if "weights_sha256" in values:
        raise PolicyError(
            f"{path} is of a policy as `bpkit train` writes it, not of an exported one: run `bpkit export` on the "
            "folder, or use it as it is with the policy's option `weights`"
        )
    version = values.get("schema_version")
    if version != VERSION or isinstance(version, bool):
        raise PolicyError(
            f"{path} has schema_version {str(version)[:40]}, and this version of bpkit reads schema_version {VERSION}: "
            "update bpkit, or export the policy again with this version"
        )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal keys they take."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has a key twice")
    return made


def read_network(folder: Path, name: str, network: Network) -> bytes:
    """The bytes of an ONNX file, the very ones that `policy.json` names by their SHA-256. Raises PolicyError."""
    data = read_file(folder, name, LARGEST_FILE)
    path = folder / name
    if len(data) != network.bytes:
        raise PolicyError(
            f"{path} has {len(data):,} bytes and {DESCRIPTION} says {network.bytes:,}: it is cut short or of another "
            f"export; {_AGAIN}"
        )
    if hashlib.sha256(data).hexdigest() != network.sha256:
        raise PolicyError(
            f"{path} is damaged, or of another export than {DESCRIPTION} beside it (its SHA-256 differs): {_AGAIN}"
        )
    return data


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """A file that lies in the folder itself: no link, no device, not empty, no web page, at most `limit` bytes."""
    path = folder / name
    if Path(name).name != name or "\\" in name:
        raise PolicyError(f"{DESCRIPTION} names the file {name!r}, which is not in its folder: export the policy again")
    try:
        if path.is_symlink():
            raise PolicyError(
                f"{path} is a symbolic link, which may lead anywhere: copy the files themselves (`cp -rL`, or "
                "`hf download --local-dir`)"
            )
        data = _bounded(path, limit)
    except FileNotFoundError:
        raise PolicyError(f"{path} is missing, and {DESCRIPTION} names it: {_AGAIN}") from None
    except OSError as error:
        raise PolicyError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from None
    _check_content(path, data)
    return data


def _bounded(path: Path, limit: int) -> bytes:
    # A pipe must not block, and a link that was put in place a moment ago must not be followed.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise PolicyError(f"{path} is no plain file: {_AGAIN}")
        data = b"" if found.st_size > limit else file.read(limit + 1)
    if found.st_size > limit or len(data) > limit:
        raise PolicyError(
            f"{path} is too large ({max(found.st_size, len(data)):,} bytes; at most {limit:,} are read): a policy is a "
            "small network, export one"
        )
    return data


def _check_content(path: Path, data: bytes) -> None:
    if not data.strip():
        raise PolicyError(f"{path} is empty: {_AGAIN}")
    if data.startswith(b"version https://git-lfs"):
        raise PolicyError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise PolicyError(f"{path} is a web page, not the file itself: download it by its raw or `resolve` link")
