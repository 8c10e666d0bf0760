"""Optional parts of bpkit: which there are, and what of each is not installed. As the installed metadata has it."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bpkit.installation.distribution import DISTRIBUTION

INSTEAD = {"onnxruntime": "onnxruntime-gpu"}
"""Does as well, and must not be installed beside it."""
_FOR_AUTHORS = "dev"


def extras() -> list[str]:
    """Names, without those for whoever works on bpkit itself."""
    found = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return [str(name) for name in found if name != _FOR_AUTHORS]


def missing(extra: str) -> list[str]:
    """Requirements of an extra, those of extras that it names included, that nothing installed meets."""
    found: dict[str, None] = {}
    for requirement in _of_extra(extra, set()):
        if not _met(requirement):
            found[f"{requirement.name}{requirement.specifier}"] = None
    return list(found)


def _of_extra(extra: str, seen: set[str]) -> list[Requirement]:
    seen.add(extra)
    found: list[Requirement] = []
    for text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or not marker.evaluate({"extra": extra}):
            continue
        if canonicalize_name(requirement.name) == DISTRIBUTION:
            for other in sorted(requirement.extras - seen):
                found += _of_extra(other, seen)
        else:
            found.append(requirement)
    return found


def _met(requirement: Requirement) -> bool:
    name = canonicalize_name(requirement.name)
    for distribution in (name, INSTEAD.get(name)):
        if distribution is None:
            continue
        try:
            return requirement.specifier.contains(metadata.version(distribution), prereleases=True)
        except metadata.PackageNotFoundError:
            continue
    return False
