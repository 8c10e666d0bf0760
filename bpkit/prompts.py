"""The prompts of a bench: those that ship with bpkit, or a JSONL file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bpkit import assets

DEFAULT_DOMAIN = "prompts"
DEFAULT_LIMIT = 20
_EXAMPLE = '{"prompt": "Once upon a time", "domain": "stories"}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt; `id` is unique in its bench."""

    id: str
    domain: str
    text: str


def read_prompts(file: Path) -> list[Prompt]:
    """Read JSONL with `prompt` and optional `id` and `domain`; other keys are ignored.

    Raises:
        ValueError: a bad line, naming file, line and what to write there.
        FileNotFoundError: there is no such file.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no prompt file {str(file)!r}")
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [_prompt(file, i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"{file} holds no prompts: write one JSON object a line, such as {_EXAMPLE}")
    for name, count in Counter(p.id for p in found).items():
        if count > 1:
            raise ValueError(f"{file}: id {name!r} stands on {count} lines; give each prompt its own, or none any")
    return found


def _prompt(file: Path, number: int, line: str) -> Prompt:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); write one object a line, such as {_EXAMPLE}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise ValueError(f"{where}: needs a 'prompt' that is a text and not empty, such as {_EXAMPLE}")
    for key in ("id", "domain"):
        if key in row and not isinstance(row[key], (str, int)):
            raise ValueError(f"{where}: '{key}' must be a text, not {row[key]!r}; or leave it out")
    return Prompt(
        id=str(row.get("id", f"line-{number}")), domain=str(row.get("domain", DEFAULT_DOMAIN)), text=row["prompt"]
    )


def choose_prompts(file: Path | None, domains: Sequence[str], limit: int | None) -> list[Prompt]:
    """The prompts of a bench.

    Args:
        file: JSONL, or None for the shipped ones.
        domains: only these, in this order; all if empty.
        limit: prompts of each domain; by default 20 of the shipped ones, and all of a file.
    """
    if file is None:
        shipped = assets.prompts(*domains, limit=DEFAULT_LIMIT if limit is None else limit)
        return [Prompt(p["id"], p["domain"], p["prompt"]) for p in shipped]
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(file):
        by_domain.setdefault(prompt.domain, []).append(prompt)
    for domain in domains:
        if domain not in by_domain:
            raise ValueError(f"{file} has no prompts of domain {domain!r}; it has: {', '.join(sorted(by_domain))}")
    return [prompt for domain in domains or by_domain for prompt in by_domain[domain][:limit]]
