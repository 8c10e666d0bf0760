"""Targets with recurrent states: the text of plain decoding, at every width, and counts that replay knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, LinearAttentionLayer
from transformers.generation import TemperatureLogitsWarper
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HCACache

from bpkit import Context, Policy, SpeculativeDecoder
from bpkit.decode.clock import CostClock
from bpkit.decode.reread import LONGEST_PENDING, Rereading, commits
from bpkit.decode.serving import session_class
from bpkit.decode.stateful import Snapshot, StatefulTarget, crop_of
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.testing.simulated_device import SimulatedDevice
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.collect.job import describe
from bpkit.trace.cost import CostTable
from bpkit.trace.replay import Replayer
from bpkit.trace.store.manifest import Manifest
from bpkit.types import Seconds, Work
from tests.architecture_survey import PROMPT, ScriptedDrafter, greedy
from tests.tiny_architectures import tiny_causal_lm, tiny_config, tiny_dflash

if TYPE_CHECKING:
    from torch import Tensor

    from tests.conftest import PlainDecoding

KINDS = ("qwen3_5_text", "qwen3_next", "mamba2", "rwkv", "minimax", "deepseek_v4")
"""Linear attention beside full attention, states alone, caches of the architecture's own, compressors."""
COST = CostTable(
    draft={2: 1e-3, 16: 2e-3},
    catch_up={1: 0.0, 64: 1e-3},
    verify={1: {16: 5e-3}, 64: {16: 9e-3}},
    rest=2e-4,
)


class Works(CostClock):
    """Keeps the work of every step."""

    def __init__(self) -> None:
        super().__init__(COST)
        self.work: list[Work] = []

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        self.work += [] if work is None else [work]
        return Seconds()


class Sizes(Policy):
    """Block sizes of all kinds in turn, 1 among them."""

    wants = frozenset()

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def begin(self, context: Context) -> dict[str, Any]:
        return {"step": context.full(0)}

    def select(self, state: Any, context: Context) -> Tensor:
        state["step"] = state["step"] + 1
        return context.full(self.sizes[int(state["step"]) % len(self.sizes)])


def scripted(model: PreTrainedModel, text: list[int], every: int) -> ScriptedDrafter:
    """A drafter that is wrong at every so manieth position."""
    wrong = range(every - 1, len(text), every)
    return ScriptedDrafter(text, PROMPT.shape[1], wrong, model.config.get_text_config().vocab_size)


def test_n_grams_on_a_tiny_qwen3_5_give_the_text_of_plain_decoding() -> None:
    for seed in range(3):
        model = tiny_causal_lm("qwen3_5_text", seed=seed)
        result = SpeculativeDecoder(model, "ngram", "fixed:4").generate(PROMPT, max_new_tokens=40, temperature=0)
        assert result.tokens[0].tolist() == greedy(model, PROMPT, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_any_mixture_of_accepted_and_rejected_tokens_gives_the_text_of_plain_decoding(kind: str) -> None:
    model, clock = tiny_causal_lm(kind), Works()
    text = greedy(model, PROMPT, 56)
    for every, sizes in ((3, (4,)), (5, (8,)), (7, (3, 1, 12, 6))):
        decoder = SpeculativeDecoder(model, scripted(model, text, every), Sizes(*sizes), clock=clock, strict=True)
        assert decoder.spec.stateful
        result = decoder.generate(PROMPT, max_new_tokens=56, temperature=0)
        assert result.tokens[0].tolist() == text
        accepted = [int(step.num_accepted) for step in result.steps]
        assert 0 < sum(accepted) < sum(int(step.verify_length) for step in result.steps)
    # With drafts always rejected in part, pending tokens grow until they are committed.
    assert max(work.reread for work in clock.work) > LONGEST_PENDING
    assert any(commits(work.reread, work.verify_width) for work in clock.work)


def test_what_is_read_again_is_counted() -> None:
    count = Rereading()
    assert not count.verify(4)
    count.reject(3)  # the anchor stands
    assert (count.pending, count.reread) == (1, 0)
    assert not count.verify(8)
    count.reject(2)
    assert (count.pending, count.reread, count.fed) == (7, 1, 9)
    assert not count.verify(16)
    count.reject(4)
    assert (count.pending, count.reread) == (19, 7)
    assert count.verify(5)  # too many: a committing pass
    count.reject(1)
    assert (count.pending, count.reread, count.fed) == (4, 19, 5)
    count.verify(1)  # no draft: the pass over the anchor commits
    count.reject(0)
    assert (count.pending, count.reread) == (0, 4)
    count.verify(6)
    count.reject(0)  # all accepted
    assert (count.pending, count.reread) == (0, 0)


def test_steps_without_drafts_copy_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Snapshot] = []
    take = Snapshot.take

    def counted(self: Snapshot) -> None:
        taken.append(self)
        take(self)

    monkeypatch.setattr(Snapshot, "take", counted)
    model = tiny_causal_lm("qwen3_5_text")
    decoder = SpeculativeDecoder(model, "ngram", "fixed:1")
    taken.clear()
    decoder.generate(PROMPT, max_new_tokens=8, temperature=0)
    assert not taken
    decoder.generate(PROMPT, max_new_tokens=8, temperature=0, policy="fixed:4")
    assert taken


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba2", "rwkv"])
def test_going_back_does_not_wait_for_the_device(kind: str) -> None:
    model = tiny_causal_lm(kind)
    text = greedy(model, PROMPT, 20)
    with SimulatedDevice() as device:
        moved = device.decoder(SpeculativeDecoder(model, scripted(model, text, 4), "fixed:6"))
        reads = device.count(moved.with_policy("fixed:6"), PROMPT, max_new_tokens=20, temperature=0)
    assert list(reads.tokens) == text
    assert set(reads.steps) == {1}


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba2"])
def test_sampled_text_is_that_of_plain_decoding(kind: str, plain: PlainDecoding) -> None:
    model = tiny_causal_lm(kind)
    expected = plain(model, PROMPT, max_new_tokens=24, processors=[TemperatureLogitsWarper(0.5)], seed=3)
    decoder = SpeculativeDecoder(model, scripted(model, expected.tokens, 4), "fixed:5")
    result = decoder.generate(PROMPT, max_new_tokens=24, temperature=0.5, top_k=0, seed=3)
    assert sum(int(step.num_accepted) for step in result.steps) > 5
    expected.near_tie_where_it_differs(result.tokens)


def test_a_block_drafter_reads_the_features_of_a_hybrid() -> None:
    model = tiny_causal_lm("qwen3_5_text", max_position_embeddings=128)
    drafter = tiny_dflash(model)
    result = SpeculativeDecoder(model, drafter, "fixed:6").generate(PROMPT, max_new_tokens=24, temperature=0)
    assert result.tokens[0].tolist() == greedy(model, PROMPT, 24)


def test_a_hybrid_that_sees_images_decodes_text() -> None:
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    text = tiny_config("qwen3_5_text").to_dict()
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).float().eval()
    tokens = greedy(model, PROMPT, 24)
    decoder = SpeculativeDecoder(model, scripted(model, tokens, 4), "fixed:6")
    assert decoder.spec.stateful
    assert decoder.generate(PROMPT, max_new_tokens=24, temperature=0).tokens[0].tolist() == tokens


def test_features_of_a_pass_are_those_of_its_own_tokens() -> None:
    model = tiny_causal_lm("qwen3_5_text")
    layers = (0, 2)
    with torch.inference_mode():
        session = StatefulTarget(model, feature_layers=layers, keep_hidden=True)
        outputs, kept = [session.prefill(PROMPT[:, :10])], [10]
        for start, end, wrong in ((10, 12, 3), (12, 15, 1), (15, 16, 0), (16, 24, 0)):
            output = session.verify(torch.cat([PROMPT[:, start:end], PROMPT[:, :wrong]], dim=1))
            assert output.logits.shape[1] == end - start + wrong
            outputs.append(output)
            kept.append(end - start)
            session.rollback(wrong)
            assert session.held == end
        full = model(PROMPT, output_hidden_states=True)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(output, name)[:, :count] for output, count in zip(outputs, kept, strict=True)], dim=1)

    features = torch.cat([full.hidden_states[i + 1] for i in layers], dim=-1)
    torch.testing.assert_close(joined("features"), features)
    torch.testing.assert_close(joined("last_hidden"), full.hidden_states[-1][:, 9:])
    torch.testing.assert_close(joined("logits"), full.logits[:, 9:])


def test_the_cache_that_is_returned_holds_all_tokens_but_the_last() -> None:
    model = tiny_causal_lm("qwen3_5_text")
    text = greedy(model, PROMPT, 12)
    decoder = SpeculativeDecoder(model, scripted(model, text, 3), "fixed:8")
    output = model.generate(
        PROMPT, custom_generate=decoder, max_new_tokens=11, do_sample=False, return_dict_in_generate=True
    )
    last = output.sequences[:, -1:]
    positions = torch.tensor([[output.sequences.shape[1] - 1]])
    with torch.inference_mode():
        following = model(last, past_key_values=output.past_key_values, position_ids=positions).logits[:, -1].argmax()
    assert int(following) == text[11]


@pytest.mark.parametrize("sizes", [(4,), (1, 6, 3)])
def test_replay_counts_what_is_read_again(pair: TinyPair, sizes: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny_causal_lm("qwen3_5_text", vocab_size=len(pair.tokenizer), pad_token_id=99, spread=1.0)
    decoder = SpeculativeDecoder(model, "ngram", "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions((2, 3, 4, 5, 6), 24, {"temperature": 0.0})
    trace = Tracer(decoder, options).trace(0, Prompt("a", "tiny", "abc abc abc abd abc "))
    clock = Works()
    live = SpeculativeDecoder(model, decoder.drafter, Sizes(*sizes), clock=clock, max_block_size=6)
    live.generate(torch.tensor(trace.prompt_tokens).long()[None], max_new_tokens=24, temperature=0)
    replayed = Replayer(live.spec, Sizes(*sizes), COST).run(trace)
    assert [work.reread for work in replayed.work] == [work.reread for work in clock.work]
    assert any(work.reread for work in clock.work)

    manifest = describe(decoder, [Prompt("a", "tiny", "abc")], options)
    assert manifest.spec.stateful
    stored = json.loads(manifest.model_dump_json())
    del stored["stateful"]  # as traces of before have it
    assert not Manifest.model_validate(stored).spec.stateful


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mamba", "jamba", "falcon_mamba", "recurrent_gemma"])
def test_a_target_that_forgets_its_states_is_refused_by_name(kind: str, dtype: torch.dtype) -> None:
    model = tiny_causal_lm(kind).to(dtype)
    with pytest.raises(ValueError, match=f"target {type(model).__name__} cannot be decoded speculatively: several tok"):
        SpeculativeDecoder(model, "ngram")
    assert model.dtype is dtype


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("openai-gpt", "takes no cache"),
        ("xlnet", "takes no cache"),
        ("moshi", "its cache forgets what its masks would show"),
        ("cpmant", "does not read a few tokens in several passes"),
    ],
)
def test_a_target_without_a_cache_to_crop_is_refused_by_name(kind: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{why}.*; use plain generate"):
        SpeculativeDecoder(tiny_causal_lm(kind), "ngram")


def test_an_encoder_that_is_no_decoder_is_refused() -> None:
    model = tiny_causal_lm("bert")
    model.config.is_decoder = False
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be decoded speculatively"):
        SpeculativeDecoder(model, "ngram")


def test_ties_in_sparse_attention_are_found_before_they_change_a_text() -> None:
    """With two indexer heads most keys score exactly 0, and which of them are picked depends on the pass."""
    with pytest.raises(ValueError, match="cannot be decoded speculatively"):
        SpeculativeDecoder(tiny_causal_lm("deepseek_v32", index_n_heads=2), "ngram")
    assert not session_class(tiny_causal_lm("deepseek_v32")).stateful


def test_a_target_is_tried_once() -> None:
    passes: list[Any] = []

    def counted(model: PreTrainedModel) -> PreTrainedModel:
        model.register_forward_pre_hook(lambda *_: passes.append(None))
        return model

    hybrid, ordinary = counted(tiny_causal_lm("qwen3_5_text")), counted(tiny_causal_lm("gemma3_text"))
    session_class(hybrid)
    assert 0 < len(passes) <= 13
    passes.clear()
    session_class(ordinary)
    assert 0 < len(passes) <= 8  # whether rows may share passes
    passes.clear()
    SpeculativeDecoder(hybrid, "ngram").with_policy("fixed:2")
    SpeculativeDecoder(ordinary, "ngram").with_policy("fixed:2")
    session_class(counted(tiny_causal_lm("bloom")))  # masks of its own kind: nothing to try
    assert not passes


def test_what_a_layer_crops_wholly() -> None:
    assert crop_of(DynamicLayer) is DynamicLayer.crop
    assert crop_of(DynamicIndexedLayer) is DynamicIndexedLayer.crop
    assert crop_of(LinearAttentionLayer) is None
    assert crop_of(DeepseekV4HCACache) is None  # inherits one that knows nothing of its compressors


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 32),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 32,
                "factor": 4.0,
            },
            128,
        ),
    ],
)
def test_texts_in_which_the_rotary_embedding_changes_are_refused(rope: dict[str, Any], positions: int) -> None:
    rope = {"rope_theta": 10000.0, **rope}
    model = tiny_causal_lm("llama", rope_parameters=rope, max_position_embeddings=positions)
    assert isinstance(model, LlamaForCausalLM)
    decoder = SpeculativeDecoder(model, "ngram", "fixed:4")
    result = decoder.generate(PROMPT, max_new_tokens=9, temperature=0)
    assert result.tokens[0].tolist() == greedy(model, PROMPT, 9)
    with pytest.raises(ValueError, match="changes its frequencies beyond 32 tokens, and the text may have 34"):
        decoder.generate(PROMPT, max_new_tokens=10, temperature=0)


def test_a_policy_that_reads_hidden_states_is_refused_where_there_are_several_streams() -> None:
    model = tiny_causal_lm("deepseek_v4")
    session = StatefulTarget(model, feature_layers=(0,), keep_hidden=False)
    with torch.inference_mode(), pytest.raises(ValueError, match="DeepseekV4ForCausalLM gives no hidden states"):
        session.prefill(PROMPT)
