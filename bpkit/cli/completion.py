"""What the shell is told at Tab: names of policies, drafters, observers, presets and the like. None imports torch.

A value with its help where there is one. What is no name, such as a path, is left to the shell, which lists files.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten

from rich.markup import escape

from bpkit.policy import PolicyError
from bpkit.registry.discovery import registry

Completions = list[tuple[str, str]]
MOST_OF_HELP = 70
"""Characters."""


def _told(text: str) -> str:
    """Help that stays on one line: Typer renders it as Rich markup, 80 columns wide."""
    return escape(shorten(text, MOST_OF_HELP, placeholder=" ..."))


def names(kind: str) -> Callable[[], Completions]:
    """Completes names of policies, drafters, observers or engines alone, as for `bpkit policies`."""

    def complete() -> Completions:
        entries = registry().of_kind(kind)
        return [(name, _told(entries[name].summary)) for name in sorted(entries)]

    return complete


def specs(kind: str) -> Callable[[str], Completions]:
    """Completes names of policies, drafters or observers and, after `name:`, the options of that one."""

    def complete(incomplete: str) -> Completions:
        name, colon, given = incomplete.partition(":")
        if not colon:
            return names(kind)()
        try:
            config = registry().find(kind, name).load_config()
        except PolicyError:  # a path, a name that nobody has, or options that do not load
            return []
        before, comma, _ = given.rpartition(",")
        fields = config.model_fields if config else {}
        return [(f"{name}:{before}{comma}{key}=", _told(field.description or "")) for key, field in fields.items()]

    return complete


policies, drafters, observers = specs("policy"), specs("drafter"), specs("observer")
engines = names("engine")


def plugin_choices() -> list[str]:
    """What `--plugin` takes of those that are installed."""
    names = sorted(registry().plugins)
    return [*names, *(f"no:{name}" for name in names)]


def presets() -> Completions:
    """Cost models that come with bpkit."""
    from bpkit.trace.cost.presets import PRESETS

    return [(name, _told(cost.description)) for name, cost in PRESETS.items()]


def checks() -> Completions:
    """What `bpkit check` looks at."""
    from bpkit.testing.checks.check import policy_checks

    return [(check.name, _told(check.summary)) for check in policy_checks()]


def rules() -> Completions:
    """How drafts are verified."""
    return [("coupled", "the text depends on prompt and seed alone"), ("rejection", "classic speculative sampling")]
