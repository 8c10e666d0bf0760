"""The pair of models and the prompts that ship with bpkit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

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
    """Path of a shipped folder: `target`, `drafter`, `assistant` (an autoregressive drafter) or `prompts`.

    Raises:
        FileNotFoundError: this installation does not carry it.
    """
    path = Path(__file__).parent / name
    if not path.is_dir():
        raise FileNotFoundError(f"this installation of bpkit carries no {name!r}; name your own models instead")
    return path


def model_name(path: str) -> str:
    """How a model is called in results: as it was named, but not by the path where the shipped ones happen to lie."""
    folder = Path(path)
    return f"shipped {folder.name}" if folder.parent == Path(__file__).parent else path


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
