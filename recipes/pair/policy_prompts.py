"""Prompts to train policies on: unlike those that ship with bpkit, and no two alike.

Drawn from maths questions, openings of Python definitions and generated records, so that the domains are those of the
shipped prompts, which are left for judging.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bpkit import assets
from bpkit.files import write_at_once
from bpkit.learn.training.provenance import fingerprint, write_provenance
from bpkit.prompts import Prompt
from recipes.pair import structured
from recipes.pair.corpus import code_documents, maths_documents

SAME_BEGINNING = 80
"""Prompts whose first so many characters agree, whatever their whitespace, are one prompt."""
_SHORTEST_CODE = 400
_DEFINITION = re.compile(r"^(?:def |class |@|async def)", re.MULTILINE)
_CODE_OPENING, _RECORD_OPENING = (150, 320), 240
_ID = "train"


@dataclass(frozen=True)
class PromptSources:
    """Where prompts come from; a domain without a source is left out.

    Attributes:
        maths: JSONL with `question` and `answer`.
        code: an installed package, by name, or a folder of Python files.
        records: structured documents to generate and to draw from. records_seed: of their generator.
    """

    maths: Path | None = None
    code: str | None = None
    records: int = 0
    records_seed: int = 0

    def texts(self) -> dict[str, list[str]]:
        """What each domain draws from. Raises ValueError if there is no source, or one cannot be read."""
        found: dict[str, list[str]] = {}
        if self.maths is not None:
            found["maths"] = [text.partition("Answer:")[0] + "Answer:" for text in maths_documents(self.maths)]
        if self.code is not None:
            long = (text for text in code_documents(code_folder(self.code)) if len(text) > _SHORTEST_CODE)
            found["code"] = [text for text in long if _DEFINITION.match(text)]
        if self.records:
            found["structured"] = list(structured.documents(self.records, seed=self.records_seed))
        if not found:
            raise ValueError("there is nothing to draw prompts from: give --maths, --code or --structured")
        return found


@dataclass(frozen=True)
class Drawn:
    """The prompts, the domains in turn.

    Attributes:
        repeats, shipped: how many that were drawn first were replaced: they began like an earlier one, or like a
            prompt that ships with bpkit.
        fingerprints: of what each domain was drawn from.
    """

    prompts: list[Prompt]
    repeats: int
    shipped: int
    fingerprints: dict[str, str]


def code_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported, or the folder itself. Raises ValueError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise ValueError(f"--code {name}: there is no such folder, and no installed package of that name")
    return Path(places[0])


def draw_prompts(sources: PromptSources, *, count: int, seed: int) -> Drawn:
    """Draw `count` prompts of each domain. The same arguments and sources give the same prompts.

    Raises:
        ValueError: a domain has no more than so many different prompts.
    """
    texts, rng = sources.texts(), random.Random(seed)
    shipped = shipped_beginnings()
    seen, like_shipped, replaced = set(shipped), 0, 0
    drawn: dict[str, list[str]] = {}
    for domain, documents in texts.items():
        if len(documents) < count:
            raise _too_few(domain, len(documents), count)
        places = _places(domain, len(documents), count, rng)
        first = [_Opening.of(documents[place], domain, rng) for place in places]
        like_shipped += sum(bool(opening.keys & shipped) for opening in first)
        kept = list(_distinct(first, _spare(domain, documents, places, seed), seen))
        if len(kept) < count:
            raise _too_few(domain, len(kept), count)
        replaced += sum(ours is not theirs for ours, theirs in zip(kept, first, strict=True))
        drawn[domain] = [opening.text for opening in kept]
    prompts = [
        Prompt(f"{_ID}-{domain}-{place:04d}", domain, drawn[domain][place])
        for place in range(count)
        for domain in drawn
    ]
    fingerprints = {domain: fingerprint(found) for domain, found in texts.items()}
    return Drawn(prompts, replaced - like_shipped, like_shipped, fingerprints)


@dataclass(frozen=True)
class _Opening:
    """A prompt, and how it and its document begin: a short opening alone would not tell documents apart."""

    text: str
    keys: frozenset[str]

    @classmethod
    def of(cls, document: str, domain: str, rng: random.Random) -> _Opening:
        text = _CUTS[domain](document, rng)
        return cls(text, frozenset({beginning(text), beginning(document)}))


def _distinct(first: Sequence[_Opening], spare: Iterator[_Opening], seen: set[str]) -> Iterator[_Opening]:
    """In the place of each that begins like a seen one a spare one that does not. Adds them to `seen`."""
    for opening in first:
        fresh = opening if seen.isdisjoint(opening.keys) else next((s for s in spare if seen.isdisjoint(s.keys)), None)
        if fresh is None:
            return
        seen |= fresh.keys
        yield fresh


def beginning(text: str) -> str:
    """What tells prompts apart.

    >>> beginning("def  f(x): return x")
    'def f(x): return x'
    """
    return " ".join(text.split())[:SAME_BEGINNING]


def shipped_beginnings() -> frozenset[str]:
    """Of the prompts that ship with bpkit, and of each definition within one."""
    texts = [p["prompt"] for p in assets.prompts(*assets.DOMAINS, *assets.EXTRA_DOMAINS)]
    within = [text[found.start() :] for text in texts for found in _DEFINITION.finditer(text)]
    return frozenset(map(beginning, (*texts, *within)))


def _too_few(domain: str, found: int, count: int) -> ValueError:
    more = "give --structured a larger number" if domain == "structured" else f"give a larger source of {domain}"
    return ValueError(f"{domain}: {found} different prompts are there, {count} are wanted: lower --count, or {more}")


def _places(domain: str, documents: int, count: int, rng: random.Random) -> list[int]:
    """Which documents are drawn, in their order."""
    if domain != "structured":
        return rng.sample(range(documents), count)
    order = list(range(documents))
    rng.shuffle(order)
    return order[:count]


def _spare(domain: str, documents: Sequence[str], drawn: Sequence[int], seed: int) -> Iterator[_Opening]:
    """Openings of the other documents, by a generator of their own: replacing one prompt changes no other."""
    rng, left = random.Random(f"{seed} {domain}"), sorted(set(range(len(documents))) - set(drawn))
    rng.shuffle(left)
    return (_Opening.of(documents[place], domain, rng) for place in left)


def _whole(text: str, rng: random.Random) -> str:
    return text


def code_opening(text: str, rng: random.Random) -> str:
    """The first lines, cut at a line's end where there is one."""
    head = text[: rng.randint(*_CODE_OPENING)]
    return head[: head.rfind("\n") + 1] or head


def first_records(text: str) -> str:
    """Complete lines, 240 characters or a little more."""
    end = text.find("\n", _RECORD_OPENING)
    return text[: end + 1] if end != -1 else text + "\n"


_CUTS: dict[str, Callable[[str, random.Random], str]] = {
    "maths": _whole,
    "code": code_opening,
    "structured": lambda text, rng: first_records(text),
}


def write_prompts(drawn: Drawn, out: Path, *, parts: int, arguments: dict[str, Any]) -> list[Path]:
    """Write `out`, or `parts` files of it that are numbered from 0, and `NAME.provenance.json` beside them.

    Returns:
        the files of prompts.
    """
    domains = len(drawn.fingerprints)
    count = len(drawn.prompts) // domains
    if parts > count:
        raise ValueError(f"--parts {parts}: there are only {count} prompts of each domain")
    files = [out] if parts == 1 else [out.with_name(f"{out.stem}{part}{out.suffix}") for part in range(parts)]
    for part, file in enumerate(files):
        first, last = (part * count // parts) * domains, ((part + 1) * count // parts) * domains
        write_jsonl(({"id": p.id, "domain": p.domain, "prompt": p.text} for p in drawn.prompts[first:last]), file)
    data = {**drawn.fingerprints, "prompts": fingerprint(p.text for p in drawn.prompts)}
    recipe = f"{__name__}.{draw_prompts.__name__}"
    write_provenance(out.parent, recipe, arguments, data, name=f"{out.stem}.provenance.json")
    return files


def write_jsonl(rows: Iterable[Mapping[str, Any]], file: Path) -> None:
    """Write an object a line, all at once."""
    write_at_once(file, "".join(json.dumps(row) + "\n" for row in rows))


def package_version(name: str | None) -> str | None:
    """Of an installed package; None for a folder."""
    if name is None or Path(name).is_dir():
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return None
