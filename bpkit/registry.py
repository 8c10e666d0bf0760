"""Finds plug-ins, resolves names to policies and drafters, and explains what went wrong."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

import pluggy

from bpkit import hookspecs
from bpkit.policy import Policy, PolicyConfig, PolicyError, validated
from bpkit.policy_folder import is_policy_folder


@dataclass(frozen=True)
class Entry:
    """One registered name."""

    name: str
    target: str | Callable[..., Any]
    summary: str
    config: str
    plugin: str
    distribution: str

    def load(self) -> Callable[..., Any]:
        """Import what the entry points at. Raises PolicyError if that fails."""
        return cast("Callable[..., Any]", _imported(self.target, self)) if isinstance(self.target, str) else self.target

    def load_config(self) -> type[PolicyConfig] | None:
        """Import the class of the options, without torch, or None if the plug-in names none."""
        return cast("type[PolicyConfig]", _imported(self.config, self)) if self.config else None


@dataclass
class Registry:
    """Everything that the installed plug-ins registered.

    Attributes:
        policies, drafters: by name.
        failures: plug-in name -> why it could not be loaded.
    """

    manager: pluggy.PluginManager
    policies: dict[str, Entry] = field(default_factory=dict)
    drafters: dict[str, Entry] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def build(points: list[EntryPoint] | None = None) -> Registry:
    """Load the plug-ins of entry-point group `bpkit`, or those given. One that fails is noted, not raised.

    Raises:
        PolicyError: two plug-ins claim one name.
    """
    registry = Registry(pluggy.PluginManager(hookspecs.PROJECT))
    registry.manager.add_hookspecs(hookspecs)
    for point in sorted(points if points is not None else entry_points(group="bpkit"), key=lambda p: p.name):
        name = point.name if not registry.manager.has_plugin(point.name) else f"{_distribution(point)}:{point.name}"
        found: dict[str, list[Entry]] = {}
        try:
            plugin = point.load()
            registry.manager.register(plugin, name)
            registry.manager.check_pending()
            found = _collect(plugin, point)
        except (Exception, SystemExit) as error:  # a stranger's plug-in may fail in any way, and take nobody along
            registry.failures[name] = f"{type(error).__name__}: {error}"
            if registry.manager.has_plugin(name):
                registry.manager.unregister(name=name)
        _add(registry.policies, found.get("bpkit_register_policies", []))
        _add(registry.drafters, found.get("bpkit_register_drafters", []))
    return registry


@cache
def registry() -> Registry:
    """The registry of this process."""
    return build()


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "?"


def _collect(plugin: object, point: EntryPoint) -> dict[str, list[Entry]]:
    """What the plug-in's hooks register, by hook. Nothing counts if one of them fails half-way."""
    found: dict[str, list[Entry]] = {}
    for hook in ("bpkit_register_policies", "bpkit_register_drafters"):
        entries = found.setdefault(hook, [])

        def register(
            name: str,
            target: str | Callable[..., Any],
            *,
            summary: str,
            config: str = "",
            entries: list[Entry] = entries,
        ) -> None:
            entries.append(Entry(name, target, summary, config, point.name, _distribution(point)))

        if hasattr(plugin, hook):
            getattr(plugin, hook)(register=register)
    return found


def _add(known: dict[str, Entry], entries: list[Entry]) -> None:
    for entry in entries:
        if entry.name in known:
            other = known[entry.name]
            raise PolicyError(
                f"{entry.name!r} is registered twice: by plug-in {other.plugin!r} of distribution "
                f"{other.distribution!r} and by {entry.plugin!r} of {entry.distribution!r}; uninstall one of them"
            )
        known[entry.name] = entry


def _imported(target: str, entry: Entry) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
    except Exception as error:
        raise PolicyError(
            f"{entry.name!r} of distribution {entry.distribution!r} points at {target!r}, which cannot be "
            f"imported: {type(error).__name__}: {error}"
        ) from error


def find(known: Mapping[str, Entry], name: str, *, what: str) -> Entry:
    """The entry of that name. Raises PolicyError that lists the known names and the nearest."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    failed = "".join(f" Plug-in {n!r} could not be loaded ({why})." for n, why in registry().failures.items())
    raise PolicyError(f"there is no {what} {name!r}.{hint} Known: {', '.join(sorted(known))}.{failed}")


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
        return made(validated(made.Config, options, owner=name))
    result = made(**options)
    if not isinstance(result, Policy):
        raise PolicyError(f"policy {name!r} is not a bpkit.Policy but a {type(result).__name__}")
    return result


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
        spec = {_first_option(made.Config, name, skip="weights" if in_folder is not None else ""): value, **spec}
    return made, spec, name


def _named(name: str) -> tuple[Callable[..., Any], str | None]:
    """What a name stands for, and the folder of its weights if it is the path of one."""
    policies = registry().policies
    if ".py:" in name:
        return _class_of_file(name), None
    if name in policies or not _is_path(name):
        return find(policies, name, what="policy").load(), None
    from bpkit.trained import class_of_folder

    folder = Path(name).expanduser()
    return class_of_folder(folder), str(folder)


def _is_path(name: str) -> bool:
    return "/" in name or name.startswith((".", "~")) or is_policy_folder(name)


def parse_spec(text: str) -> dict[str, Any]:
    """Split the command-line form of a policy or drafter into name and options.

    A bare value stands under the key `""` and sets the first option.

    >>> parse_spec("threshold:0.6,block_size=8")
    {'name': 'threshold', '': '0.6', 'block_size': '8'}
    """
    if ".py:" in text:
        path, _, rest = text.partition(".py:")
        head, _, tail = rest.partition(":")
        spec: dict[str, Any] = {"name": f"{path}.py:{head}"}
    else:
        head, _, tail = text.partition(":")
        spec = {"name": head}
    for part in filter(None, tail.split(",")):
        key, equals, value = part.partition("=")
        spec.update({key.strip(): value.strip()} if equals else {"": part.strip()})
    return spec


def _first_option(config: type[PolicyConfig], name: str, *, skip: str) -> str:
    """The option that a bare value sets: the first but `skip`."""
    for option in config.model_fields:
        if option != skip:
            return option
    raise PolicyError(f"policy {name!r} takes no options")


def _class_of_file(spec: str) -> type[Policy]:
    path_text, _, class_name = spec.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise PolicyError(f"there is no file {path_text!r} (policy {spec!r})")
    module_name = f"bpkit_file_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise PolicyError(f"{path_text} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, Policy):
        return found
    classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Policy) and v is not Policy]
    raise PolicyError(f"{path_text} has no policy class {class_name!r}; it has: {', '.join(classes) or 'none'}")
