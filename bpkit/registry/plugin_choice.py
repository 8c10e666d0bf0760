"""Which plug-ins are wanted: `--plugin` before the command, and two variables of the environment, as in pytest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

OPTION = "--plugin"
PLUGINS, NO_AUTOLOAD = "BPKIT_PLUGINS", "BPKIT_DISABLE_PLUGIN_AUTOLOAD"
"""Names separated by commas, each as `--plugin` takes it; and, if set, only bpkit's own and named ones are loaded."""


@dataclass(frozen=True)
class PluginChoice:
    """What the user said of plug-ins.

    Attributes:
        disabled: names that are not to be loaded -> what says so.
        named: names that are to be loaded, plug-ins or modules that are not installed as one -> what says so.
        from_flags: those of `named` that the command line names; their modules may lie in the current folder.
        autoload: load what entry points name.
    """

    disabled: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    from_flags: frozenset[str] = frozenset()
    autoload: bool = True


def choice_of(flags: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> PluginChoice:
    """The choice that flags and environment make. The last word on a name counts, and flags come last.

    >>> choice_of(["no:bandit", "my_module"], {}).disabled
    {'bandit': '--plugin no:bandit'}
    """
    stated = os.environ if environment is None else environment
    said = [(spec.strip(), f"{PLUGINS}={spec.strip()}") for spec in stated.get(PLUGINS, "").split(",")]
    said += [(spec, f"{OPTION} {spec}") for spec in flags]
    disabled: dict[str, str] = {}
    named: dict[str, str] = {}
    for spec, how in said:
        name = spec.removeprefix("no:")
        if name:
            for kind in (disabled, named):
                kind.pop(name, None)
            (named if name == spec else disabled)[name] = how
    autoload = stated.get(NO_AUTOLOAD, "") in ("", "0")
    return PluginChoice(disabled, named, frozenset(named).intersection(flags), autoload)


def plugin_flags(arguments: Iterable[str]) -> list[str]:
    """Values of `--plugin` among the options before the command.

    The commands of plug-ins are part of the command line, so that this is asked before it can be parsed.

    >>> plugin_flags(["--debug", "--plugin", "no:bandit", "--plugin=mine", "policies", "--plugin", "late"])
    ['no:bandit', 'mine']
    """
    found, rest = [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == OPTION:
            found.append(value if equals else next(rest, ""))
        elif not argument.startswith("-") or argument in ("-", "--"):
            break
    return [value for value in found if value]
