"""The hooks that a plug-in may implement, in a module named by an entry point of group `bpkit`.

No hook chooses a block size: hooks register things by name, and one named policy decides.
Hook modules are imported whenever bpkit lists what is there, so they must import neither torch nor transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from bpkit.names import did_you_mean
from bpkit.policy import PolicyError

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
def bpkit_register_engines(register: Register) -> None:
    """Call `register` for each engine that `bpkit calibrate --engine` can time. The target is a function that does."""


@hookspec
def bpkit_register_commands(app: typer.Typer) -> None:
    """Add commands to the `bpkit` command line."""


def check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Refuse hooks that pluggy would pass over or take without a word; arguments it checks itself.

    Raises:
        PolicyError: a hook without `@hookimpl`, one that does not exist, or a wrapper.
    """
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            is_function = inspect.isfunction(function) or isinstance(function, (staticmethod, classmethod))
            if is_function and name.startswith("bpkit_register") and not hasattr(function, "bpkit_spec"):
                raise PolicyError(f"{name} is not marked as a hook: put @bpkit.hookimpl before it")
            continue
        hook = options.get("specname") or name
        if not options.get("optionalhook"):
            check_hook_name(hook)
        if options.get("wrapper") or options.get("hookwrapper"):
            raise PolicyError(f"{name} is a wrapper, with nothing to wrap: each plug-in's hooks are called alone")


def check_hook_name(hook: str) -> None:
    """Raise PolicyError unless there is a hook of that name."""
    known = hook_arguments()
    if hook not in known:
        raise PolicyError(f"there is no hook {hook!r}.{did_you_mean(hook, known)} The hooks are: {', '.join(known)}")


def hook_arguments() -> dict[str, tuple[str, ...]]:
    """Every hook with the names of its arguments."""
    specified = {name: hook for name, hook in globals().items() if hasattr(hook, f"{PROJECT}_spec")}
    return {name: tuple(inspect.signature(hook).parameters) for name, hook in specified.items()}
