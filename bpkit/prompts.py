"""Prompts: those that ship with bpkit, a JSONL or text file, or a dataset of the Hugging Face library.

Two sets ship: openings of texts, which the shipped pair goes on with (`bpkit.assets.prompts`), and `instructions`, as
people type them to a model that chats.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bpkit import assets

DEFAULT_DOMAIN = "prompts"
INSTRUCTIONS = "instructions"
KINDS = ("chat", "maths", "code", "rewriting", "conversion")
"""The domains of the instructions."""
CLOSED = "closed"
"""The split of instructions that nothing reads unless it names their file: a second test."""
DEFAULT_LIMIT = 20
BATCH_SIZE = 8
"""Prompts that run at once, where nobody says."""
_EXAMPLE = '{"prompt": "Once upon a time", "domain": "stories"}'


OWN_OPTIONS: dict[str, type] = {"max_new_tokens": int, "seed": int, "stream_id": int, "stop_strings": list}
"""What a line of a prompt file may decide for its prompt alone."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        id: unique among those it comes with.
        options: those of `OWN_OPTIONS` that it came with.
        split: `train`, `validation`, `test` or another name, if it says one.
        chat: whether it is a user's message, for the chat template of the target's tokenizer.
    """

    id: str
    domain: str
    text: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    split: str = ""
    chat: bool = False


def read_prompts(file: Path, column: str = "prompt") -> list[Prompt]:
    """Read JSONL with `prompt` (or another key) and optional `id`, `domain`, `split`, `chat` and options of its own
    (`OWN_OPTIONS`); or, from `.txt`, a prompt on each line.

    Raises:
        ValueError: a bad line, naming file, line and what to write there.
        FileNotFoundError: there is no such file.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no prompt file {str(file)!r}")
    lines = [(i, x) for i, x in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1) if x.strip()]
    if file.suffix == ".txt":
        found = [Prompt(f"line-{i}", DEFAULT_DOMAIN, line) for i, line in lines]
    else:
        found = [_prompt(f"{file}, line {i}", i, _json(f"{file}, line {i}", line), column) for i, line in lines]
    if not found:
        raise ValueError(f"{file} holds no prompts: write one JSON object a line, such as {_EXAMPLE}")
    return _with_own_ids(found, str(file))


def read_dataset(name: str, split: str = "test", column: str = "prompt") -> list[Prompt]:
    """The rows of a dataset of the Hugging Face `datasets` library, from the Hub or a local folder.

    Args:
        name: as `datasets.load_dataset` takes it; `name:config` names a configuration as well.

    Raises:
        ValueError: it cannot be loaded, or a row has no such column.
        ImportError: `datasets` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            "prompts from a dataset need `datasets`, which is not installed: pip install datasets"
        ) from None
    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split)
    except Exception as error:  # network, name, configuration, split: the library has an exception for each
        raise ValueError(f"dataset {name!r}, split {split!r}, cannot be loaded: {error}") from error
    found = [_prompt(f"dataset {name}, row {i}", i, dict(row), column) for i, row in enumerate(rows, start=1)]
    return _with_own_ids(found, f"dataset {name}")


def _with_own_ids(prompts: list[Prompt], source: str) -> list[Prompt]:
    for name, count in Counter(p.id for p in prompts).items():
        if count > 1:
            raise ValueError(f"{source}: id {name!r} stands on {count} lines; give each prompt its own, or none any")
    return prompts


def _json(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); write one object a line, such as {_EXAMPLE}") from None


def _prompt(where: str, number: int, row: Any, column: str) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column]:
        others = ""
        if isinstance(row, dict):
            texts = [f"--column {name}" for name, value in row.items() if isinstance(value, str) and name != column]
            others = f"; or name the column of the prompts, such as {' or '.join(texts)}" if texts else ""
        raise ValueError(f"{where}: needs a {column!r} that is a text and not empty, such as {_EXAMPLE}{others}")
    for key in ("id", "domain", "split"):
        if key in row and not isinstance(row[key], (str, int)):
            raise ValueError(f"{where}: '{key}' must be a text, not {row[key]!r}; or leave it out")
    if not isinstance(row.get("chat", False), bool):
        raise ValueError(f"{where}: 'chat' must be true or false, not {row['chat']!r}; or leave it out")
    options = {name: row[name] for name in OWN_OPTIONS if row.get(name) is not None}
    for name, value in options.items():
        if not isinstance(value, OWN_OPTIONS[name]) or isinstance(value, bool):
            kind = "a list of texts" if OWN_OPTIONS[name] is list else "a whole number"
            raise ValueError(f"{where}: '{name}' must be {kind}, not {value!r}; or leave it out")
    return Prompt(
        id=str(row.get("id", f"line-{number}")),
        domain=str(row.get("domain", DEFAULT_DOMAIN)),
        text=row[column],
        options=options,
        split=str(row.get("split", "")),
        chat=row.get("chat", False),
    )


def choose_prompts(
    file: Path | None,
    domains: Sequence[str],
    limit: int | None,
    *,
    column: str = "prompt",
    shipped_limit: int | None = DEFAULT_LIMIT,
    chat: bool = False,
) -> list[Prompt]:
    """Prompts of a file or the shipped ones.

    Args:
        file: JSONL or text; `instructions` for those that ship for models that chat; None for the shipped openings.
        domains: only these, in this order; all if empty.
        limit: prompts of each domain; by default `shipped_limit` of the shipped ones, and all of a file.
        chat: they are users' messages, whatever they say themselves.
    """
    if file is None:
        shipped = assets.prompts(*domains, limit=shipped_limit if limit is None else limit)
        return [Prompt(p["id"], p["domain"], p["prompt"], chat=chat) for p in shipped]
    most = shipped_limit if limit is None and _is_shipped(file) else limit
    return of_domains(all_prompts(file, column, chat=chat), domains, most, source=str(file))


def all_prompts(file: Path, column: str = "prompt", *, chat: bool = False) -> list[Prompt]:
    """All prompts of a file in its order, or `instructions`: those that ship for models that chat, but the closed ones.

    Args:
        chat: they are users' messages, whatever they say themselves.
    """
    if not _is_shipped(file):
        found = read_prompts(file, column)
        return [replace(prompt, chat=True) for prompt in found] if chat else found
    folder = assets.shipped("prompts") / INSTRUCTIONS
    found = [prompt for kind in KINDS for prompt in read_prompts(folder / f"{kind}.jsonl")]
    return [replace(prompt, chat=True) for prompt in found if prompt.split != CLOSED]


def _is_shipped(file: Path) -> bool:
    return str(file) == INSTRUCTIONS and not file.exists()


def of_domains(prompts: Sequence[Prompt], domains: Sequence[str], limit: int | None, *, source: str) -> list[Prompt]:
    """Up to `limit` prompts of each of the domains, of all if none is named. Raises ValueError for an unknown one."""
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    for domain in domains:
        if domain not in by_domain:
            raise ValueError(f"{source} has no prompts of domain {domain!r}; it has: {', '.join(sorted(by_domain))}")
    return [prompt for domain in domains or by_domain for prompt in by_domain[domain][:limit]]
