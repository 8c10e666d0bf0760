"""Prompts to judge policies under load on: drawn by a seed, and unlike what models or tables were made with.

Two sets. `pair` has openings of texts for the shipped pair, in its four domains; `real` has users' messages of five
kinds for a model that chats. Each has a split to choose options on and one to judge on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from bpkit import assets
from bpkit.learn.training.provenance import write_provenance
from bpkit.prompts import INSTRUCTIONS, KINDS, Prompt, read_prompts
from recipes.load import openings, requests
from recipes.load.openings import CandidatePrompt
from recipes.pair import structured
from recipes.pair.corpus import code_documents
from recipes.pair.policy_prompts import beginning, package_version, shipped_beginnings, write_jsonl
from recipes.real.prompts import digest, named_questions, read_questions

PACKAGES = ("networkx", "rich", "click", "jinja2")
"""Installed with torch and typer; BSD and MIT licences. The shipped policies learned from another package."""
COUNTS = {"pair": {"validation": 40, "test": 60}, "real": {"validation": 16, "test": 24}}
"""Prompts of each domain."""
PAIR_DOMAINS = (*assets.DOMAINS, *assets.EXTRA_DOMAINS)
_TEST_QUESTIONS = 400
_PAIR_TRAINING = ((0, 6000), (1, 6000), (9001, 700))
"""Seeds and numbers of the records that the shipped pair, its drafters and its policies learned from."""


@dataclass(frozen=True)
class LoadSources:
    """What is drawn from, beside what is generated.

    Attributes:
        maths: JSONL with `question`: GSM8K's test split, of which the first 400 lines are used.
        maths_train: its training split.
        packages: installed packages or folders, whose definitions and whose prose in docstrings are drawn.
    """

    maths: Path
    maths_train: Path
    packages: tuple[str, ...] = PACKAGES


def load_prompts(
    sources: LoadSources, *, seed: int, counts: dict[str, dict[str, int]] = COUNTS
) -> dict[str, list[Prompt]]:
    """Draw both sets. The same arguments and sources give the same prompts.

    No two begin alike (`beginning`), and none like a shipped prompt or like one that the shipped pair, its policies
    or the drafters of `smollm2` learned from.

    Returns:
        `pair` and `real`: by split, the domains in turn.

    Raises:
        ValueError: a source has too little, or cannot be read.
    """
    seen = _Seen()
    real, pair = _real_streams(sources, seed), _pair_streams(sources, seed)
    return {
        "pair": _draw(pair, counts["pair"], seen, chat=False),
        "real": _draw(real, counts["real"], seen, chat=True),
    }


def _pair_streams(sources: LoadSources, seed: int) -> dict[str, dict[str, Iterator[CandidatePrompt]]]:
    """Candidates of each domain and split. The pair learned from all of GSM8K's training split."""
    maths = openings.maths(_test_questions(sources), _rng(seed, "pair maths"))
    code = openings.code(sources.packages, _rng(seed, "pair code"))
    known, new = (openings.records(seed, held_out=held_out) for held_out in (False, True))
    streams = zip(PAIR_DOMAINS, (maths, code, known, new), strict=True)
    return {domain: dict.fromkeys(COUNTS["pair"], stream) for domain, stream in streams}


def _real_streams(sources: LoadSources, seed: int) -> dict[str, dict[str, Iterator[CandidatePrompt]]]:
    rng = {kind: _rng(seed, f"real {kind}") for kind in KINDS}
    maths = {
        "validation": requests.questions(_unnamed(read_questions(sources.maths_train)), rng["maths"]),
        "test": requests.questions(_test_questions(sources), rng["maths"]),
    }
    streams = {
        "chat": requests.asked("chat", rng["chat"]),
        "code": requests.asked("code", rng["code"]),
        "rewriting": requests.rewriting(sources.packages, rng["rewriting"]),
        "conversion": requests.conversion(rng["conversion"]),
    }
    return {kind: maths if kind == "maths" else dict.fromkeys(COUNTS["real"], streams[kind]) for kind in KINDS}


def _rng(seed: int, name: str) -> random.Random:
    return random.Random(f"load {seed} {name}")


def _test_questions(sources: LoadSources) -> list[str]:
    return _unnamed(read_questions(sources.maths)[:_TEST_QUESTIONS])


def _unnamed(questions: list[str]) -> list[str]:
    """Without those that earlier tables were made with."""
    named = {name for names in named_questions().values() for name in names}
    return [question for question in questions if digest(question) not in named]


def _draw(
    streams: dict[str, dict[str, Iterator[CandidatePrompt]]], counts: dict[str, int], seen: _Seen, *, chat: bool
) -> list[Prompt]:
    drawn: list[Prompt] = []
    for split, count in counts.items():
        texts = {domain: list(islice(filter(seen.is_new, of[split]), count)) for domain, of in streams.items()}
        for domain, found in texts.items():
            if len(found) < count:
                raise ValueError(
                    f"{domain}, {split}: {len(found)} different prompts are there, {count} are wanted: "
                    "give a larger source"
                )
        drawn += [
            Prompt(f"load-{split}-{domain}-{place + 1:03d}", domain, texts[domain][place].text, split=split, chat=chat)
            for place in range(count)
            for domain in streams
        ]
    return drawn


class _Seen:
    """Beginnings of all prompts so far, and of those that nothing may begin like."""

    def __init__(self) -> None:
        self.beginnings = set(known_beginnings())

    def is_new(self, candidate: CandidatePrompt) -> bool:
        """Whether nothing began like it; from now on something does."""
        keys = {beginning(text) for text in candidate}
        if keys & self.beginnings or {digest(key)[:8] for key in keys} & _learned():
            return False
        self.beginnings |= keys
        return True


@cache
def known_beginnings() -> frozenset[str]:
    """Of shipped prompts, closed ones included, and of what the shipped pair and its policies learned from."""
    folder = assets.shipped("prompts") / INSTRUCTIONS
    messages = [prompt.text for kind in KINDS for prompt in read_prompts(folder / f"{kind}.jsonl")]
    records = (text for seed, count in _PAIR_TRAINING for text in structured.documents(count, seed=seed))
    return shipped_beginnings() | frozenset(map(beginning, (*messages, *code_documents(), *records)))


@cache
def _learned() -> frozenset[str]:
    """Of each prompt that the drafters of `smollm2` learned from, 8 digits of the SHA-256 of its beginning."""
    return frozenset(Path(__file__).with_name("learned.txt").read_text(encoding="ascii").split())


def write_sets(
    sets: dict[str, list[Prompt]], out: Path, sources: LoadSources, *, seed: int
) -> Iterator[tuple[Path, int, str]]:
    """Write `NAME.jsonl` for each set to the folder `out`, and `provenance.json`.

    Yields:
        the file, how many prompts it has, and its SHA-256.
    """
    data = {}
    for name, prompts in sets.items():
        file = out / f"{name}.jsonl"
        keys = ("id", "domain", "split", "chat")
        write_jsonl(({**{key: getattr(p, key) for key in keys}, "prompt": p.text} for p in prompts), file)
        data[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        yield file, len(prompts), data[name]
    versions = {Path(package).name: package_version(package) for package in sources.packages}
    arguments = {"maths": sources.maths, "maths_train": sources.maths_train, "packages": versions, "seed": seed}
    write_provenance(out, f"{__name__}.{load_prompts.__name__}", arguments, data)
