"""Openings of texts, which the shipped pair goes on with: candidates in an order drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

from recipes.pair import structured
from recipes.pair.corpus import MATHS_TEMPLATE
from recipes.pair.policy_prompts import PromptSources, code_opening, first_records

_RECORDS, _RECORDS_SEED = 1200, 5_000_000


class CandidatePrompt(NamedTuple):
    """A prompt, and what it was cut from: a short opening alone would not tell documents apart."""

    text: str
    whole: str


def maths(questions: Sequence[str], rng: random.Random) -> Iterator[CandidatePrompt]:
    """Questions, up to where their answers begin."""
    for question in rng.sample(questions, len(questions)):
        yield CandidatePrompt(MATHS_TEMPLATE.format(question=question), question)


def code(packages: Sequence[str], rng: random.Random) -> Iterator[CandidatePrompt]:
    """First lines of functions and classes, the packages in turn. Raises ValueError."""
    shuffled = []
    for package in packages:
        texts = PromptSources(code=package).texts()["code"]
        shuffled.append(rng.sample(texts, len(texts)))
    for text in chain.from_iterable(zip_longest(*shuffled)):
        if text is not None:
            yield CandidatePrompt(code_opening(text, rng), text)


def records(seed: int, *, held_out: bool) -> Iterator[CandidatePrompt]:
    """First records of generated documents, the layouts in turn, in formats for training or in others."""
    for text in structured.documents(_RECORDS, seed=_RECORDS_SEED + 2 * seed + held_out, held_out=held_out):
        yield CandidatePrompt(first_records(text), text)
