"""Hierarchy Drafting: what each store finds, in which order, who sees whose text, and what files are refused."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpkit import SpeculativeDecoder
from bpkit.decode.drafter import EachRow, Offer
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.config import HierarchyConfig
from bpkit.draft.hierarchy import HierarchyDrafter, HierarchySession
from bpkit.draft.stores import files
from bpkit.draft.stores.context import ContextStore
from bpkit.draft.stores.files import Store, open_store
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer
from tests.tiny_store import store_of, tiny_store


def found(offer: Offer) -> tuple[list[int], int]:
    return offer.tokens, offer.match


def begun(drafter: HierarchyDrafter, tokens: list[int]) -> HierarchySession:
    """The session of a row that has read these tokens."""
    row = RowText(torch.tensor([tokens]), 1000)
    session = HierarchySession(drafter, row)
    session.advance(None)
    return session


def alone(store: Store | None = None, **options: Any) -> HierarchyDrafter:
    return HierarchyDrafter(store, HierarchyConfig(**options))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_of(tmp_path / "store", [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 9, 9, 9], [8, 3, 4, 5]])


# The tables.


def test_tables_are_those_of_counting_by_hand(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(4) for _ in range(rng.randint(1, 60))] for _ in range(20)]
    store = store_of(tmp_path, texts)
    where: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for number, text in enumerate(texts):
        for start in range(len(text) - 4):
            where[tuple(text[start : start + 5])].add(number)
    assert set(map(tuple, np.load(tmp_path / "ngrams.npy").tolist())) == set(where)
    for _ in range(300):
        tail = [rng.randrange(5) for _ in range(rng.randint(1, 10))]
        tokens, match = found(store.model.find(tail))
        beginning = {size: [n for n in where if n[:size] == tuple(tail[-size:])] for size in range(1, 5)}
        expected = max((size for size in range(1, min(5, len(tail) + 1)) if beginning[size]), default=0)
        assert match == expected
        for place, token in enumerate(tokens):
            stands = [n for n in where if n[: match + place] == (*tail[-match:], *tokens[:place])]
            votes: Counter[int] = Counter()
            for ngram in stands:
                votes[ngram[match + place]] += len(where[ngram])
            assert votes[token] == max(votes.values())
        tokens, match = found(store.corpus.find(tail, range(8, 1, -1), 3))
        after = {
            size: [t[i + size] if i + size < len(t) else None for t in texts for i in range(len(t))
                   if size <= len(tail) and t[i : i + size] == tail[-size:]]
            for size in range(2, 9)
        }  # fmt: skip
        assert match == max((size for size in after if after[size]), default=0)
        if match and len(after[match]) <= 32:  # with more it asks some of them
            following = Counter(after[match])
            assert following[tokens[0] if tokens else None] == max(following.values())


def test_an_ngram_counts_once_for_each_text_and_the_commonest_are_kept(tmp_path: Path) -> None:
    loops, others = [1, 2] * 40, [[5, 6, 7, 8, 9]] * 3
    store = store_of(tmp_path, [loops, *others], ngrams=1)
    assert np.load(tmp_path / "ngrams.npy").tolist() == [[5, 6, 7, 8, 9]]
    assert found(store.model.find([1, 2])) == ([], 0)
    assert found(store.corpus.find([1, 2], range(8, 1, -1), 4)) == ([1, 2, 1, 2], 2)


def test_the_share_is_of_those_that_go_on_alike_over_all_and_one(tmp_path: Path) -> None:
    store = store_of(tmp_path, [[1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 6, 7]])
    assert store.corpus.find([1, 2], range(8, 1, -1), 4) == Offer([3], 2, 2 / 4)
    assert store.corpus.find([5, 6], range(8, 1, -1), 4) == Offer([7], 2, 1 / 2)
    session = begun(alone(max_ngram=1, span=1), [1, 2, 1, 2, 1, 3, 1])
    assert session.offer(1) == Offer([3], 1, 1 / 3), "what is kept is 2 and 3, each once"


def test_a_continuation_ends_where_its_text_does(store: Store) -> None:
    assert found(store.corpus.find([8, 3, 4], range(8, 1, -1), 6)) == ([5], 3)
    assert found(store.corpus.find([9, 9, 9], range(8, 1, -1), 6)) == ([], 3)
    assert found(store.corpus.find([6, 1, 2], range(8, 1, -1), 3)) == ([3, 4, 5], 2), "and none goes on in the next one"


def test_the_context_store_keeps_the_latest_of_each_ngram_and_no_more_than_its_limit() -> None:
    kept = ContextStore(span=2, candidates=2, max_entries=3)
    for continuation in ((1, 1), (2, 2), (1, 1), (3, 3)):
        kept.add((0,), continuation)
    assert kept.find((0,)) == [(3, 3), (1, 1)]
    kept.add((5,), (6, 6))
    kept.add((7,), (8, 8))
    assert (kept.find((0,)), kept.find((5,)), kept.entries) == ([], [(6, 6)], 2), "the oldest n-gram goes"


# What is drafted.


def test_the_latest_occurrence_is_drafted_and_looked_up_again(store: Store) -> None:
    session = begun(alone(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3])
    offer = session.offer(5)
    assert (offer.tokens, offer.match, session.source) == ([4, 5, 6, 7, 8], 3, "context")
    assert session.offer(2).tokens == [4, 5]
    assert begun(alone(), [4, 1, 4, 1]).offer(7).tokens == [4, 1, 4, 1, 4, 1, 4], "the newest n-gram counts, too"
    assert begun(alone(go_on_match=9), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]).offer(9).tokens == [4, 5, 6, 7]
    assert begun(alone(), [1, 2, 3]).offer(4).tokens == []


def test_stores_are_asked_in_order_and_a_short_match_is_passed_over_for_a_longer_one(store: Store) -> None:
    text = [3, 40, 41, 42, 43, 44, 45, 2, 3]
    offered = {}
    for order in ("context", "model", "corpus", "context+model+corpus", "corpus+model", "model+corpus"):
        session = begun(alone(store, order=order, go_on_match=9), text)
        offer = session.offer(4)
        offered[order] = (session.source, offer.match, offer.tokens)
    assert offered["context"] == ("context", 1, [40, 41, 42, 43])
    assert offered["model"] == offered["context+model+corpus"] == offered["model+corpus"] == ("model", 2, [4, 5, 6])
    assert offered["corpus"] == offered["corpus+model"] == ("corpus", 2, [4, 5, 6])
    session = begun(alone(store, sure_match=1, go_on_match=9), text)
    assert (session.offer(4).tokens, session.source) == ([40, 41, 42, 43], "context")


def test_offers_are_a_function_of_the_text_and_begin_with_all_shorter_ones(tmp_path: Path) -> None:
    rng = random.Random(1)
    store = store_of(tmp_path, [[rng.randrange(5) for _ in range(200)] for _ in range(3)], ngrams=60)
    for options in ({}, {"candidates": 1}, {"max_entries": 30}, {"span": 2, "max_ngram": 5}):
        drafter = alone(store, **options)
        text = [rng.randrange(5) for _ in range(150)]
        row = RowText(torch.tensor([text[:3]]), 1000)
        session = HierarchySession(drafter, row)
        session.advance(None)
        while len(row.tokens) < len(text):
            row.append(text[len(row.tokens) : len(row.tokens) + rng.randint(1, 7)])
            session.advance(None)
            offer = session.offer(9)
            assert offer == begun(drafter, list(row.tokens)).offer(9)
            assert all(session.offer(most).tokens == offer.tokens[:most] for most in range(9))


def test_tokens_that_others_drafted_are_read_at_the_next_draft() -> None:
    row = RowText(torch.tensor([[1, 2, 3]]), 100)
    session = HierarchySession(alone(), row)
    session.advance(None)
    for tokens in ([4, 5, 6, 7], [8], [2, 3]):
        row.append(tokens)
        session.advance(None)
    assert session.offer(3).tokens == [4, 5, 6]


# Whose text is drafted to whom.


def texts(rows: list[list[int]]) -> RunningText:
    return RunningText([RowText(torch.tensor([row]), 100) for row in rows])


def rows_of(drafter: HierarchyDrafter, rows: list[list[int]]) -> list[HierarchySession]:
    sessions = drafter.begin(texts(rows))
    assert isinstance(sessions, EachRow)
    sessions.advance(None)
    return sessions.sessions  # type: ignore[return-value]


SECRET, ASKING = [1, 2, 3, 70, 71, 72, 73, 74], [50, 1, 2, 3]


def test_no_request_is_drafted_what_another_one_wrote(store: Store) -> None:
    drafter = alone(store)
    before = {file.name: file.read_bytes() for file in store.path.iterdir()}
    beside = rows_of(drafter, [SECRET, ASKING])[1].offer(6)
    earlier = rows_of(drafter, [ASKING])[0].offer(6)
    never = rows_of(alone(store), [ASKING])[0].offer(6)
    assert beside == earlier == never
    assert never.tokens[0] == 4, "from the store"
    assert {file.name: file.read_bytes() for file in store.path.iterdir()} == before
    assert not drafter.remembers_requests


def test_across_requests_one_context_serves_all_within_its_limit() -> None:
    drafter = alone(across_requests=True, max_entries=40)
    assert drafter.remembers_requests
    assert rows_of(drafter, [ASKING])[0].offer(4).tokens == []
    assert rows_of(drafter, [SECRET, ASKING])[1].offer(4).tokens == [70, 71, 72, 73]
    assert rows_of(drafter, [ASKING])[0].offer(4).tokens == [70, 71, 72, 73]
    rows_of(drafter, [list(range(100, 190))])
    assert drafter.shared is not None
    assert drafter.shared.entries <= 40
    assert rows_of(drafter, [ASKING])[0].offer(4).tokens == []


def test_a_decoder_forgets_a_request_when_it_ends(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, HierarchyDrafter(), "fixed:6")
    prompts = [pair.ids("x = 1, x = 1, x = "), pair.ids("1, 2, 1, 2, 1,")]
    first = [decoder.generate(ids, max_new_tokens=20, temperature=0) for ids in prompts]
    again = [decoder.generate(ids, max_new_tokens=20, temperature=0) for ids in reversed(prompts)]
    for one, other in zip(first, reversed(again), strict=True):
        assert one.tokens.equal(other.tokens)
        assert [int(s.draft_length) for s in one.steps] == [int(s.draft_length) for s in other.steps]


def test_the_last_pass_is_kept_where_it_was_asked_for() -> None:
    for last_pass, drafted in ((True, [21, 22, 23]), (False, [])):
        drafter = alone(last_pass=last_pass)
        assert getattr(drafter, "depends_on_steps", None) is last_pass
        row = RowText(torch.tensor([[1, 2, 3]]), 100)
        session = HierarchySession(drafter, row)
        session.advance(None)
        session.passed([21, 22, 23])
        row.append([9])
        session.advance(None)
        assert session.offer(3).tokens == drafted


# Texts and traces.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"last_pass": True, "across_requests": True}], ids=["default", "remembering"])
def test_texts_of_rows_that_join_and_leave_are_those_of_plain_decoding(
    pair: TinyPair, tmp_path: Path, options: dict[str, Any], temperature: float
) -> None:
    prompts = ["x = ", "def f(a, b):\n    return ", "1, 2, 3, 1, 2, 3, 1, 2,", "The quick brown fox"]
    store = tiny_store(tmp_path, pair, prompts)
    drafter = resolve_drafter({"name": "hierarchy", "store": str(store), **options}, pair.target)
    plain = SpeculativeDecoder(pair.target, "ngram", "fixed:1")
    decoder = SpeculativeDecoder(pair.target, drafter, "fixed:5", strict=True)
    how: dict[str, Any] = {"temperature": temperature, "seed": 3}
    wanted = [
        plain.generate(pair.ids(prompt), max_new_tokens=9 + 5 * place, stream_id=place, **how).tokens
        for place, prompt in enumerate(prompts)
    ]
    rows = [
        {"prompt": pair.ids(prompt), "stream_id": place, "max_new_tokens": 9 + 5 * place}
        for place, prompt in enumerate(prompts)
    ]
    accepted = 0
    with decoder.run_many(rows, batch_size=2, **how) as runs:
        ended = [done for _ in runs for done in runs.ended()] + list(runs.ended())
    assert len(ended) == len(prompts)
    for place, made in ended:
        assert made.tokens.equal(wanted[place])
        accepted += sum(int(step.num_accepted) for step in made.steps)
    assert accepted > 10


def test_traces_refuse_a_context_that_lives_across_requests(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, alone(across_requests=True), "fixed:4")
    with pytest.raises(ValueError, match="drafter hierarchy remembers earlier requests"):
        Tracer(decoder, TraceOptions((2, 4)))


# Files.


def test_the_drafter_is_made_from_a_folder_and_from_nothing(pair: TinyPair, tmp_path: Path) -> None:
    folder = tiny_store(tmp_path, pair, ["x = "])
    made: Any = resolve_drafter(f"hierarchy:store={folder},order=corpus+context,max_match=6", pair.target)
    assert (made.order, made.store.path, made.options.max_match) == (("corpus", "context"), folder, 6)
    assert resolve_drafter("hierarchy", pair.target).order == ("context",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hierarchy:order=context+disk", "option 'order.*': .*'context', 'model' or 'corpus'"),
        ("hierarchy:order=model+model", "order model.model names a store twice"),
        ("hierarchy:order=model", "order model needs a store"),
        ("hierarchy:min_match=9", "min_match 9 is above max_match 8"),
        ("hierarchy:store=nowhere", "nowhere is no store .*bpkit store build"),
    ],
)
def test_bad_options_are_named(pair: TinyPair, spec: str, says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        resolve_drafter(spec, pair.target)


def test_a_store_of_another_tokenizer_is_refused(pair: TinyPair, tmp_path: Path, tiny_folder: Path) -> None:
    target = SpeculativeDecoder.from_pretrained(tiny_folder / "target", "ngram").target
    vocab_size = target.config.vocab_size
    for name, facts in {"other ids": {"vocab_size": vocab_size - 1}, "other": {"tokenizer": "0" * 16}}.items():
        store_of(tmp_path / name, [[1, 2, 3, 4, 5]], **{"vocab_size": vocab_size, **facts})
        with pytest.raises(
            ValueError, match=f"store .*{name} has token ids of another tokenizer: it was made for tiny"
        ):
            resolve_drafter({"name": "hierarchy", "store": str(tmp_path / name)}, target)


def _pickled(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.array([{}]), allow_pickle=True)


def _more_rows(folder: Path) -> None:
    facts = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**facts, "ngrams": facts["ngrams"] + 1}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_pickled, r"tokens.npy cannot be read \(Array .*Python objects"),
        (_more_rows, "ngrams.npy holds .* where store.json says"),
        (lambda folder: (folder / "likeliest.npy").write_bytes(pickle.dumps({})), "likeliest.npy cannot be read"),
        (lambda folder: (folder / "suffixes.npy").unlink(), "suffixes.npy is missing"),
        (lambda folder: (folder / "store.json").write_text("{}"), "store.json is no description"),
        (lambda folder: (folder / "store.json").write_text(" " * 2**21), "more than"),
        (lambda folder: np.save(folder / "suffix_firsts.npy", np.full(101, 9999, "<u4")), "does not belong"),
    ],
)
def test_files_that_are_damaged_or_not_a_stores_are_refused(
    store: Store, pair: TinyPair, spoil: Any, says: str
) -> None:
    spoil(store.path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        HierarchyDrafter.load("", pair.target, store=str(store.path))


def test_arrays_are_mapped_and_too_large_ones_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(store.corpus._starts.obj, np.memmap)
    monkeypatch.setattr(files, "MAX_BYTES", 150)
    with pytest.raises(ValueError, match=r"npy has [\d,]+ bytes, and 150 is the most"):
        open_store(store.path)


def test_ids_that_the_vocabulary_lacks_are_never_drafted(store: Store) -> None:
    tokens = np.load(store.path / "tokens.npy")
    tokens[tokens == 5] = 5000
    np.save(store.path / "tokens.npy", tokens)
    assert found(open_store(store.path).corpus.find([2, 3], range(8, 1, -1), 4)) == ([4], 2)
    ngrams = np.load(store.path / "ngrams.npy")
    np.save(store.path / "ngrams.npy", (ngrams + 100).astype(ngrams.dtype))
    with pytest.raises(ValueError, match=r"ngrams.npy has token ids of 100 or more"):
        open_store(store.path)
