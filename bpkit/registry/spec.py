"""How a policy's class is named where a policy is asked for, so that messages can say what to type."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bpkit.policy import Policy


def snake_case(name: str) -> str:
    """A class name as policies are called.

    >>> snake_case("MyPolicy"), snake_case("SpecDecPP2")
    ('my_policy', 'spec_dec_pp2')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def name_of(kind: type[Policy]) -> str:
    """The name of a policy: its attribute `name`, else its class in small letters."""
    name = getattr(kind, "name", None)
    return name if isinstance(name, str) and name else snake_case(kind.__name__)


def registered_by_another(kind: type[Policy]) -> str | None:
    """The distribution whose plug-in registers the policy's name for another class, or None."""
    from bpkit.registry.resolve import registry

    entry = registry().policies.get(name_of(kind))
    if entry is None:
        return None
    made = entry.load()
    related = not isinstance(made, type) or issubclass(kind, made)
    return None if related else entry.distribution


def spec_of(kind: type[Policy]) -> str:
    """What to type for a class: the name that it is registered under, or `./file.py:ClassName`.

    A path below the working directory is relative to it.
    """
    from bpkit.registry.resolve import registry

    entry = registry().policies.get(name_of(kind))
    if entry is not None and entry.load() is kind:
        return entry.name
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or "." in kind.__module__:  # a module of a package cannot be read on its own
        return name_of(kind)
    path, here = Path(file).resolve(), Path.cwd()
    shown = f"./{path.relative_to(here)}" if path.is_relative_to(here) else str(path)
    return f"{shown}:{kind.__name__}"


def with_weights(spec: str, folder: str | Path) -> str:
    """What to type for a policy with the weights of a folder.

    >>> with_weights("./mine.py:Mine", "runs/mine"), with_weights("forecast", "mine")
    ('./mine.py:Mine:runs/mine', './mine')
    """
    from bpkit.registry.class_file import names_file, split_file

    if names_file(spec):
        return f"{split_file(spec)[0]}:{folder}"
    # A bare name that a plug-in registers would be taken for that policy.
    return str(folder) if "/" in str(folder) else f"./{folder}"
