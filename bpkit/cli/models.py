"""From a config to a decoder: what `generate`, `bench` and `demo` begin with. Imports torch when called."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpkit.assets import model_path
from bpkit.assets.known import KNOWN
from bpkit.cli.terminal import say
from bpkit.config import Config
from bpkit.prompts import Prompt
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import each_drafter, parse_spec

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.decode.observers import ObserverLike
    from bpkit.registry.resolve import PolicyLike


def load_decoder(
    config: Config, policy: PolicyLike | None = None, *, observers: Sequence[ObserverLike] = ()
) -> SpeculativeDecoder:
    """Load target and drafter, under `policy`, the config's, or the default.

    Args:
        observers: made before any weights are read. Whoever turns some on closes the decoder.

    Raises:
        ValueError, FileNotFoundError: something named in the config cannot be used.
    """
    from bpkit.registry.resolve import check_policy_name, resolve_policy

    chosen = policy or config.policy or "fixed"
    check_policy_name(chosen)  # takes no time, while torch takes seconds
    if config.target is not None:
        model_path(config.target)
    for name in (config.target, *each_drafter(config.drafter)):
        if isinstance(name, str) and name.startswith((".", "/", "~")) and not Path(name).is_dir():  # no Hub name either
            raise FileNotFoundError(f"there is no folder {name!r}; name the folder of a model, or a model on the Hub")
    quiet_libraries()
    import torch

    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.decode.observers import Observers
    from bpkit.trace.cost import read_cost

    if isinstance(config.runtime.threads, int):
        torch.set_num_threads(config.runtime.threads)
    resolve_policy(chosen)  # a mistyped policy is told before any weights are read
    cost = read_cost(config.runtime.cost) if config.runtime.cost is not None else None
    check_device(config.runtime.device)
    check_device(config.runtime.drafter_device, "--drafter-device")
    announce_downloads(config)
    watchers = Observers(observers)
    try:
        return SpeculativeDecoder.from_pretrained(
            config.target,
            config.drafter,
            chosen,
            **config.runtime.model_dump(include={"dtype", "device", "rule", "capture", "products", "drafter_device"}),
            cost=cost,
            observers=watchers,
        )
    except BaseException as error:
        watchers.close()
        if isinstance(error, FileNotFoundError) or not isinstance(error, OSError):
            raise
        # What transformers raises for names that it cannot find.
        names = ", ".join(str(name) for name in (config.target, config.drafter) if name)
        raise ValueError(f"cannot load {names or 'the shipped pair'}: {error}") from error


def in_chat(decoder: SpeculativeDecoder, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as they are decoded: a user's message by the chat template of the target's tokenizer.

    Raises:
        ValueError: there is a message, and no chat template.
    """
    from bpkit.assets import model_name
    from bpkit.decode.chat import as_chat

    tokenizer, target = decoder.tokenizer, model_name(decoder.target.name_or_path)
    return [
        replace(prompt, text=as_chat(tokenizer, prompt.text, target), chat=False) if prompt.chat else prompt
        for prompt in prompts
    ]


def check_device(name: str | None, flag: str = "--device") -> None:
    """Refuse a device that is not there before any weights are read. Raises ValueError."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{flag} {name} cannot be used here: {said}; leave it out for what there is") from None


def quiet_libraries() -> None:
    """Keep progress bars and advice of libraries off stderr, and make faults of policies and the like one line each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    from bpkit.decode.capture import CaptureWarning
    from bpkit.decode.guard import PolicyFaultWarning
    from bpkit.decode.observers import ObserverFaultWarning

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, (PolicyFaultWarning, ObserverFaultWarning, CaptureWarning)):
            say(f"Warning: {message}")
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show


def announce_downloads(config: Config) -> None:
    """Say which models are looked for on the Hub, since a mistyped name waits for its retries.

    Raises:
        ValueError: HF_HUB_OFFLINE is set, and a model is neither a folder nor in the cache.
    """
    from huggingface_hub import is_offline_mode

    for flag, name in models_on_the_hub(config):
        if not is_offline_mode():
            say(f"Looking for {name!r} on the Hugging Face Hub ...")
        elif "/" in name and not _in_the_cache(name):
            raise ValueError(
                f"{flag} {name}: there is no such folder, the cache of downloaded models has none of that name, and "
                "HF_HUB_OFFLINE is set, so that the Hub is not asked: name a folder, or unset HF_HUB_OFFLINE"
            )


def models_on_the_hub(config: Config) -> Iterator[tuple[str, str]]:
    """Flag and name of target and drafter, where they are no folders, no known models and no names of plug-ins."""
    if config.target is not None and config.target not in KNOWN and not Path(config.target).is_dir():
        yield "--target", config.target
    for drafter in each_drafter(config.drafter):
        if isinstance(drafter, str) and not Path(drafter).is_dir():
            spec = parse_spec(drafter)
            drafter = spec if spec["name"] in registry().drafters else {"path": drafter}
        path = drafter.get("path") if isinstance(drafter, dict) else None
        if isinstance(path, str) and path and path not in KNOWN and not Path(path).is_dir():
            yield "--drafter", path


def _in_the_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # not a name that a model can have
        return False
