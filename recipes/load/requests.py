"""What users ask of a model that chats: candidates in an order drawn by a seed.

Chat and code are combined from phrases that were written for this project (`phrases.json`), rewriting from messages of
the same file and from prose in docstrings of installed packages, conversion from generated records.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from recipes.load.openings import CandidatePrompt
from recipes.pair import structured
from recipes.pair.policy_prompts import code_folder

_PROSE_CHARACTERS = range(240, 600)
_NOT_PROSE = re.compile(r"[`:$\\<>=|*_\[\]{}@#^~]|\.\.|--|\n[ \t]|https?")
_MOST_RECORD_CHARACTERS = 320
"""About 200 tokens of `smollm2`, which reads digits one by one."""
_ROWS = (3, 6)
_TRIES = 3000


@cache
def phrases() -> dict[str, Any]:
    """What `phrases.json` holds."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
    return found


def questions(texts: Sequence[str], rng: random.Random) -> Iterator[CandidatePrompt]:
    """Word problems as they are."""
    for text in rng.sample(texts, len(texts)):
        yield CandidatePrompt(text, text)


def asked(kind: str, rng: random.Random) -> Iterator[CandidatePrompt]:
    """Messages of a kind, the templates in turn."""
    for template in _in_turn(phrases()[kind], rng):
        text = _filled(template, rng)
        yield CandidatePrompt(text, text)


def rewriting(packages: Sequence[str], rng: random.Random) -> Iterator[CandidatePrompt]:
    """A text and what is to be done to it: a message after every two paragraphs of documentation. Raises ValueError."""
    paragraphs = sorted({text for package in packages for text in prose(package)})
    messages, orders = _in_turn(phrases()["messages"], rng), _in_turn(phrases()["paragraphs"], rng)
    for place, paragraph in enumerate(rng.sample(paragraphs, len(paragraphs)), start=1):
        yield CandidatePrompt(f"{next(orders)}\n\n{paragraph}", paragraph)
        if place % 2 == 0:
            template = next(messages)
            text = _filled(template, rng)
            yield CandidatePrompt(f"{rng.choice(template['how'])}\n\n{text}", text)


def conversion(rng: random.Random) -> Iterator[CandidatePrompt]:
    """Generated records and the format that they are to be written in; never their own."""
    words = phrases()["conversion"]
    targets = list(words["target"])
    for place, ask in zip(range(_TRIES), _in_turn(words["ask"], rng), strict=False):
        layout = structured.LAYOUTS[place % len(structured.LAYOUTS)]
        names = rng.sample(structured.FIELDS, 14)
        text = layout(rng, names, rng.randint(*_ROWS), False)
        source = words["source"][layout.__name__]
        others = [name for name in targets if name.lower() not in layout.__name__]
        target = others[(place + place // len(structured.LAYOUTS)) % len(others)]
        if len(text) <= _MOST_RECORD_CHARACTERS:
            order = ask.format(source=source, target=rng.choice(words["target"][target]))
            yield CandidatePrompt(f"{order}\n\n{text}", text)


def prose(package: str) -> Iterator[str]:
    """Paragraphs of whole sentences, without markup, in the docstrings of an installed package. Raises ValueError."""
    for file in sorted(code_folder(package).rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(paragraph.split())
                    if len(text) in _PROSE_CHARACTERS and _is_prose(paragraph, text):
                        yield text


def _is_prose(paragraph: str, text: str) -> bool:
    whole = text[0].isupper() and text.endswith(".") and ". " in text
    return whole and not paragraph.startswith(" ") and _NOT_PROSE.search(paragraph) is None


def _in_turn(texts: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """All, in an order that is drawn, again and again."""
    return cycle(rng.sample(texts, len(texts)))


def _filled(template: Mapping[str, Any], rng: random.Random) -> str:
    """A template with one of the fillers in each of its places."""
    fillers = {name: rng.choice(found) for name, found in template.items() if name not in ("text", "how")}
    return re.sub(r"\{(\w+)\}", lambda place: str(fillers.get(place[1], place[0])), template["text"])
