"""The hooks that a plug-in may implement, in a module named by an entry point of group `bpkit`.

No hook chooses a block size: hooks register things by name, and one named policy decides.
Hook modules are imported whenever bpkit lists what is there, so they must import neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import typer

PROJECT = "bpkit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """The callback that the register hooks are handed."""

    def __call__(self, name: str, target: str | Callable[..., Any], *, summary: str, config: str = "") -> None:
        """Register `name`.

        Args:
            name: what users write in a config file; unique over all installed plug-ins. Letters, digits, `. _ + -`.
            target: `"module:Class"`, imported only when used, or a callable that takes the options.
            summary: one line: what it does and, for a policy, what it decides and when.
            config: `"module:Config"` of the options, importable without torch; shown by `bpkit policies`.

        Raises:
            PolicyError: one of these will not do. A plug-in that lets it pass registers nothing.
        """
        ...


@hookspec
def bpkit_register_policies(register: Register) -> None:
    """Call `register` for each policy. The target is a `bpkit.Policy` subclass."""


@hookspec
def bpkit_register_drafters(register: Register) -> None:
    """Call `register` for each drafter kind. The target is called with `(path, target_model, **options)`."""


@hookspec
def bpkit_register_observers(register: Register) -> None:
    """Call `register` for each observer of steps. The target is a `bpkit.decode.observers.Observer` subclass."""


@hookspec
def bpkit_register_commands(app: typer.Typer) -> None:
    """Add commands to the `bpkit` command line."""
