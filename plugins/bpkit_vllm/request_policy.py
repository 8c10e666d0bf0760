"""Which policies a request may name: registered ones, with options that name no files. Clients are not trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_origin

from bpkit.policy import PolicyConfig, PolicyError, validated
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import class_and_options, parse_spec


def check_named_by_request(text: Any) -> None:
    """Raise PolicyError for what may not come from a request: other values than text, files, folders.

    What the options of the engine list under `policies` may be named whatever it is.
    """
    if not isinstance(text, str):
        raise PolicyError(f"write a policy as text, such as fixed:4, not {type(text).__name__}")
    name = parse_spec(text)["name"]
    registry().find("policy", name)
    make, options, _ = class_and_options(text)
    config: type[PolicyConfig] = getattr(make, "Config", PolicyConfig)
    given = validated(config, options, owner=name)
    for option in given.model_fields_set:
        is_choice = get_origin(config.model_fields[option].annotation) is Literal
        if isinstance(getattr(given, option), (str, Path)) and not is_choice:
            raise PolicyError(
                f"option {option!r} of {name!r} may not come from a request, for it may name a file: list {text!r} "
                "under `policies` in the options of the engine"
            )
