"""The prompts that policies are judged on with a real model: five kinds, as people type them to a model that chats.

Chat, code, rewriting and conversion ship with bpkit. Questions of maths are GSM8K's (openai/grade-school-math, MIT
licence), which are not copied here: `maths.json` names them by the first 16 digits of the SHA-256 of their texts. Those
to train on are of its training split and in none of the answers that the drafters learned from; the others of its
test split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from bpkit import assets
from bpkit.prompts import CLOSED, INSTRUCTIONS, KINDS, Prompt, read_prompts

MATHS = "maths"
SPLITS = ("train", "validation", "test")


def real_prompts(maths: Path, maths_train: Path, *, closed: bool = False) -> list[Prompt]:
    """All prompts but those of the closed split, or with `closed` only these; the kinds in turn.

    Args:
        maths, maths_train: JSONL with `question`, that hold the questions of GSM8K's test and training split.

    Raises:
        ValueError: a file lacks some of the questions.
    """
    folder = assets.shipped("prompts") / INSTRUCTIONS
    shipped = [prompt for kind in KINDS if kind != MATHS for prompt in read_prompts(folder / f"{kind}.jsonl")]
    splits = (CLOSED,) if closed else SPLITS
    found = [prompt for prompt in (*shipped, *_questions(maths, maths_train)) if prompt.split in splits]
    return sorted(found, key=lambda prompt: (splits.index(prompt.split), prompt.id.rpartition("-")[2], prompt.domain))


def _questions(maths: Path, maths_train: Path) -> Iterator[Prompt]:
    number = 0
    for split, digests in named_questions().items():
        file = maths_train if split == "train" else maths
        texts = {digest(text): text for text in read_questions(file)}
        missing = [name for name in digests if name not in texts]
        if missing:
            raise ValueError(
                f"{file} lacks {len(missing)} of the {len(digests)} questions of split {split!r}, such as the one with "
                f"SHA-256 {missing[0]}...: give the whole {'train' if split == 'train' else 'test'}.jsonl of "
                "openai/grade-school-math"
            )
        for name in digests:
            number += 1
            yield Prompt(f"{MATHS}-{number:03d}", MATHS, texts[name], split=split)


def named_questions() -> dict[str, list[str]]:
    """Digests of the questions of each split."""
    named: dict[str, list[str]] = json.loads(Path(__file__).with_name("maths.json").read_bytes())
    return named


def read_questions(file: Path) -> list[str]:
    """The `question` of each line of a JSONL file. Raises ValueError."""
    return [str(prompt.text) for prompt in read_prompts(file, "question")]


def digest(text: str) -> str:
    """What a question is known by.

    >>> digest("Two and two?")
    '38bc141ca3a83bdb'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]
