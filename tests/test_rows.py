"""Many rows at once: the text of each is what it is alone, whoever runs beside it, and however much is drafted."""

from __future__ import annotations

import functools
import gc
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from bpkit import Context, Draft, Feature, Policy, PolicyConfig, SpeculativeDecoder, Step
from bpkit.assets import prompts
from bpkit.decode import loop
from bpkit.decode.drafter import Drafter
from bpkit.decode.result import Generation, RowFailure
from bpkit.decode.rows import Rows
from bpkit.draft.last_pass import LastPassDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import State
from bpkit.registry.discovery import registry
from bpkit.testing import TinyPair
from bpkit.types import Prefill

if TYPE_CHECKING:
    from tests.conftest import Plain, PlainDecoding, ShippedPair

SEED = 11
DRAFTERS = ("block-diffusion", "autoregressive", "early-exit", "agreeable", "n-gram", "last-pass")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "T=1": {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
}
WORDS = ("def f(a, b):\n    return ", "x", "1, 2, 3, 1, 2, 3, 1, 2,", "The quick brown fox", "a" * 90, "[", "x = ")
PROMPTS = tuple(f"{WORDS[i % len(WORDS)]}{i if i % 3 else ''}" for i in range(64))
"""Of 1 to 92 tokens."""


class RandomConfig(PolicyConfig):
    seed: int = 0


class RandomPolicy(Policy):
    """Any size for each row, of which any part is verified. Its state says whose it is."""

    Config = RandomConfig
    wants = frozenset({Feature.DRAFT_TOKENS, Feature.ANCHOR_ENTROPY})

    def bind(self, decoder: Any, cost: Any = None) -> None:
        self.most = decoder.max_block_size

    def begin(self, context: Context) -> State:
        assert context.running >= context.batch_size == len(context.row_ids)
        return {"row": torch.tensor(context.row_ids), "seen": torch.zeros(context.batch_size, 2).long()}

    def select(self, state: State, context: Context) -> Tensor:
        assert state["row"].tolist() == list(context.row_ids)
        assert context.running == context.batch_size
        assert (state["seen"][:, 0] + 1).equal(context.position)
        assert context[Feature.ANCHOR_ENTROPY].shape == (context.batch_size,)
        sizes = torch.randint(1, self.most + 1, (context.batch_size,), generator=context.generator)
        nobody = torch.rand(context.batch_size, generator=context.generator) < 0.2
        return sizes.masked_fill(nobody, 1)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return torch.rand(len(draft.block_size), generator=draft.context.generator) < 0.8

    def truncate(self, state: State, draft: Draft) -> Tensor:
        assert draft[Feature.DRAFT_TOKENS].shape == draft.tokens.shape
        assert bool((draft.draft_length < draft.block_size).all())
        part = torch.rand(len(draft.block_size), generator=draft.context.generator)
        return (part * (draft.draft_length + 1)).long()

    def observe(self, state: State, step: Step) -> None:
        assert state["row"].tolist() == list(step.row_ids)
        state["seen"][:, 0] += step.acceptance_length
        state["seen"][:, 1] += 1


def drafter_of(pair: TinyPair, name: str) -> Drafter:
    made: dict[str, Any] = {
        "block-diffusion": pair.block_diffusion,
        "autoregressive": pair.autoregressive,
        "early-exit": pair.early_exit,
        "agreeable": lambda: pair.agreeable(0.3),
        "n-gram": NgramDrafter,
        "last-pass": LastPassDrafter,
    }
    drafter: Drafter = made[name]()
    return drafter


def limit_of(place: int) -> int:
    return 1 + 7 * place % 23


@dataclass
class Reference:
    """Plain decoding of each prompt, made once, with an end token that some texts have."""

    pair: TinyPair
    plain: PlainDecoding

    @functools.cache  # noqa: B019 (one object for all tests)
    def text(self, sampling: str, place: int, end: int | None) -> Plain:
        sampled = SAMPLINGS[sampling]["temperature"] > 0
        return self.plain(
            self.pair.target,
            self.pair.ids(PROMPTS[place]),
            max_new_tokens=limit_of(place),
            processors=[TemperatureLogitsWarper(1.0), TopPLogitsWarper(0.9)] if sampled else [],
            seed=SEED if sampled else None,
            stream_id=place,
            ends=[] if end is None else [end],
        )

    @functools.cache  # noqa: B019
    def end(self, sampling: str) -> int:
        """A token within several of the texts."""
        inside = [token for place in range(24) for token in self.text(sampling, place, None).tokens[1:-1]]
        return max(set(inside), key=inside.count)

    __hash__ = object.__hash__


@pytest.fixture(scope="module")
def reference(pair: TinyPair, plain: PlainDecoding) -> Reference:
    return Reference(pair, plain)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step; after each step the slots must hold exactly the accepted tokens."""
    counts: list[int] = []
    step = loop.step

    def checked(rows: Rows, policy: Any) -> Step:
        made = step(rows, policy)
        assert rows.target.held == [row.length - 1 for row in rows.text.rows]
        counts.append(len(rows))
        return made

    monkeypatch.setattr(loop, "step", checked)
    return counts


def check(
    reference: Reference, drafter: Drafter, sampling: str, places: list[int], batch_size: int, policy: Any, **more: Any
) -> int:
    """Decode prompts in this order; each text must be plain decoding's. Returns how many part at a near tie."""
    pair = reference.pair
    end = reference.end(sampling)
    decoder = SpeculativeDecoder(pair.target, drafter, policy, tokenizer=pair.tokenizer, strict=True)
    rows = [{"prompt": PROMPTS[i], "max_new_tokens": limit_of(i), "stream_id": i} for i in places]
    seed = SEED if SAMPLINGS[sampling]["temperature"] > 0 else None
    made = decoder.generate(rows, batch_size=batch_size, eos_token_id=end, seed=seed, **SAMPLINGS[sampling], **more)
    assert [one.error for one in made] == [None] * len(rows)
    texts = [reference.text(sampling, place, end) for place in places]
    return sum(text.near_tie_where_it_differs(one.tokens) for text, one in zip(texts, made, strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_text_is_what_it_is_alone(
    reference: Reference, held: list[int], drafter: str, sampling: str, data: st.DataObject
) -> None:
    places = data.draw(st.permutations(range(24)))[: data.draw(st.integers(2, 12))]
    batch_size, chunk = data.draw(st.sampled_from([1, 3, 8])), data.draw(st.sampled_from([None, 1, 16]))
    policy = RandomPolicy(seed=data.draw(st.integers(0, 9)))
    held.clear()
    ties = check(
        reference, drafter_of(reference.pair, drafter), sampling, places, batch_size, policy, prefill_chunk=chunk
    )
    assert ties <= 1
    assert max(held, default=0) <= batch_size
    end = reference.end(sampling)
    first = [place for place in places[:batch_size] if len(reference.text(sampling, place, end).tokens) > 1]
    if chunk is None and first:  # none that prefill has ended
        assert held[0] == len(first)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_64_prompts_at_three_batch_sizes(reference: Reference, held: list[int], drafter: str) -> None:
    """Each pair of drafter, batch size and sampling. All three together have fewer prompts, in the test above."""
    ties = 0
    for turn, batch_size in enumerate((1, 3, 8), DRAFTERS.index(drafter)):
        sampling = list(SAMPLINGS)[turn % len(SAMPLINGS)]
        order = torch.randperm(64, generator=torch.Generator().manual_seed(batch_size)).tolist()
        order = order[:12] if batch_size == 1 else order  # alone, step by step, takes longest and tries least
        made = drafter_of(reference.pair, drafter)
        ties += check(reference, made, sampling, order, batch_size, RandomPolicy())
        assert max(held) == batch_size
        held.clear()
    assert ties <= 2


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_several_of_the_prompts_end_by_their_end_token(reference: Reference, sampling: str) -> None:
    ended = [len(reference.text(sampling, i, reference.end(sampling)).tokens) < limit_of(i) for i in range(64)]
    assert sum(ended) >= 6


TRAINED = {"blockpilot", "delayed_tree", "forecast", "ldlp", "ldlp_threshold", "specdecpp", "onnx"}
"""Policies whose weights are of the shipped pair."""


@pytest.mark.parametrize("policy", sorted(registry().policies.keys() - TRAINED))
def test_every_policy_gives_the_text_of_each_row(reference: Reference, held: list[int], policy: str) -> None:
    pair = reference.pair
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.3), policy, tokenizer=pair.tokenizer, strict=True)
    check(reference, decoder.drafter, "greedy", list(range(10)), 4, decoder.policy)
    assert max(held) == 4


TRAINED_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9, "seed": 4},
)


@pytest.fixture(scope="module")
def shipped_rows() -> list[dict[str, Any]]:
    return [{"prompt": prompt["prompt"], "max_new_tokens": 6 + 5 * i} for i, prompt in enumerate(prompts(limit=2))]


@pytest.fixture(scope="module")
def shipped_texts(shipped: ShippedPair, shipped_rows: list[dict[str, Any]]) -> list[list[str | None]]:
    """The text of each row decoded plainly and alone, under each sampling."""
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:1", tokenizer=shipped.tokenizer)
    return [
        [one.text for one in decoder.generate(shipped_rows, batch_size=1, **options)] for options in TRAINED_SAMPLINGS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [*sorted(TRAINED - {"onnx"}), "forecast:truncate=true", "onnx:forecast"])
def test_every_trained_policy_gives_the_text_of_each_row(
    shipped: ShippedPair,
    shipped_rows: list[dict[str, Any]],
    shipped_texts: list[list[str | None]],
    held: list[int],
    policy: str,
) -> None:
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, policy, tokenizer=shipped.tokenizer, strict=True)
    for options, texts in zip(TRAINED_SAMPLINGS, shipped_texts, strict=True):
        made = decoder.generate(shipped_rows, batch_size=3, **options)
        assert [one.text for one in made] == texts
        assert max(held) == 3
        held.clear()


# Rows that join, leave and fail


def test_a_long_prompt_does_not_stop_the_others(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:3", tokenizer=pair.tokenizer)
    long = "long " * 60
    rows: list[dict[str, Any]] = [
        {"prompt": "x", "max_new_tokens": 60},
        {"prompt": "y", "max_new_tokens": 2},
        {"prompt": long},
    ]
    wanted: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 8, "temperature": 0.0}
    whole, chunked = decoder.generate(rows, **wanted), decoder.generate(rows, prefill_chunk=32, **wanted)
    assert [one.tokens.tolist() for one in whole] == [one.tokens.tolist() for one in chunked]

    def steps_before_the_long_one(chunk: int | None) -> int:
        records = list(decoder.run_many(rows, prefill_chunk=chunk, **wanted))
        began = [place for place, record in enumerate(records) if isinstance(record, Prefill)]
        return began[-1] - began[-2] - 1

    assert steps_before_the_long_one(32) >= steps_before_the_long_one(None) + len(long) // 32


def test_prompts_are_asked_for_when_there_is_room(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, NgramDrafter(), "fixed:2", tokenizer=pair.tokenizer)
    asked: list[int] = []
    running: set[int] = set()

    def prompts() -> Iterator[str]:
        for place in range(7):
            assert len(running) < 3
            asked.append(place)
            running.add(place)
            yield f"x = {place}"

    texts = dict.fromkeys(range(7), "")
    for piece in decoder.stream_many(prompts(), batch_size=3, max_new_tokens=9, temperature=0.0):
        texts[piece.place] += piece.text
        if piece.generation is not None:
            running.discard(piece.place)
            assert piece.generation.text == texts[piece.place]
    assert asked == list(range(7))
    alone = [decoder.generate(f"x = {place}", max_new_tokens=9, temperature=0.0).text for place in range(7)]
    assert list(texts.values()) == alone


class Breaks(LogitsProcessor):
    """Raises where a text has come to so many tokens."""

    stateless = True

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] >= self.length:
            raise RuntimeError(f"no more than {self.length} tokens")
        return scores


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_row_that_fails_names_itself_and_the_others_go_on(pair: TinyPair, drafter: str) -> None:
    decoder = SpeculativeDecoder(pair.target, drafter_of(pair, drafter), "fixed:3", tokenizer=pair.tokenizer)
    rows: list[Any] = [f"x = {place}" for place in range(5)]
    wanted: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    right = decoder.generate(rows, batch_size=3, **wanted)
    rows[1] = {"prompt": rows[1], "logits_processor": LogitsProcessorList([Breaks(11)])}
    rows[3] = {"prompt": ""}
    made = decoder.generate(rows, batch_size=3, **wanted)
    assert str(made[1].error) == "prompt 1: RuntimeError: no more than 11 tokens"
    assert isinstance(made[1].error, RowFailure)
    assert isinstance(made[1].error.__cause__, RuntimeError)
    assert made[1].tokens.tolist()[0] == right[1].tokens.tolist()[0][: made[1].tokens.shape[1]]
    assert "prompt 3: ValueError: the prompt is empty" in str(made[3].error)
    for place in (0, 2, 4):
        assert made[place].tokens.equal(right[place].tokens)


@pytest.mark.filterwarnings("ignore:policy Forgets.select")
def test_a_faulty_policy_costs_speed_only(pair: TinyPair) -> None:
    class Forgets(Policy):
        """Its state cannot be moved: a list where the batch axis should come first."""

        wants = frozenset()

        def begin(self, context: Context) -> Any:
            return {"sizes": [1] * context.batch_size}

        def select(self, state: State, context: Context) -> Tensor:
            return torch.tensor(state["sizes"]) + 2

    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:3", tokenizer=pair.tokenizer)
    faulty = decoder.with_policy(Forgets())
    prompts = [{"prompt": f"x = {place}", "max_new_tokens": 4 + 5 * place} for place in range(4)]
    with pytest.warns(UserWarning, match="its rows cannot join others"):
        made = faulty.generate(prompts, batch_size=2, temperature=0.0)
    right = decoder.generate(prompts, batch_size=2, temperature=0.0)
    assert [one.text for one in made] == [one.text for one in right]
    assert any(one.fallbacks for one in made)


def test_records_tell_rows_apart(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:4", tokenizer=pair.tokenizer)
    tokens: dict[int, list[int]] = {}
    with decoder.run_many(
        ["x = 1", "y", "z" * 40, "1, 2, 1, 2"], batch_size=2, max_new_tokens=11, temperature=0
    ) as runs:
        results: dict[int, Generation] = {}
        for record in runs:
            for place, row in runs.rows_of(record):
                tokens.setdefault(place, []).extend(row.tokens[0].tolist())
                assert row.tokens.shape == (1, 1 if isinstance(row, Prefill) else int(row.num_accepted) + 1)
            results |= dict(runs.ended())
    assert sorted(results) == [0, 1, 2, 3]
    for place, result in results.items():
        assert result.tokens[0].tolist() == tokens[place]
        assert [step.row_ids for step in result.steps] == [result.prefill.row_ids] * len(result.steps)
        assert all(b.position - a.position == a.acceptance_length for a, b in pairwise(result.steps))
        assert result.steps[-1].stopped == (True,)


def test_unfit_arguments_are_refused(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, NgramDrafter(), tokenizer=pair.tokenizer)
    with pytest.raises(ValueError, match="batch_size 0"):
        decoder.generate(["x"], batch_size=0, max_new_tokens=2)
    (made,) = decoder.generate([{"prompt": "x", "policy": "fixed:2"}], max_new_tokens=2)
    assert "policy: all rows share it" in str(made.error)
    (made,) = decoder.generate([{"text": "x"}], max_new_tokens=2)
    assert "a mapping with one as" in str(made.error)
    with pytest.raises(ValueError, match=r"give a list, as in decoder.generate\(\[prompt\] \* 2"):
        decoder.generate("x", num_return_sequences=2, temperature=1.0, max_new_tokens=2)


def test_inputs_beside_tokens_are_refused_beside_other_rows(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, NgramDrafter(), tokenizer=pair.tokenizer)
    rows: list[Any] = ["x = 1", {"prompt": pair.ids("abc"), "position_ids": torch.tensor([[0, 3, 5]])}, "y"]
    made = decoder.generate(rows, batch_size=3, max_new_tokens=4, temperature=0.0)
    assert "position_ids: beside other rows this target takes token ids only" in str(made[1].error)
    assert made[0].error is made[2].error is None


# transformers' own door


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_left_padded_batch_gives_what_transformers_gives(pair: TinyPair, drafter: str) -> None:
    decoder = SpeculativeDecoder(pair.target, drafter_of(pair, drafter), RandomPolicy(), strict=True)
    texts = ["x", "def f(a, b):\n    return ", "1, 2, 3, 1, 2, 3", "The quick brown fox"]
    padded = pair.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    free = pair.target.generate(**padded, max_new_tokens=24, do_sample=False)
    end = int(free[1, -12])  # so that rows end at different places
    wanted = {**padded, "max_new_tokens": 24, "do_sample": False, "eos_token_id": [end, pair.tokenizer.eos_token_id]}
    for more in ({}, {"min_new_tokens": 14}, {"no_repeat_ngram_size": 2}):
        plain = pair.target.generate(**wanted, **more)
        assert pair.target.generate(**wanted, **more, custom_generate=decoder).equal(plain)
    made = pair.target.generate(**wanted, custom_generate=decoder, return_dict_in_generate=True)
    assert made.sequences.shape[0] == len(made.generations) == 4


def test_several_sequences_of_one_prompt(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:3")
    ids = pair.ids("x = ")
    wanted = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "seed": 5}
    made = pair.target.generate(ids, **wanted, num_return_sequences=3, custom_generate=decoder, eos_token_id=None)
    alone = [
        pair.target.generate(ids, **wanted, stream_id=i, custom_generate=decoder, eos_token_id=None) for i in range(3)
    ]
    assert made.equal(torch.cat(alone))
    assert len({tuple(row) for row in made.tolist()}) == 3
    each = pair.target.generate(
        ids.expand(2, -1), **{**wanted, "seed": [5, 6]}, stream_id=[2, 2], custom_generate=decoder, eos_token_id=None
    )
    assert each[:1].equal(alone[2])
    assert not each[1:].equal(alone[2])


def test_what_cannot_be_told_apart_by_row_is_refused(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, NgramDrafter())
    ids = pair.ids("x = 1").expand(2, -1)
    hidden = torch.ones_like(ids)
    hidden[0, 2] = 0
    with pytest.raises(ValueError, match="only padding on its left may be hidden"):
        pair.target.generate(ids, attention_mask=hidden, max_new_tokens=2, custom_generate=decoder)
    with pytest.raises(ValueError, match="looks at the prompts of all 2 rows"):
        pair.target.generate(ids, encoder_repetition_penalty=1.5, max_new_tokens=2, custom_generate=decoder)
    with pytest.raises(ValueError, match="seed has 3 values for 2 rows"):
        pair.target.generate(ids, do_sample=True, seed=[1, 2, 3], max_new_tokens=2, custom_generate=decoder)


@pytest.mark.slow
def test_memory_stays_flat_over_1000_requests(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), RandomPolicy(), tokenizer=pair.tokenizer)
    prompts = (f"{place % 37} + " + "x" * (place % 50) for place in range(1000))
    ended, after_warm_up = 0, 0
    for piece in decoder.stream_many(prompts, batch_size=8, max_new_tokens=6, temperature=0.0):
        ended += piece.generation is not None
        if ended == 300 and not after_warm_up:
            gc.collect()
            after_warm_up = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ended == 1000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - after_warm_up
    assert grown < 6_000, f"{grown} kB more after 700 further requests"
