"""What is registered: the plug-ins that are wanted are loaded, and their hooks called in pluggy's order.

One that fails takes nobody along.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy
from pydantic import BaseModel

from bpkit.installation.distribution import DISTRIBUTION
from bpkit.names import did_you_mean
from bpkit.policy import PolicyError
from bpkit.registry import hookspecs
from bpkit.registry.class_file import module_of_file, names_file
from bpkit.registry.plugin_choice import NO_AUTOLOAD, OPTION, PluginChoice, choice_of

GROUP, OURS = "bpkit", DISTRIBUTION
"""The group of entry points, and the distribution whose plug-ins come with bpkit."""
HOOK_OF = {
    "policy": "bpkit_register_policies",
    "drafter": "bpkit_register_drafters",
    "observer": "bpkit_register_observers",
    "engine": "bpkit_register_engines",
}
_ATTRIBUTE_OF = {"policy": "policies", "drafter": "drafters", "observer": "observers", "engine": "engines"}
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Plugin:
    """One plug-in, loaded or not.

    Attributes:
        name: of its entry point, after its distribution and a colon if another has that name; or of its module.
        module: what is imported.
        distribution, version: empty for a module that is not installed as a plug-in.
    """

    name: str
    module: str
    load: Callable[[], object] = field(repr=False, compare=False)
    distribution: str = ""
    version: str = ""

    @property
    def names(self) -> set[str]:
        """What it may be called in `no:NAME`."""
        own = self.name.removeprefix(f"{self.distribution}:")
        return {own, f"{self.distribution}:{own}"} if self.distribution else {own}


@dataclass(frozen=True)
class Entry:
    """One registered name. `distribution` and `version` are empty for a plug-in that is not installed as one."""

    name: str
    target: str | Callable[..., Any]
    summary: str
    config: str
    plugin: str
    distribution: str
    version: str = ""

    @property
    def whose(self) -> str:
        """The plug-in and its distribution, for messages."""
        return f"plug-in {self.plugin!r}" + (f" of distribution {self.distribution!r}" if self.distribution else "")

    def load(self) -> Callable[..., Any]:
        """Import what the entry points at. Raises PolicyError if that fails."""
        return cast("Callable[..., Any]", _imported(self.target, self)) if isinstance(self.target, str) else self.target

    def load_config(self) -> type[BaseModel] | None:
        """Import the class of the options, without torch, or None if the plug-in names none."""
        return cast("type[BaseModel]", _imported(self.config, self)) if self.config else None


@dataclass
class Registry:
    """Everything that the plug-ins registered.

    Attributes:
        policies, drafters, observers, engines: by name.
        plugins: all that were found, by name, those that failed or are disabled included.
        failures: plug-in name -> why it could not be loaded.
        disabled: plug-in name -> what disabled it.
        conflicts: kind of entry and name -> those that claim it. Nobody has it.
        unheard: names that were to be disabled, which no plug-in has -> what says so.
    """

    manager: pluggy.PluginManager
    policies: dict[str, Entry] = field(default_factory=dict)
    drafters: dict[str, Entry] = field(default_factory=dict)
    observers: dict[str, Entry] = field(default_factory=dict)
    engines: dict[str, Entry] = field(default_factory=dict)
    plugins: dict[str, Plugin] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    disabled: dict[str, str] = field(default_factory=dict)
    conflicts: dict[tuple[str, str], list[Entry]] = field(default_factory=dict)
    unheard: dict[str, str] = field(default_factory=dict)

    def of_kind(self, kind: str) -> dict[str, Entry]:
        """The entries of `policy`, `drafter`, `observer` or `engine`, by name."""
        entries: dict[str, Entry] = getattr(self, _ATTRIBUTE_OF[kind])
        return entries

    def find(self, kind: str, name: str) -> Entry:
        """The `policy`, `drafter`, `observer` or `engine` of that name. Raises PolicyError with the known names."""
        known = self.of_kind(kind)
        if name in known:
            return known[name]
        claimed = self.conflicts.get((kind, name))
        if claimed is not None:
            raise PolicyError(explain_conflict(kind, claimed))
        listed = ", ".join(sorted(known)) or "none"
        said = [f"there is no {kind} {name!r}.{did_you_mean(name, known)} Known: {listed}."]
        said += [f"Plug-in {one!r} could not be loaded ({why})." for one, why in self.failures.items()]
        said += [f"Plug-in {one!r}, which may have it, is disabled by {how}." for one, how in self.disabled.items()]
        raise PolicyError(" ".join(said))

    def fail(self, plugin: str, reason: BaseException | str) -> None:
        """Note why a plug-in is not there, and forget its hooks."""
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        self.failures[plugin] = " ".join(text.split())
        if self.manager.has_plugin(plugin):
            self.manager.unregister(name=plugin)

    def calls(self, hook: str) -> list[pluggy.HookImpl]:
        """Implementations of a hook as pluggy calls them: `tryfirst` before all, else those registered last first."""
        return list(reversed(getattr(self.manager.hook, hook).get_hookimpls()))


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


def call(implementation: pluggy.HookImpl, **arguments: Any) -> None:
    """Call one implementation with those of the hook's arguments that it asks for."""
    implementation.function(*(arguments[name] for name in implementation.argnames))


def build(points: Sequence[EntryPoint] | None = None, choice: PluginChoice | None = None) -> Registry:
    """Load the plug-ins of entry-point group `bpkit`, or those given. One that fails is noted, not raised."""
    wanted = choice or PluginChoice()
    registry = Registry(pluggy.PluginManager(hookspecs.PROJECT))
    registry.manager.add_hookspecs(hookspecs)
    installed = list(_installed(entry_points(group=GROUP) if points is None else points))
    ours = [plugin for plugin in installed if plugin.distribution == OURS]
    theirs = [plugin for plugin in installed if plugin.distribution != OURS]
    for plugin in (*ours, *_named_modules(wanted, installed), *theirs):
        registry.plugins[plugin.name] = plugin
        how = _disabled(plugin, wanted)
        if how is not None:
            registry.disabled[plugin.name] = how
            registry.manager.set_blocked(plugin.name)
        else:
            _load(registry, plugin)
    known = {name for plugin in registry.plugins.values() for name in plugin.names}
    registry.unheard = {name: how for name, how in wanted.disabled.items() if name not in known}
    _collect(registry)
    return registry


def _installed(points: Sequence[EntryPoint]) -> Iterator[Plugin]:
    """A plug-in for each entry point, in the order of their names. The second of a name is called after its dist."""

    def place(point: EntryPoint) -> tuple[str, bool, str]:
        """By name; of one name, the plug-in that comes with bpkit first."""
        distribution = point.dist.name if point.dist else ""
        return point.name, distribution != OURS, distribution

    taken: set[str] = set()
    seen: set[tuple[str, str]] = set()
    for point in sorted(points, key=place):
        if (point.name, point.value) in seen:
            continue  # one module under one name: metadata of a distribution that was renamed and not uninstalled
        seen.add((point.name, point.value))
        distribution, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
        name = f"{distribution}:{point.name}" if point.name in taken else point.name
        taken.add(name)
        yield Plugin(name, point.value, point.load, distribution, version)


def _named_modules(choice: PluginChoice, installed: Sequence[Plugin]) -> Iterator[Plugin]:
    """Plug-ins for the modules that were named and are not installed as plug-ins."""
    known = {name for plugin in installed for name in plugin.names}
    for name in choice.named:
        if name not in known:
            yield Plugin(name, name, partial(_import, name, here=name in choice.from_flags))


def _import(module: str, *, here: bool) -> object:
    """A module by its name or its file; `here`: it may lie in the current folder."""
    if names_file(module):
        return module_of_file(module)
    if here and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing that is installed
    return importlib.import_module(module)


def _disabled(plugin: Plugin, choice: PluginChoice) -> str | None:
    """What keeps a plug-in from being loaded, or None."""
    for name in plugin.names & set(choice.disabled):
        return choice.disabled[name]
    is_named = bool(plugin.names & set(choice.named))
    return None if choice.autoload or is_named or plugin.distribution == OURS else NO_AUTOLOAD


def _load(registry: Registry, plugin: Plugin) -> None:
    """Import a plug-in and register its hooks with pluggy."""
    try:
        loaded = plugin.load()
        hookspecs.check_hooks(registry.manager, loaded)
        registry.manager.register(loaded, plugin.name)
    except (Exception, SystemExit) as error:  # a stranger's plug-in may fail in any way, and take nobody along
        registry.fail(plugin.name, error)


def _collect(registry: Registry) -> None:
    """Let the plug-ins register their entries, in the order of calls. Of one that fails half-way nothing counts."""
    found: dict[tuple[str, str, str], Entry] = {}
    for kind, hook in HOOK_OF.items():
        for implementation in registry.calls(hook):
            plugin = registry.plugins[implementation.plugin_name]
            try:
                call(implementation, register=_recorder(plugin, kind, found))
            except (Exception, SystemExit) as error:
                registry.fail(plugin.name, error)
    claims: dict[tuple[str, str], list[Entry]] = {}
    for (kind, name, _), entry in found.items():
        if entry.plugin not in registry.failures:
            claims.setdefault((kind, name), []).append(entry)
    for (kind, name), entries in claims.items():
        if len(entries) > 1:
            registry.conflicts[kind, name] = entries
        else:
            registry.of_kind(kind)[name] = entries[0]


def _recorder(plugin: Plugin, kind: str, found: dict[tuple[str, str, str], Entry]) -> hookspecs.Register:
    """What a plug-in's hook is handed: it notes entries under kind, name and plug-in."""

    def register(name: str, target: str | Callable[..., Any], *, summary: str, config: str = "") -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PolicyError(f"{name!r} is no name of a {kind}: letters, digits and . _ + - make one")
        if not (callable(target) or (isinstance(target, str) and ":" in target)):
            raise PolicyError(f"target {target!r} of {kind} {name!r} is neither 'module:Class' nor callable")
        if (kind, name, plugin.name) in found:
            raise PolicyError(f"it registers {kind} {name!r} twice")
        origin = (plugin.name, plugin.distribution, plugin.version)
        found[kind, name, plugin.name] = Entry(name, target, summary, config, *origin)

    return register


def explain_conflict(kind: str, claimed: Sequence[Entry]) -> str:
    """Who claims one name, and how to settle it."""
    who = " and by ".join(entry.whose for entry in claimed)
    how = " or ".join(f"`{OPTION} no:{entry.plugin}`" for entry in claimed)
    return f"{kind} {claimed[0].name!r} is registered twice: by {who}; disable one with {how}, or uninstall one"


def _imported(target: str, entry: Entry) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
    except Exception as error:
        raise PolicyError(
            f"{entry.name!r} of {entry.whose} points at {target!r}, which cannot be "
            f"imported: {type(error).__name__}: {error}"
        ) from error
