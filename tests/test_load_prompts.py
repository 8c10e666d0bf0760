"""`bpkit --plugin recipes load-prompts`: two sets, the same each time, that begin like nothing that was seen before."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from typer.testing import Result

from bpkit import assets
from bpkit.prompts import KINDS, read_prompts
from recipes.load import prompts as load
from recipes.load.prompts import PAIR_DOMAINS, LoadSources, known_beginnings, load_prompts
from recipes.load.requests import asked, conversion, phrases, prose, rewriting
from recipes.pair import structured
from recipes.pair.policy_prompts import beginning, shipped_beginnings
from recipes.real.prompts import digest

Recipe = Callable[..., Result]
COUNTS = {name: {"validation": 2, "test": 3} for name in ("pair", "real")}
DEFINITION = '''def function_{n}(items, limit={n}):
    """Return the items below the limit.

    All items below limit {n} are kept, in the order in which they came, and the others are left out of the result. The
    caller may change the list afterwards, since a new one is made. It is sorted only if the items that were given to it
    had been sorted before, which nobody checks here.
    """
    found = []
    for place, item in enumerate(items):
        if item < limit:
            found.append((place, item))
    return found, limit, len(items), sum(item for _, item in found), {n}
'''


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the training text of the pair, which takes seconds to read; but for tests that are marked slow."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(load, "known_beginnings", shipped_beginnings)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> LoadSources:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("test", "train"):
        rows = [json.dumps({"question": f"What is {n} plus {n} in the {name} split?"}) for n in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "package").mkdir()
    code = "\n\n".join(DEFINITION.format(n=n) for n in range(20))
    (folder / "package" / "code.py").write_text(code, encoding="utf-8")
    return LoadSources(folder / "test.jsonl", folder / "train.jsonl", (str(folder / "package"),))


def test_every_domain_has_both_splits_and_no_two_begin_alike(sources: LoadSources) -> None:
    sets = load_prompts(sources, seed=1, counts=COUNTS)
    for name, domains in (("pair", PAIR_DOMAINS), ("real", KINDS)):
        found = Counter((prompt.domain, prompt.split) for prompt in sets[name])
        assert found == {(d, split): count for d in domains for split, count in COUNTS[name].items()}
        assert len({prompt.id for prompt in sets[name]}) == len(sets[name])
        assert {prompt.chat for prompt in sets[name]} == {name == "real"}
    texts = [prompt.text for of in sets.values() for prompt in of]
    assert len({beginning(text) for text in texts}) == len(texts)
    asked_of = {prompt.text.partition(" in the ")[2].split()[0] for prompt in sets["pair"] if prompt.domain == "maths"}
    assert asked_of == {"test"}
    by_split = {(p.split, p.text.partition(" in the ")[2].split()[0]) for p in sets["real"] if p.domain == "maths"}
    assert by_split == {("validation", "train"), ("test", "test")}


def test_the_same_arguments_give_the_same_files(recipe: Recipe, sources: LoadSources, tmp_path: Path) -> None:
    assert load_prompts(sources, seed=1, counts=COUNTS) == load_prompts(sources, seed=1, counts=COUNTS)
    assert load_prompts(sources, seed=1, counts=COUNTS) != load_prompts(sources, seed=2, counts=COUNTS)
    given = ("--maths", sources.maths, "--maths-train", sources.maths_train, "--code", sources.packages[0])
    refused = recipe("load-prompts", "--out", tmp_path / "refused", *given)
    assert refused.exit_code == 2
    assert "maths, validation: 30 different prompts are there, 40 are wanted" in " ".join(refused.stderr.split())
    assert not (tmp_path / "refused").exists()


def test_files_have_a_fingerprint(
    recipe: Recipe, sources: LoadSources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load.load_prompts, "__kwdefaults__", {"counts": COUNTS})
    given = ("--maths", sources.maths, "--maths-train", sources.maths_train, "--code", sources.packages[0])
    result = recipe("load-prompts", "--out", tmp_path, *given, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    facts = (tmp_path / "provenance.json").read_text(encoding="utf-8")
    assert str(sources.maths.parent) not in facts
    for name, expected in load_prompts(sources, seed=3, counts=COUNTS).items():
        file = tmp_path / f"{name}.jsonl"
        assert read_prompts(file) == expected
        fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
        assert json.loads(facts)["data"][name] == fingerprint
        assert fingerprint in result.stderr


@pytest.mark.parametrize("where", ["named", "learned", "shipped"])
def test_what_was_seen_before_is_left_out(
    sources: LoadSources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    seen = "What is 7 plus 7 in the test split?"
    only = LoadSources(tmp_path / "test.jsonl", sources.maths_train, sources.packages)
    new = [f"How much is {n} times {n}?" for n in range(10)]
    only.maths.write_text("\n".join(json.dumps({"question": text}) for text in (seen, *new)), encoding="utf-8")
    texts = [p.text for of in load_prompts(only, seed=0, counts={**COUNTS, "pair": {"test": 8}}).values() for p in of]
    assert any(seen in text for text in texts)
    patch = {
        "named": ("named_questions", lambda: {"test": [digest(seen)]}),
        "learned": ("_learned", lambda: {digest(seen)[:8]}),
        "shipped": ("known_beginnings", lambda: {seen}),
    }
    monkeypatch.setattr(load, *patch[where])
    texts = [p.text for of in load_prompts(only, seed=0, counts={**COUNTS, "pair": {"test": 7}}).values() for p in of]
    assert not any(seen in text for text in texts)


def test_templates_are_filled_and_take_turns() -> None:
    for kind in ("chat", "code"):
        stream, templates = asked(kind, Random(0)), phrases()[kind]
        found = [next(stream).text for _ in templates]
        assert len({text[:12] for text in found}) > len(templates) // 2
        for template in templates:
            names = {name for name in template if name not in ("text", "how")}
            assert all(f"{{{name}}}" in template["text"] for name in names)
            assert not any(f"{{{name}}}" in text for name in names for text in found)


def test_records_are_never_asked_for_in_their_own_format() -> None:
    found = [candidate.text for candidate in conversion(Random(0))]
    assert len(found) > 300
    for text in found:
        order, _, records = text.partition("\n\n")
        own = {"{": "JSON array|JSON list|indented JSON", "|": "a Markdown table|in Markdown"}.get(records[0], "none")
        assert not any(target in order for target in own.split("|")), order
        assert len(records) <= 320
    for target in ("JSON", "CSV", "Markdown"):
        assert any(target in text for text in found)


def test_prose_is_whole_sentences(sources: LoadSources) -> None:
    found = list(prose(sources.packages[0]))
    assert len(found) == 20
    assert found[3].startswith(
        "All items below limit 3 are kept, in the order in which they came, and the others are left out"
    )
    stream = [candidate.text for candidate in rewriting(sources.packages, Random(0))]
    assert len(stream) == 30
    assert sum("All items below limit" in text for text in stream) == 20


@pytest.mark.slow
def test_what_the_shipped_pair_learned_from_is_known() -> None:
    known = known_beginnings()
    assert {beginning(text) for seed in (0, 1, 9001) for text in structured.documents(30, seed=seed)} <= known
    assert {beginning(p["prompt"]) for p in assets.prompts("formats")} <= known
    messages = assets.shipped("prompts") / "instructions" / "chat.jsonl"
    assert {beginning(p.text) for p in read_prompts(messages)} <= known
