"""Rows that draft together draft what each would alone, whatever their sizes, and whoever comes and goes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor

from bpkit.decode.drafter import Drafter, DrafterSession, GoOn, Proposal
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.sampling import Draw, Processors, Sampler, Samplers
from bpkit.decode.slots import SlotCache
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession
from bpkit.draft.block_diffusion import BlockDiffusionDrafter, padded_pass
from bpkit.draft.config import HierarchyConfig
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel
from bpkit.draft.hierarchy import HierarchyDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.testing import TinyPair
from bpkit.testing.models import AgreeableDrafter
from tests.tiny_architectures import tiny_causal_lm
from tests.tiny_store import store_of

CLOSE = 2e-4
LARGEST = 8
TOKENS = 60
"""Token ids that texts are made of; few, so that n-grams come again."""


class Row:
    """A row whose text goes on by itself: in a batch of changing rows, and in a session of its own."""

    def __init__(
        self, pair: TinyPair, drafter: Drafter, number: int, rng: random.Random, length: int | None = None
    ) -> None:
        self.drafter, self.rng, self.number = drafter, rng, number
        self.vocab = len(pair.tokenizer)
        length = length or rng.choice((1, 3, 9, 25, 40))
        prompt = torch.tensor([[rng.randrange(TOKENS) for _ in range(length)]])
        self.texts = [RowText(prompt, 300) for _ in range(2)]
        self.alone = RunningText([self.texts[1]])
        self.session = drafter.begin(self.alone)
        processors = [RepetitionPenaltyLogitsProcessor(1.2)] if number % 3 == 2 else []
        self.samplers = [
            Sampler(
                text,
                Processors(LogitsProcessorList(processors)),
                GumbelNoise(5, number, self.vocab, prompt.device) if number % 2 else None,
            )
            for text in self.texts
        ]

    @property
    def text(self) -> RowText:
        """Its text in the batch."""
        return self.texts[0]

    def own_session(self) -> DrafterSession:
        """One that serves this row alone: a fresh one, where the text is all that it needs to know."""
        if self.drafter.feature_layers or isinstance(self.drafter, AgreeableDrafter):  # which read other tokens
            return self.session
        tokens = torch.tensor([self.text.tokens])
        text = RunningText([RowText(tokens[:, :-1], 300)])
        session = self.drafter.begin(text)
        append(text, [self.text.tokens[-1:]])
        session.advance(None)
        return session

    def features(self, count: int) -> Tensor:
        """Any will do: [count, layers * hidden]."""
        generator = torch.Generator().manual_seed(self.rng.randrange(10**6))
        return torch.randn(count, 64 * len(self.drafter.feature_layers), generator=generator)

    def decided(self, drafted: Sequence[int]) -> list[int]:
        """Some of the drafted tokens, and another."""
        return [*drafted[: self.rng.choice((0, len(drafted), self.rng.randint(0, len(drafted))))], self.anchor()]

    def anchor(self) -> int:
        return self.rng.randrange(TOKENS)


class Batch:
    """Rows that run together."""

    def __init__(self, drafter: Drafter, rows: list[Row]) -> None:
        self.drafter, self.rows = drafter, rows
        self.text = RunningText([row.text for row in rows])
        self.session: DrafterSession = drafter.begin(self.text)
        self.advance([[row.anchor()] for row in rows], prompts=True)

    def advance(self, tokens: list[list[int]], *, prompts: bool = False) -> None:
        """Append tokens to each row, here and in its session alone."""
        read = [row.text.length if prompts else len(own) for row, own in zip(self.rows, tokens, strict=True)]
        features = [row.features(count) for row, count in zip(self.rows, read, strict=True)]
        append(self.text, tokens)
        reads = bool(self.drafter.feature_layers)
        self.session.advance(features if reads else None)
        for row, own, seen in zip(self.rows, tokens, features, strict=True):
            append(row.alone, [own])
            row.session.advance([seen] if reads else None)

    def join(self, other: Batch) -> None:
        self.rows += other.rows
        self.text.join(other.text)
        self.session.join(other.session)

    def keep(self, places: list[int]) -> None:
        self.rows = [self.rows[place] for place in places]
        self.text.keep(places)
        self.session.keep(places)

    def room(self, row: Row) -> int:
        """Tokens that an assistant has positions for; how far it reads, it must end there."""
        assert isinstance(self.drafter, AutoregressiveDrafter)
        assert isinstance(self.session, AutoregressiveSession)
        limit = self.drafter.positions
        if limit is None:
            return LARGEST
        assert max(self.session.held) <= limit
        return max(0, limit - row.text.length + 1)

    def draft_together(self, sizes: list[int], go_on: GoOn | None) -> Proposal:
        return self.session.draft(sizes, Draw(Samplers([row.samplers[0] for row in self.rows])), go_on)

    def draft(self, sizes: list[int], go_on: Callable[[Sequence[Row]], GoOn] | None) -> list[list[int]]:
        """Draft together and alone; the same tokens are drafted, of each row."""
        if max(sizes) == 1:
            return [[] for _ in sizes]
        asked = go_on(self.rows) if go_on else None
        made = self.draft_together(sizes, asked)
        assert len(made.counts) == made.tokens.shape[0] == len(sizes)
        drafted = []
        for place, (row, size) in enumerate(zip(self.rows, sizes, strict=True)):
            count = made.counts[place]
            drafted.append(made.tokens[place, :count].tolist())
            if size == 1:
                assert count == 0
                continue
            if asked is not None:
                assert all(token % 3 for token in drafted[-1][:-1])
                assert count == min(size - 1, self.room(row)) or drafted[-1][-1] % 3 == 0
            alone = row.own_session().draft([size], Draw(Samplers([row.samplers[1]])), go_on([row]) if go_on else None)
            same_draft(made, place, alone)
        return drafted


def append(text: RunningText, tokens: list[list[int]]) -> None:
    """Append them, with something behind those of the shorter rows."""
    width = max(map(len, tokens)) + 2
    ids = torch.tensor([own + [3] * (width - len(own)) for own in tokens])
    text.append(ids, torch.tensor([own[-1:] for own in tokens]), tokens)


def same_draft(made: Proposal, place: int, alone: Proposal) -> None:
    (count,) = alone.counts
    assert made.counts[place] == count
    assert made.tokens[place, :count].tolist() == alone.tokens[0, :count].tolist()
    for ours, theirs in ((made.scores, alone.scores), (made.hidden, alone.hidden)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None and count:
            a, b = ours[place, :count], theirs[0, :count]
            assert (a - b).nan_to_num().abs().max() < CLOSE
            assert a.isfinite().equal(b.isfinite())


def run(drafter: Drafter, pair: TinyPair, seed: int, go_on: Callable[[Sequence[Row]], GoOn] | None = None) -> int:
    """Rows come and go for some steps; how many drafts of two rows or more were compared."""
    rng, numbers, compared = random.Random(seed), iter(range(1000)), 0

    def rows(count: int) -> list[Row]:
        return [Row(pair, drafter, next(numbers), rng) for _ in range(count)]

    batch = Batch(drafter, rows(rng.randint(1, 3)))
    for _ in range(14):
        happens = rng.random()
        if happens < 0.25 and len(batch.rows) < 5:
            batch.join(Batch(drafter, rows(rng.randint(1, 2))))
        elif happens < 0.45 and len(batch.rows) > 1:
            batch.keep(rng.sample(range(len(batch.rows)), len(batch.rows) - 1))
        elif happens > 0.9:
            batch.advance([[row.anchor() for _ in range(rng.randint(1, 40))] for row in batch.rows])
        sizes = [rng.choice((1, 2, 3, LARGEST, rng.randint(1, LARGEST))) for _ in batch.rows]
        drafted = batch.draft(sizes, go_on)
        compared += sum(map(bool, drafted)) > 1
        batch.advance([row.decided(own) for row, own in zip(batch.rows, drafted, strict=True)])
    return compared


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding, causal": {"layer_types": ["sliding_attention", "full_attention"]},
    "sliding": {"layer_types": ["sliding_attention"] * 2, "is_causal": False},
    "causal": {"is_causal": True},
    "eager sliding": {"layer_types": ["sliding_attention", "full_attention"], "attn_implementation": "eager"},
}


def dflash(pair: TinyPair, *, layer_types: Sequence[str] = ("full_attention",) * 2, **config: Any) -> Drafter:
    """A drafter of two layers, whose random weights are large enough for its window to matter."""
    usual = pair.drafter_model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DFlashModel(
            DFlashConfig(
                hidden_size=usual.hidden_size,
                intermediate_size=usual.intermediate_size,
                num_attention_heads=usual.num_attention_heads,
                num_key_value_heads=usual.num_key_value_heads,
                head_dim=usual.head_dim,
                vocab_size=usual.vocab_size,
                block_size=usual.block_size,
                mask_token_id=usual.mask_token_id,
                target_layer_ids=usual.target_layer_ids,
                num_hidden_layers=2,
                initializer_range=0.3,
                layer_types=list(layer_types),
                use_sliding_window="sliding_attention" in layer_types,
                sliding_window=5,
                **config,
            )
        )
    return BlockDiffusionDrafter(model.float().eval(), pair.target)


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_rows_are_those_of_each_alone(pair: TinyPair, variant: str) -> None:
    drafter = dflash(pair, **VARIANTS[variant])
    with torch.inference_mode():
        assert sum(run(drafter, pair, seed) for seed in range(3)) > 12


def test_a_pass_writes_what_counts_where_it_stands_in_the_text_and_padding_where_nobody_looks(pair: TinyPair) -> None:
    cache = SlotCache(pair.drafter_model.config, rows=3, slots=3, capacity=50)
    cache.held = [4, 0, 9]
    reading, inputs = padded_pass(cache, [1, 3, 2], [2, 1, 4], torch.device("cpu"))
    assert reading.places is not None
    assert reading.places.tolist() == [
        [4, 50, 50, 5, 6, 50, 50],
        [0, 1, 2, 3, 50, 50, 50],
        [9, 10, 50, 11, 12, 13, 14],
    ]
    assert (reading.lengths, reading.end, inputs["key_end"]) == ((0, 9), 15, 15)
    assert inputs["attention_mask"].sum(dim=-1).flatten().tolist() == [7, 4, 15]


def going_on(rows: Sequence[Row]) -> GoOn:
    """Goes on by what was drafted, and not for ever."""
    return lambda latest: [token % 3 > 0 for token in latest.tokens[:, -1].tolist()]


@pytest.mark.parametrize("early", [None, going_on], ids=["whole drafts", "ended early"])
def test_tokens_of_rows_are_those_of_each_alone(pair: TinyPair, early: Callable[[Sequence[Row]], GoOn] | None) -> None:
    for drafter in (pair.autoregressive(), pair.agreeable(0.3)):
        with torch.inference_mode():
            assert sum(run(drafter, pair, seed, early) for seed in range(3)) > 12


ASSISTANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"max_position_embeddings": 40},  # drafts of some rows end before those of others
    "mistral": {},  # sliding windows
    "gemma3_text": {},  # sliding and full ones
    "bloom": {},  # rows have passes of their own
    "qwen3_5_text": {},  # states
}


@pytest.mark.filterwarnings("ignore:drafter assistant has 40 positions")
@pytest.mark.parametrize("model_type", ASSISTANTS)
def test_assistants_of_many_kinds_draft_for_each_row_as_if_it_were_alone(pair: TinyPair, model_type: str) -> None:
    model = tiny_causal_lm(model_type, vocab_size=len(pair.tokenizer), **ASSISTANTS[model_type])
    drafter = AutoregressiveDrafter(model, pair.target)
    with torch.inference_mode():
        assert run(drafter, pair, 2, going_on) > 3


def test_ngrams_of_rows_are_those_of_each_alone(pair: TinyPair) -> None:
    assert sum(run(NgramDrafter(), pair, seed) for seed in range(6)) > 6


def test_stores_of_rows_are_those_of_each_alone(pair: TinyPair, tmp_path: Path) -> None:
    rng = random.Random(0)
    store = store_of(tmp_path, [[rng.randrange(TOKENS) for _ in range(80)] for _ in range(9)])
    drafter = HierarchyDrafter(store, HierarchyConfig(order=("corpus", "context", "model")))
    assert sum(run(drafter, pair, seed) for seed in range(6)) > 20
    assert set(drafter.drafts) == {"context", "model", "corpus"}


def one_row(drafter: Drafter, pair: TinyPair, model: nn.Module) -> list[dict[str, Any]]:
    """What a drafter's model is called with while one row drafts 3 tokens, of which 1 stands, then all, then none."""
    calls: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(lambda _, args, inputs: calls.append(inputs), with_kwargs=True)
    batch = Batch(drafter, [Row(pair, drafter, 0, random.Random(1))])
    with torch.inference_mode():
        for stands in (1, 3, 0):
            drafted = batch.draft_together([4], None).tokens[0].tolist()
            batch.advance([[*drafted[:stands], 5]])
    hook.remove()
    return calls


def test_a_row_alone_reads_what_it_always_read(pair: TinyPair) -> None:
    """In counts that traces and cost models know, and without masks."""
    blocks, assistant = pair.block_diffusion(), pair.autoregressive()
    length = Row(pair, blocks, 0, random.Random(1)).text.length
    calls = one_row(blocks, pair, blocks.model)
    assert [call["context_hidden_states"].shape[1] for call in calls] == [length, 2, 4]
    assert all(call.get("attention_mask") is None for call in calls)
    calls = one_row(assistant, pair, assistant.model)
    assert [call["input_ids"].shape[1] for call in calls] == [length + 1, 1, 1, 1, 1, 1, 2, 1, 1]
    assert all(call.get("attention_mask") is None for call in calls)


@pytest.mark.parametrize("kind", ["block diffusion", "autoregressive"])
def test_rows_that_join_do_not_make_others_read_their_prompts(pair: TinyPair, kind: str) -> None:
    drafter: Drafter = pair.block_diffusion() if kind == "block diffusion" else pair.autoregressive()
    model, name = (
        (pair.drafter_model, "context_hidden_states") if kind == "block diffusion" else (pair.assistant, "input_ids")
    )
    rng, shapes = random.Random(0), []
    running, new = (
        Batch(drafter, [Row(pair, drafter, number, rng, length) for number in range(2)]) for length in (9, 60)
    )
    with torch.inference_mode():
        running.advance([row.decided(own) for row, own in zip(running.rows, running.draft([3, 2], None), strict=True)])
        hook = model.register_forward_pre_hook(
            lambda _, args, inputs: shapes.append(list(inputs[name].shape[:2])), with_kwargs=True
        )
        running.join(new)
        running.keep([2, 0, 3, 1])
        assert shapes == [], "nobody has drafted for them yet"
        running.draft_together([4, 2, 2, 3], None)
        hook.remove()
        assert sum(rows == 2 and width >= 60 for rows, width in shapes) == 1
        assert max(width for rows, width in shapes if rows == 4) <= 3
        running.advance([[7]] * 4)
        assert all(running.draft([5, 2, 3, 2], None))
