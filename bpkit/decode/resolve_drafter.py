"""From what a user writes to a drafter that is bound to a target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from bpkit.assets import drafter_path
from bpkit.decode.drafter import Drafter
from bpkit.decode.sources import Sources, sources_of, work_of_drafter
from bpkit.decode.two_devices import EmbeddingAndHead, OtherDevice
from bpkit.policy import validated
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import each_drafter, first_option, parse_spec


def resolve_drafters(drafter: Any, target: PreTrainedModel, device: torch.device | None = None) -> Drafter:
    """One drafter, or several as `Sources`: of each an instance, or what `resolve_drafter` takes.

    Args:
        device: where those with a model are to work, if not with the target.

    Raises:
        PolicyError, ValueError: as `resolve_drafter`; one of several that holds several itself; an instance that works
            elsewhere than on `device`.
    """
    parts = None if device is None else EmbeddingAndHead(target, device)
    made = [
        _on(resolve_drafter(each, parts or target), device)
        if isinstance(each, (str, Mapping))
        else cast("Drafter", each)
        for each in each_drafter(drafter)
    ]
    if device is not None:
        _refuse_elsewhere(made, device)
    return made[0] if len(made) == 1 else Sources(made)


def _on(drafter: Drafter, device: torch.device | None) -> Drafter:
    """A drafter with a model that was made for a device."""
    return drafter if device is None or work_of_drafter(drafter).free else OtherDevice(drafter, device)


def _refuse_elsewhere(drafters: Sequence[Drafter], device: torch.device) -> None:
    for drafter in (source for each in drafters for source in sources_of(each)):
        if not work_of_drafter(drafter).free and getattr(drafter, "device", None) != device:
            raise ValueError(
                f"drafter {drafter.name} was handed over as an object, and drafter_device={str(device)!r} places those "
                "that are named: name it, or make a bpkit.decode.two_devices.OtherDevice of it"
            )


def resolve_drafter(drafter: str | Mapping[str, Any], target: PreTrainedModel | EmbeddingAndHead) -> Drafter:
    """Make a drafter from a registered name with options, or from a folder or Hub name of a model.

    `"ngram:max_ngram=4"`, `{"name": "autoregressive", "path": "some/folder"}`, `"z-lab/Qwen3-4B-DFlash-b16"`.

    Raises:
        PolicyError: unknown name or option. ValueError: a drafter that does not fit the target.
    """
    options = parse_spec(drafter) if isinstance(drafter, str) else dict(drafter)
    name, bare = str(options.pop("name", "")), options.pop("", "")
    path = str(options.pop("path", None) or "")
    known = registry().drafters
    if isinstance(drafter, str) and name not in known and not (path or bare):
        model = drafter_path(drafter, "", "drafter")
        if kind := _kind_of_model(model):
            name, path = kind, model
    if name not in known and "/" in str(drafter):
        raise ValueError(f"drafter {str(drafter)!r}: neither a folder with a config.json nor a model of that name")
    entry = registry().find("drafter", name)
    load, config = entry.load(), entry.load_config()
    if config is None:
        path = path or str(bare)
        _refuse_unknown(load, options, name)
    else:
        if bare:
            options = {first_option(config, name, what="drafter"): bare, **options}
        made = validated(config, {**options, "path": path} if path else options, owner=name, what="drafter")
        options = {option: getattr(made, option) for option in made.model_fields_set}
        path = options.pop("path", "")
    return cast("Drafter", load(path, target, **options))


def _refuse_unknown(load: Callable[..., Any], options: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for an option that a drafter's target does not take, if it does not take any."""
    parameters = inspect.signature(load).parameters.values()
    accepted = [p.name for p in parameters if p.name not in ("path", "target", "options")]
    unknown = sorted(set(options) - set(accepted))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"drafter {name!r}: unknown option {', '.join(unknown)}; accepted: {', '.join(accepted)}")


def _kind_of_model(path: str) -> str | None:
    """By what a checkpoint calls itself: DFlash, an early exit, or else `autoregressive`; None of no model."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError):
        return None
    if "EarlyExitLayer" in (config.get("architectures") or ()):
        return "early-exit"
    named = any("dflash" in name.lower() for name in config.get("architectures") or ())
    return "block-diffusion" if named or config.get("dflash_config") else "autoregressive"
