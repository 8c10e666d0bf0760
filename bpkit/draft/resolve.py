"""From what a user writes to a drafter that is bound to a target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from pydantic import BaseModel
from transformers import PreTrainedConfig, PreTrainedModel

from bpkit.draft.base import Drafter
from bpkit.policy import validated
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import first_option, parse_spec


def resolve_drafter(drafter: str | Mapping[str, Any], target: PreTrainedModel) -> Drafter:
    """Make a drafter from a registered name with options, or from a folder or Hub name of a model.

    `"ngram:max_ngram=4"`, `{"name": "autoregressive", "path": "some/folder"}`, `"z-lab/Qwen3-4B-DFlash-b16"`.

    Raises:
        PolicyError: unknown name or option. ValueError: a drafter that does not fit the target.
    """
    spec = parse_spec(drafter) if isinstance(drafter, str) else dict(drafter)
    name = str(spec.pop("name", ""))
    known = registry().drafters
    bare, path = spec.pop("", ""), spec.pop("path", "")
    if isinstance(drafter, str) and name not in known and not (path or bare) and _is_model(drafter):
        name, path = _kind_of_model(drafter), drafter
    if name not in known and "/" in str(drafter):
        raise ValueError(f"drafter {str(drafter)!r}: neither a folder with a config.json nor a model of that name")
    entry = registry().find("drafter", name)
    load, config = entry.load(), entry.load_config()
    if config is not None:
        if bare:
            spec = {first_option(config, name, what="drafter"): bare, **spec}
        return _configured(load, config, {**spec, "path": str(path)} if path else spec, name, target)
    path = path or bare
    accepted = [p for p in inspect.signature(load).parameters if p not in ("path", "target", "options")]
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(load).parameters.values()):
        return cast("Drafter", load(str(path), target, **spec))
    unknown = sorted(set(spec) - set(accepted))
    if unknown:
        raise ValueError(f"drafter {name!r}: unknown option {', '.join(unknown)}; accepted: {', '.join(accepted)}")
    return cast("Drafter", load(str(path), target, **spec))


def _configured(
    load: Callable[..., Any], config: type[BaseModel], options: dict[str, Any], name: str, target: PreTrainedModel
) -> Drafter:
    """Call a drafter's target with the options that were given, validated."""
    made = validated(config, options, owner=name, what="drafter")
    given = {option: getattr(made, option) for option in made.model_fields_set}
    return cast("Drafter", load(given.pop("path", ""), target, **given))


def _is_model(path: str) -> bool:
    try:
        PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError):
        return False
    return True


def _kind_of_model(path: str) -> str:
    """`block-diffusion` for checkpoints that call themselves DFlash, `autoregressive` for any other model."""
    config, _ = PreTrainedConfig.get_config_dict(path)
    named = any("dflash" in name.lower() for name in config.get("architectures") or ())
    return "block-diffusion" if named or config.get("dflash_config") else "autoregressive"
