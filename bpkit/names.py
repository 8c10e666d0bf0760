"""Names: what a mistyped one may have meant, what a class is called, and those of a package that are imported late."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is nearest, after a blank; empty if none is near.

    >>> did_you_mean("fixd", ["threshold", "fixed"]), did_you_mean("xyz", ["fixed"])
    (" Did you mean 'fixed'?", '')
    """
    near = difflib.get_close_matches(name, [str(one) for one in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def snake_case(name: str) -> str:
    """A class name as policies are called.

    >>> snake_case("MyPolicy"), snake_case("SpecDecPP2")
    ('my_policy', 'spec_dec_pp2')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def imported_late(package: str, names: Sequence[str], *homes: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package: each of `names` is looked for in its modules `homes`, as far as is needed."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        modules = (import_module(f"{package}.{home}") for home in homes)
        return next(getattr(module, name) for module in modules if hasattr(module, name))

    return find
