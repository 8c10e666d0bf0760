"""Resolves names to policies, drafters and observers, and explains what went wrong."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bpkit.learn.folder import is_policy_folder
from bpkit.policy import Policy, PolicyConfig, PolicyError, validated
from bpkit.registry.class_file import class_of_file, names_file, split_file
from bpkit.registry.discovery import Entry, Registry, build, explain_conflict
from bpkit.registry.plugin_choice import choice_of

__all__ = [
    "Entry",
    "PolicyLike",
    "Registry",
    "build",
    "check_policy_name",
    "choose_plugins",
    "find",
    "first_option",
    "parse_spec",
    "plugins_that_are_not_there",
    "policy_class",
    "registry",
    "resolve_policy",
    "written",
]


_flags: list[str] = []
"""Values of `--plugin` of this process."""


@cache
def registry() -> Registry:
    """The registry of this process."""
    return build(choice=choice_of(_flags))


def choose_plugins(flags: Sequence[str]) -> None:
    """Take the values of `--plugin` that a command was given, on top of the environment's."""
    if list(flags) != _flags:
        _flags[:] = flags
        registry.cache_clear()


def find(known: Mapping[str, Entry], name: str, *, what: str) -> Entry:
    """The entry of that name. Raises PolicyError that lists the known names and the nearest."""
    if name in known:
        return known[name]
    claimed = registry().conflicts.get((what, name))
    if claimed is not None:
        raise PolicyError(explain_conflict(what, claimed))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(sorted(known)) or "none"
    raise PolicyError(f"there is no {what} {name!r}.{hint} Known: {listed}.{plugins_that_are_not_there()}")


def plugins_that_are_not_there() -> str:
    """Sentences on plug-ins that failed or are disabled, one of which may have what was not found."""
    known = registry()
    said = [f" Plug-in {name!r} could not be loaded ({why})." for name, why in known.failures.items()]
    said += [f" Plug-in {name!r}, which may have it, is disabled by {how}." for name, how in known.disabled.items()]
    return "".join(said)


PolicyLike = Policy | str | Mapping[str, Any]


def resolve_policy(policy: PolicyLike) -> Policy:
    """Make a policy from an instance, a name, `name:value`, `name:key=value,...`, `./file.py:Class` or a mapping.

    Where a name stands, the path of a trained policy's folder may stand as well; options come on top of those stored.

    >>> resolve_policy("fixed:4")
    Fixed(block_size=4)
    >>> resolve_policy({"name": "fixed", "block_size": 8})
    Fixed(block_size=8)

    Raises:
        PolicyError: the name or an option is unknown; the message lists what there is.
    """
    if isinstance(policy, Policy):
        return policy
    made, options, name = policy_class(policy)
    if isinstance(made, type) and issubclass(made, Policy):
        config = validated(made.Config, options, owner=name)
        _check_constructor(made, config)
        return made(config)
    result = made(**options)
    if not isinstance(result, Policy):
        raise PolicyError(f"policy {name!r} is not a bpkit.Policy but a {type(result).__name__}")
    return result


def check_policy_name(policy: PolicyLike) -> None:
    """Raise PolicyError for a mistyped name or option of a registered policy, before anything heavy is imported."""
    if isinstance(policy, Policy):
        return
    spec = parse_spec(policy) if isinstance(policy, str) else dict(policy)
    name = str(spec.pop("name", ""))
    if not name or names_file(name) or (name not in registry().policies and _is_path(name)):
        return
    config = find(registry().policies, name, what="policy").load_config()
    if config is not None and "" not in spec:  # what a bare value sets, `resolve_policy` knows
        validated(config, spec, owner=name)


def _check_constructor(made: type[Policy], config: PolicyConfig) -> None:
    try:
        inspect.signature(made).bind(config)
    except TypeError:
        raise PolicyError(
            f"policy {made.__name__} cannot be made: leave its __init__ out, or let it be __init__(self, config=None, "
            "**options) and call super().__init__(config, **options)"
        ) from None


def policy_class(policy: str | Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any], str]:
    """What `resolve_policy` would call, the options that it would give, and the name. Raises PolicyError."""
    spec = parse_spec(policy) if isinstance(policy, str) else dict(policy)
    if "name" not in spec:
        raise PolicyError(f"a policy given as a mapping needs a 'name', as in {{'name': 'fixed'}}; got {spec}")
    name, value = str(spec.pop("name")), spec.pop("", None)
    made, in_folder = _named(name)
    if in_folder is not None:
        if "weights" in spec:
            raise PolicyError(f"policy {name!r} is a folder with weights; leave out option 'weights'")
        spec = {"weights": in_folder, **spec}
    if value is not None and isinstance(made, type) and issubclass(made, Policy):
        spec = {first_option(made.Config, name, skip="weights" if in_folder is not None else ""): value, **spec}
    return made, spec, name


def _named(name: str) -> tuple[Callable[..., Any], str | None]:
    """What a name stands for, and the folder of its weights if it is the path of one."""
    policies = registry().policies
    if names_file(name):
        return class_of_file(name, Policy), None
    if name in policies or not _is_path(name):
        return find(policies, name, what="policy").load(), None
    from bpkit.learn.trained import class_of_folder

    folder = Path(name).expanduser()
    return class_of_folder(folder), str(folder)


def _is_path(name: str) -> bool:
    return "/" in name or name.startswith((".", "~")) or is_policy_folder(name)


def written(policy: PolicyLike) -> str:
    """A policy as it would be typed; of an instance, the name of its class.

    >>> written({"name": "threshold", "threshold": 0.6, "block_size": 8})
    'threshold:threshold=0.6,block_size=8'
    """
    if isinstance(policy, Policy):
        return type(policy).__name__
    if isinstance(policy, str):
        return policy
    name, rest = str(policy.get("name", "")), {k: v for k, v in policy.items() if k != "name"}
    return name + (":" + ",".join(f"{k}={v}" for k, v in rest.items()) if rest else "")


def parse_spec(text: str) -> dict[str, Any]:
    """Split the command-line form of a policy or drafter into name and options.

    A bare value stands under the key `""` and sets the first option.

    >>> parse_spec("threshold:0.6,block_size=8")
    {'name': 'threshold', '': '0.6', 'block_size': '8'}
    """
    head, tail = split_file(text) if names_file(text) else text.partition(":")[::2]
    spec: dict[str, Any] = {"name": head}
    for part in filter(None, tail.split(",")):
        key, equals, value = part.partition("=")
        spec.update({key.strip(): value.strip()} if equals else {"": part.strip()})
    return spec


def first_option(config: type[BaseModel], name: str, *, skip: str = "", what: str = "policy") -> str:
    """The option that a bare value sets: the first but `skip`. Raises PolicyError if there is none."""
    for option in config.model_fields:
        if option != skip:
            return option
    raise PolicyError(f"{what} {name!r} takes no options")
