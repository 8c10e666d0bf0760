"""What pip calls bpkit, the command that installs an extra of it, and what is installed, by the metadata."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib import metadata

DISTRIBUTION = "block-policy-kit"
"""As in `pyproject.toml`. The import and the command are called `bpkit`, which on PyPI is another project."""
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install one and the same package `onnxruntime`."""


def requirement(*extras: str) -> str:
    """As a list of dependencies has it.

    >>> requirement(), requirement("onnx", "traces")
    ('block-policy-kit', 'block-policy-kit[onnx,traces]')
    """
    return f"{DISTRIBUTION}[{','.join(extras)}]" if extras else DISTRIBUTION


def install_command(*extras: str) -> str:
    """What to type for these extras.

    >>> install_command("traces")
    "pip install 'block-policy-kit[traces]'"
    """
    return f"pip install {shlex.quote(requirement(*extras))}"


def installed(distribution: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def onnxruntimes() -> dict[str, str]:
    """Version by name of those that are installed."""
    return {name: version for name in ONNXRUNTIMES if (version := installed(name)) is not None}


def extras() -> list[str]:
    """Names, without those for whoever works on bpkit itself."""
    return [name for name in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or [] if name != "dev"]


def missing(extra: str) -> list[str]:
    """Requirements of an extra, those of extras that it names included, that nothing installed meets."""
    return list(dict.fromkeys(_missing(extra, set())))


def _missing(extra: str, seen: set[str]) -> Iterator[str]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen.add(extra)
    for needed in map(Requirement, metadata.requires(DISTRIBUTION) or []):
        if needed.marker is None or not needed.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        if name == DISTRIBUTION:
            for other in sorted(needed.extras - seen):
                yield from _missing(other, seen)
            continue
        version = installed(name)
        if version is None and name == ONNXRUNTIMES[0]:  # the other does as well, and must not be installed beside it
            version = installed(ONNXRUNTIMES[1])
        if version is None or not needed.specifier.contains(version, prereleases=True):
            yield f"{needed.name}{needed.specifier}"
