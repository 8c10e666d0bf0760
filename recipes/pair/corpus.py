"""Training text in three domains of different predictability, and its packing into token windows.

- `maths`: worked word problems from a JSONL file with `question` and `answer` (the layout of GSM8K).
- `code`: the source of the running Python's own standard library (PSF licence), which every machine has.
- `structured`: JSON, tables and logs from `recipes.pair.structured`.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.pair import structured

MATHS_TEMPLATE = "Question: {question}\nAnswer:"
# Test suites, bundled third-party code and vendored wheels are left out of the standard library.
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "ensurepip", "turtledemo"}
_TOP_LEVEL = re.compile(r"^(?=(?:def|class|async def|@)\b|@)", re.MULTILINE)


def maths_documents(path: Path) -> Iterator[str]:
    """Yield question and worked answer for each line of a JSONL file with `question` and `answer`."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            yield MATHS_TEMPLATE.format(question=row["question"]) + " " + row["answer"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with 'question' and 'answer' ({error})"
            ) from error


def code_documents(library: Path | None = None, *, max_chars: int = 2400) -> Iterator[str]:
    """Yield chunks of Python source that begin at a top-level definition, at most `max_chars` long."""
    root = library or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            source = path.read_text(encoding="utf-8", errors="ignore")
            for block in _TOP_LEVEL.split(source):
                yield from (block[i : i + max_chars].rstrip() for i in range(0, len(block), max_chars))


def training_documents(
    maths: Path | None, *, structured_count: int, maths_repeats: int, seed: int
) -> dict[str, list[str]]:
    """Return the documents of each domain; `maths` may be None to train without worked problems."""
    return {
        "maths": [] if maths is None else list(maths_documents(maths)) * maths_repeats,
        "code": [text for text in code_documents() if len(text) > 80],
        "structured": list(structured.documents(structured_count, seed=seed)),
    }


def training_prompts(maths: Path | None, *, per_domain: int, seed: int) -> list[str]:
    """Return openings of training documents, the domains in turn: what a drafter's training sequences start from."""
    rng = random.Random(seed)
    questions = [text.split("Answer:")[0] + "Answer:" for text in maths_documents(maths)] if maths else []
    openings = [_opening(text, rng) for text in code_documents() if len(text) > 300]
    records = [_opening(text, rng) for text in structured.documents(per_domain, seed=seed + 1)]
    domains = [rng.sample(texts, min(per_domain, len(texts))) for texts in (questions, openings, records) if texts]
    return [text for row in zip_longest(*domains) for text in row if text is not None]


def _opening(text: str, rng: random.Random) -> str:
    """The first lines of a document, 100 to 300 characters, cut at a line's end where there is one."""
    head = text[: rng.randint(100, 300)]
    return head[: head.rfind("\n") + 1] or head


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, *, length: int, seed: int) -> Tensor:
    """Shuffle and tokenize documents, join them with the EOS token and cut windows.

    Returns:
        token ids, int64, shape [windows, length].
    """
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    ids: list[int] = []
    for encoded in tokenizer(shuffled, add_special_tokens=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    windows = len(ids) // length
    if windows == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}; give more text")
    return torch.tensor(ids[: windows * length]).view(windows, length)
