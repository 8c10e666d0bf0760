"""Models that are no folders: said before the Hub is asked, and refused at once where it must not be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bpkit.cli.terminal import say
from bpkit.config import Config
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import parse_spec


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
    """Flag and name of target and drafter, where they are neither folders nor names of plug-ins."""
    if config.target is not None and not Path(config.target).is_dir():
        yield "--target", config.target
    drafter = config.drafter
    if isinstance(drafter, str) and not Path(drafter).is_dir():
        spec = parse_spec(drafter)
        drafter = spec if spec["name"] in registry().drafters else {"path": drafter}
    path = drafter.get("path") if isinstance(drafter, dict) else None
    if isinstance(path, str) and path and not Path(path).is_dir():
        yield "--drafter", path


def _in_the_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # not a name that a model can have
        return False
