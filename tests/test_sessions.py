"""Rows of a target session: each reads, forgets, comes and goes as if it were alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bpkit.decode.attention import NAME, grouped_sdpa, use_grouped_attention
from bpkit.decode.inputs import ModelInputs
from bpkit.decode.masks import added, causal
from bpkit.decode.row_by_row import CachedRows, StatefulRows
from bpkit.decode.serving import served_by, session_class
from bpkit.decode.slot_target import Pass, SlotTarget
from bpkit.decode.slots import Reading
from bpkit.decode.stateful import StatefulTarget
from bpkit.decode.target import TargetOutput
from tests.tiny_architectures import REPEATING, WINDOW, repeating_causal_lm, tiny_causal_lm

CLOSE = 2e-3
VOCABULARY = 60
ROWS = ("deepseek_v3", "gpt_oss", "gemma3n_text", *REPEATING, "mamba2", "lfm2", "bloom", "llama4_text")
"""Types whose rows are tried: latent attention, sinks, layers that share keys, those of the table, and row by row."""


class Reader:
    """A session that reads random texts, of which it knows all that it must have read."""

    def __init__(self, model: PreTrainedModel, seed: int = 0, **options: Any) -> None:
        self.model, self.random, self.options = model, random.Random(seed), options
        self.kind: Any = session_class(model)
        self.texts: list[list[int]] = []
        """What each row holds."""
        self.found: list[list[TargetOutput]] = []
        """Outputs of each row at those tokens, one at a time; prefill's have features alone."""
        self.session: Any = None

    def token(self) -> int:
        return self.random.randrange(2, VOCABULARY)

    def begin(self, lengths: Sequence[int], *, slots: int = 1, capacity: int = 64, chunk: int = 99) -> Reader:
        """Rows with prompts of these lengths, read in chunks."""
        layers = self.options.get("feature_layers", ())
        self.session = self.kind(
            self.model,
            rows=len(lengths),
            capacity=capacity,
            slots=slots,
            feature_layers=layers,
            keep_hidden=bool(layers),
        )
        self.texts, self.found = [[] for _ in lengths], [[] for _ in lengths]
        for start in range(0, max(lengths), chunk):
            self.read([max(0, min(chunk, length - start)) for length in lengths], prompt=True)
        return self

    def read(self, counts: Sequence[int], wrong: Sequence[int] | None = None, *, prompt: bool = False) -> None:
        """Read so many tokens of each row, of which the last ones are wrong and dropped."""
        wrong = wrong or [0] * len(counts)
        fed = [[self.token() for _ in range(count)] for count in counts]
        tokens = torch.full((len(counts), max(counts)), 1)
        for row, some in enumerate(fed):
            tokens[row, : len(some)] = torch.tensor(some, dtype=torch.long)
        session = self.session
        output = session.prefill(tokens, counts, last=False) if prompt else session.verify(tokens, counts)
        assert session.held == [len(text) + count for text, count in zip(self.texts, counts, strict=True)]
        for row, (count, last) in enumerate(zip(counts, wrong, strict=True)):
            self.texts[row] += fed[row][: count - last]
            for place in range(count - last):
                self.found[row].append(at(output, row, place, prompt=prompt))
        if not prompt:
            session.rollback(wrong)
        assert session.held == [len(text) for text in self.texts]

    def step(self) -> None:
        """Read with counts and rejections of all kinds."""
        counts = [self.random.choice((0, 1, 1, 2, 3, 5, 8)) for _ in self.texts]
        counts[self.random.randrange(len(counts))] = self.random.choice((1, 2, 6))
        # A row's anchor is never wrong.
        self.read(counts, [self.random.randrange(count) if count else 0 for count in counts])

    def keep(self, rows: Sequence[int]) -> None:
        self.session.keep(rows)
        self.texts = [self.texts[row] for row in rows]
        self.found = [self.found[row] for row in rows]
        assert self.session.held == [len(text) for text in self.texts]

    def join(self, lengths: Sequence[int], **options: Any) -> None:
        """New rows with prompts of these lengths, which read a step by themselves first."""
        other = Reader(self.model, self.random.randrange(99), **self.options).begin(lengths, **options)
        other.step()
        self.session.join(other.session)
        self.texts += other.texts
        self.found += other.found
        assert self.session.held == [len(text) for text in self.texts]

    def check(self) -> None:
        """What was found is what each row gives when it is read alone and at once."""
        for text, found in zip(self.texts, self.found, strict=True):
            with torch.inference_mode():
                whole = self.model(torch.tensor([text]), output_hidden_states=True)
            truth: dict[str, Any] = {
                "logits": whole.logits,
                "features": self._features(whole),
                "last_hidden": whole.hidden_states and whole.hidden_states[-1],
            }
            for name, wanted in truth.items():
                for place, output in enumerate(found):
                    value = getattr(output, name)
                    if value is not None:
                        error = (value - wanted[0, place]).abs().max() / wanted.std()
                        assert error < CLOSE, f"{name} at {place} of {len(text)}: {error:.2g}"

    def _features(self, whole: Any) -> Tensor | None:
        layers = self.options.get("feature_layers", ())
        return torch.cat([whole.hidden_states[i + 1] for i in layers], dim=-1) if layers else None


def at(output: TargetOutput, row: int, place: int, *, prompt: bool) -> TargetOutput:
    """What a pass gave at one place of a row."""
    features = None if output.features is None else output.features[row, place]
    if prompt:
        return TargetOutput(None, features, None)  # type: ignore[arg-type]
    hidden = None if output.last_hidden is None else output.last_hidden[row, place]
    return TargetOutput(output.logits[row, place], features, hidden)


def model_of(kind: str) -> PreTrainedModel:
    return repeating_causal_lm(kind) if kind in REPEATING else tiny_causal_lm(kind)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_all_lengths_read_what_each_reads_alone(kind: str, seed: int) -> None:
    reader = Reader(model_of(kind), seed, feature_layers=() if kind == "gemma3n_text" else (0, 1))
    with torch.inference_mode():
        reader.begin([1, 3 * WINDOW, 6, 2 * WINDOW], slots=4, capacity=110)
        for _ in range(12):
            reader.step()
    assert max(map(len, reader.texts)) > 5 * WINDOW
    reader.check()


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_windows_are_crossed_one_token_at_a_time(kind: str) -> None:
    reader = Reader(repeating_causal_lm(kind))
    with torch.inference_mode():
        reader.begin([1, 3, 4], slots=3)
        for _ in range(3 * WINDOW):
            reader.read([1, 1, 1])
    reader.check()


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "deepseek_v3", "qwen3_5_text"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_come_and_go(kind: str, seed: int) -> None:
    reader = Reader(model_of(kind), seed)
    with torch.inference_mode():
        reader.begin([5, 1], slots=3, capacity=60, chunk=2)
        for _ in range(8):
            reader.step()
            count = len(reader.texts)
            if count > 1 and reader.random.random() < 0.6:
                reader.keep(reader.random.sample(range(count), reader.random.randrange(1, count)))
            if len(reader.texts) < 5:
                lengths = [reader.random.randrange(1, 20) for _ in range(reader.random.randrange(1, 3))]
                reader.join(lengths, slots=len(lengths), capacity=reader.random.choice((40, 90)))
        reader.step()
    assert len(reader.texts) > 1
    reader.check()
    for row, text in enumerate(reader.texts):
        if kind != "qwen3_5_text":
            check_same(reader.session.cache(row), fresh(reader.model, text))


def fresh(model: PreTrainedModel, text: list[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([text]), past_key_values=cache, use_cache=True)
    return cache


def check_same(cache: DynamicCache, wanted: DynamicCache) -> None:
    assert cache.get_seq_length() == wanted.get_seq_length()
    for ours, theirs in zip(cache.layers, wanted.layers, strict=True):
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert one is not None
            assert other is not None
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_5_text"])
def test_prompts_read_in_chunks_give_what_they_give_at_once(kind: str) -> None:
    model = model_of(kind)
    tokens = torch.randint(2, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    made = []
    with torch.inference_mode():
        for chunks in ((20,), (7, 13), (1, 9, 9, 1)):
            session: Any = session_class(model)(
                model, rows=2, capacity=30, slots=2, feature_layers=(0,), keep_hidden=True
            )
            features, start = [], 0
            for count in chunks:
                part = tokens[:, start : start + count]
                output = session.prefill(part, [count] * 2, last=start + count == 20)
                features.append(output.features)
                start += count
            assert session.held == [20, 20]
            made.append((output.logits, output.last_hidden, torch.cat(features, dim=1)))
    assert made[0][0].shape == (2, 1, model.config.vocab_size)
    for other in made[1:]:
        for one, another in zip(made[0], other, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-3)


def test_what_is_left_over_in_slots_decides_nothing() -> None:
    model = repeating_causal_lm("gemma2")

    def logits(*, spoil: bool) -> Tensor:
        session = SlotTarget(model, rows=3, capacity=40, slots=4, feature_layers=(), keep_hidden=False)
        found, generator = [], torch.Generator().manual_seed(3)
        for counts, wrong in (([9, 1, 4], [0, 0, 0]), ([1, 5, 2], [0, 4, 1]), ([1, 1, 1], [0, 0, 0])):
            tokens = torch.randint(2, VOCABULARY, (3, max(counts)), generator=generator)
            if spoil:
                for layer in session.slot_cache.slot_layers:
                    for kept in (layer.keys, layer.values):
                        for slot, held in enumerate([*session.held, 0]):
                            if kept is not None:
                                kept[slot, :, held:] = 1e3
            output = session.verify(tokens, counts).logits
            session.rollback(wrong)
            found += [output[row, :count] for row, count in enumerate(counts)]
        return torch.cat(found)

    with torch.inference_mode():
        assert logits(spoil=True).equal(logits(spoil=False))


def test_nothing_is_allocated_or_moved_after_the_first_pass() -> None:
    reader = Reader(repeating_causal_lm("gemma2"))
    with torch.inference_mode():
        reader.begin([4, 9], slots=3, capacity=100)
        layers = reader.session.slot_cache.slot_layers

        def places() -> list[tuple[int, torch.Size]]:
            return [(kept.data_ptr(), kept.shape) for layer in layers for kept in (layer.keys, layer.values)]

        before = places()
        assert {shape[0] for _, shape in before} == {3}
        for _ in range(6):
            reader.step()
        reader.keep([1])
        reader.join([3, 5], slots=2, capacity=70)
        assert places() == before
        reader.join([3], slots=1, capacity=101)  # neither slots nor columns suffice
        assert places() != before
        assert reader.session.slot_cache.capacity == 356
    reader.check()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_pass_runs_over_buffers_that_stay_where_they_are(kind: str) -> None:
    """As a captured pass would: all of the slots is read at every length, and only numbers in the buffers change."""
    model = repeating_causal_lm(kind)
    width, capacity = 4, 40
    static, usual = (
        SlotTarget(model, rows=2, capacity=capacity, slots=2, feature_layers=(), keep_hidden=False) for _ in range(2)
    )
    tokens, places = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    rows = torch.arange(2)[:, None]
    reading = Reading(2, None, places, rows, (0, capacity), capacity + 1)
    masks = static._masks(places, reading)
    inputs = {"attention_mask": masks, "position_ids": places}
    prepared = Pass(tokens, reading, inputs)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        for counts, wrong in (([4, 2], [0, 0]), ([3, 4], [2, 1]), ([1, 4], [0, 0]), ([4, 0], [3, 0]), ([2, 2], [0, 0])):
            tokens.copy_(torch.randint(2, VOCABULARY, (2, width), generator=generator))
            places.copy_(torch.tensor(static.held)[:, None] + torch.arange(width))
            now = static._masks(places, reading)
            for buffer, value in zip(
                *([*m.values()] if isinstance(m, dict) else [m] for m in (masks, now)), strict=True
            ):
                buffer.copy_(value)
            found = static._run(prepared, 0).logits
            static.slot_cache.held = [held + count for held, count in zip(static.held, counts, strict=True)]
            expected = usual.verify(tokens, counts).logits
            for row, count in enumerate(counts):
                torch.testing.assert_close(found[row, :count], expected[row, :count], rtol=1e-3, atol=1e-3)
            static.rollback(wrong)
            usual.rollback(wrong)
            assert static.held == usual.held


def test_inputs_of_rows_go_with_them() -> None:
    """Positions that begin elsewhere, and types of tokens."""
    model, made = tiny_causal_lm("gpt2"), []
    inputs = [
        ModelInputs({}, {"position_ids": torch.tensor([[9 + row]]), "token_type_ids": torch.tensor([[row]])}, 4)
        for row in range(2)
    ]
    tokens = torch.arange(2, 18).view(2, 8)
    for kind in (SlotTarget, CachedRows):
        session: Any = kind(model, rows=2, capacity=30, slots=2, feature_layers=(), keep_hidden=False)
        session.inputs = inputs
        with torch.inference_mode():
            session.prefill(tokens[:, :4], [4, 4], last=True)
            session.verify(tokens[:, 4:6], [1, 2])
            session.keep([1, 0])
            made.append(session.verify(tokens[:, 6:], [2, 2]).logits)
            session.inputs = [inputs[1], None]
            if kind is SlotTarget:
                with pytest.raises(ValueError, match="rows with it and rows without cannot share a pass"):
                    session.verify(tokens, [1, 1])
    torch.testing.assert_close(made[0], made[1])


def each(masks: Any) -> list[Tensor]:
    return list(masks.values()) if isinstance(masks, dict) else [masks]


def test_padding_needs_no_room() -> None:
    """Rows of 2 and 20 tokens whose slots end where the texts do, and GPT-2's table of positions as well."""
    model = tiny_causal_lm("gpt2", n_positions=20)
    reader = Reader(model)
    with torch.inference_mode():
        reader.begin([18, 18], slots=2, capacity=20)
        reader.session.verify(torch.ones(2, 5, dtype=torch.long), [2, 1])  # both start alike
        reader.check()
        reader.begin([17, 1], slots=2, capacity=20)
        reader.read([1, 9])
        reader.read([0, 6], [0, 5])
        reader.read([1, 8])
        assert reader.session.held == [19, 19]
        reader.read([1, 1])
        assert reader.session.held == [20, 20]
        with pytest.raises(ValueError, match="a row comes to 21 tokens and its slot has room for 20"):
            reader.session.verify(torch.ones(2, 1, dtype=torch.long), [1, 0])
    reader.check()


def test_rows_share_passes_where_they_can_and_have_their_own_elsewhere() -> None:
    kinds = {name: served_by(tiny_causal_lm(name)) for name in (*ROWS, "gpt_neo", "deepseek_v32")}
    own = {"bloom", "llama4_text", "lfm2", "gpt_neo", "deepseek_v32"}
    stateful = {"qwen3_next", "qwen3_5_text", "mamba2"}
    assert {name for name, kind in kinds.items() if kind is CachedRows} == own
    assert {name for name, kind in kinds.items() if kind is StatefulRows} == stateful
    assert {name for name, kind in kinds.items() if kind is SlotTarget} == kinds.keys() - own - stateful
    flash = tiny_causal_lm("llama")
    flash.config._attn_implementation = "flash_attention_2"
    assert served_by(flash) is CachedRows


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_rounding_of_narrow_types_is_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpkit.decode.serving.SMALL", 0)  # no copy in float32
    assert served_by(tiny_causal_lm(kind, spread=1.0).to(torch.bfloat16)) is SlotTarget


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_that_are_wrong_are_found(shift: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(places: Tensor, *rest: Any) -> Tensor:
        return causal(places + shift, *rest)

    monkeypatch.setattr("bpkit.decode.serving.SMALL", 0)
    monkeypatch.setattr("bpkit.decode.slot_target.causal", shifted)
    assert served_by(tiny_causal_lm("qwen3").to(dtype)) is CachedRows


def test_a_pass_of_shared_rows_is_one_call_of_the_model() -> None:
    model = repeating_causal_lm("llama")
    kind: Any = session_class(model)
    calls: list[None] = []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    session = kind(model, rows=3, capacity=30, slots=3, feature_layers=(), keep_hidden=False)
    with torch.inference_mode():
        session.prefill(torch.ones(3, 9, dtype=torch.long), [9, 2, 5], last=False)
        session.verify(torch.ones(3, 4, dtype=torch.long), [1, 4, 0])
    assert len(calls) == 2


@pytest.mark.parametrize("window", [None, 3])
def test_masks_show_what_lies_before_a_query(window: int | None) -> None:
    places = torch.tensor([[2, 3, 4], [7, 8, 9]])
    seen = causal(places, 1, 10, window)
    assert seen.shape == (2, 1, 3, 9)
    for row, column, key in itertools.product(range(2), range(3), range(1, 10)):
        back = int(places[row, column]) - key
        assert bool(seen[row, 0, column, key - 1]) == (0 <= back < (window or 99))
    scores = added(seen, torch.float16)
    assert (scores == 0).equal(seen)
    assert set(scores[~seen].tolist()) == {torch.finfo(torch.float16).min}


@pytest.mark.parametrize("width", [1, 4, 12])
@pytest.mark.parametrize("rows", [1, 3])
def test_grouped_attention_is_attention_without_copies(width: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    query, kept = torch.randn(rows, 6, width, 8), torch.randn(2, rows + 1, 2, 40, 8)
    keys, values = kept[0, :rows, :, 5:33], kept[1, :rows, :, 5:33]
    mask = torch.rand(rows, 1, width, 28) < 0.7
    mask[..., 0] = True
    wanted, _ = sdpa_attention_forward(module, query, keys, values, mask)
    taken: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        taken.extend((key.data_ptr(), value.data_ptr()))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    found, _ = grouped_sdpa(module, query, keys, values, mask)
    assert taken == [keys.data_ptr(), values.data_ptr()]
    torch.testing.assert_close(found, wanted)


def test_rows_read_alike_with_grouped_attention() -> None:
    model = tiny_causal_lm("qwen3")
    use_grouped_attention(model)
    assert model.config._attn_implementation == NAME
    reader = Reader(model, 4)
    with torch.inference_mode():
        reader.begin([1, 12, 7], slots=3)
        for _ in range(5):
            reader.step()
        reader.read([11, 2, 9], [10, 0, 3])
    assert served_by(model) is SlotTarget
    reader.check()


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba2", "rwkv", "deepseek_v4"])
def test_states_go_back_over_several_passes(kind: str) -> None:
    """As an assistant drafts: it reads what was decided, then drafted tokens one by one, and drops some of those."""
    model = tiny_causal_lm(kind)
    tokens = torch.randint(2, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    wrong = tokens.flip(1)
    session = StatefulTarget(model, feature_layers=(), keep_hidden=False)
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        whole = model(tokens).logits
        session.verify(tokens[:, :9])  # the prompt, without prefill
        for decided, right, bad in ((1, 2, 2), (2, 0, 3), (1, 3, 0), (4, 1, 1), (1, 0, 2), (1, 2, 1)):
            start = session.held
            session.rollback(0) if start == 9 else None
            logits = session.verify(tokens[:, start : start + decided]).logits
            found |= {start + i: logits[:, i] for i in range(decided)}
            for i in range(right + bad):
                place = start + decided + i
                logits = session.verify((tokens if i < right else wrong)[:, place : place + 1]).logits
                if i < right:
                    found[place] = logits[:, 0]
            session.rollback(bad)
            assert session.held == start + decided + right
    for place, scores in found.items():
        assert (scores - whole[:, place]).abs().max() / whole.std() < CLOSE, place
    assert len(found) > 15


def test_an_anchor_is_not_dropped_from_states() -> None:
    session = StatefulTarget(tiny_causal_lm("qwen3_5_text"), feature_layers=(), keep_hidden=False)
    with torch.inference_mode():
        session.prefill(torch.ones(1, 5, dtype=torch.long))
        session.verify(torch.ones(1, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="1 tokens cannot be dropped"):
            session.rollback(1)
