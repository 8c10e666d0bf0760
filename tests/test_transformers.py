"""bpkit inside transformers: `generate(custom_generate=decoder)`, and its drafter under transformers' own decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from bpkit import SpeculativeDecoder
from bpkit.assets import prompts
from bpkit.draft.block_diffusion import BlockDiffusionSession
from bpkit.testing import TinyPair, tiny_pair

if TYPE_CHECKING:
    from tests.conftest import PlainDecoding, ShippedPair

PROMPT = "def f(a, b):\n    return "


@pytest.fixture
def decoder(pair: TinyPair) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target, pair.agreeable(0.2), "fixed:5", tokenizer=pair.tokenizer, strict=True)


@pytest.fixture
def inputs(pair: TinyPair) -> dict[str, Tensor]:
    made: dict[str, Tensor] = dict(pair.tokenizer(PROMPT, return_tensors="pt"))
    assert set(made) == {"input_ids", "attention_mask"}
    return made


# The same text through both doors.


def test_greedy_generate_of_transformers_with_and_without_the_decoder_gives_the_same_tokens(
    pair: TinyPair, decoder: SpeculativeDecoder, inputs: dict[str, Tensor]
) -> None:
    plain = pair.target.generate(**inputs, max_new_tokens=30, do_sample=False)
    made = pair.target.generate(**inputs, custom_generate=decoder, max_new_tokens=30, do_sample=False)
    assert isinstance(made, Tensor)
    assert made.equal(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "temperature": 1.3, "top_k": 10, "repetition_penalty": 1.2},
        {"do_sample": True, "min_p": 0.05, "no_repeat_ngram_size": 3},
        {"do_sample": False, "bad_words_ids": [[4], [7]], "suppress_tokens": [1, 2, 3]},
    ],
    ids=str,
)
def test_generate_of_the_decoder_and_of_transformers_give_the_same_tokens(
    pair: TinyPair, decoder: SpeculativeDecoder, inputs: dict[str, Tensor], options: dict[str, Any]
) -> None:
    theirs = pair.target.generate(**inputs, custom_generate=decoder, max_new_tokens=24, seed=5, stream_id=2, **options)
    options = {"temperature": 1.0 if options["do_sample"] else 0, **options}
    del options["do_sample"]
    ours = decoder.generate(PROMPT, max_new_tokens=24, seed=5, stream_id=2, **options)
    assert ours.sequences.equal(theirs)
    # And neither depends on how much is drafted.
    other = decoder.with_policy("fixed:1").generate(PROMPT, max_new_tokens=24, seed=5, stream_id=2, **options)
    assert ours.tokens.equal(other.tokens)


def test_policy_drafter_and_seed_may_be_given_to_generate(
    pair: TinyPair, decoder: SpeculativeDecoder, inputs: dict[str, Tensor]
) -> None:
    def steps(**options: Any) -> tuple[list[int], list[int]]:
        output = pair.target.generate(
            **inputs,
            custom_generate=decoder,
            max_new_tokens=20,
            do_sample=True,
            seed=3,
            return_dict_in_generate=True,
            **options,
        )
        return output.sequences[0].tolist(), [int(step.block_size) for step in output.generation.steps]

    text, sizes = steps()
    assert set(sizes) == {5}
    for option in ({"policy": "fixed:3"}, {"policy": {"name": "fixed", "block_size": 3}}):
        assert steps(**option)[0] == text
        assert set(steps(**option)[1]) == {3}
    assert steps(drafter="ngram")[0] == text
    assert steps(drafter="ngram", policy="fixed:2")[0] == text
    assert steps()[1] == sizes, "options of one call must not stick"


def test_temperature_0_is_greedy_and_a_temperature_above_0_samples(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    greedy = pair.target.generate(pair.ids(PROMPT), max_new_tokens=20, do_sample=False)
    assert decoder.generate(PROMPT, max_new_tokens=20, temperature=0).sequences.equal(greedy)
    assert decoder.generate(PROMPT, max_new_tokens=20, temperature=0.0, seed=9).sequences.equal(greedy)
    sampled = decoder.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=9)
    assert not sampled.sequences.equal(greedy)
    assert sampled.seed == 9


def test_a_generation_config_is_honoured(pair: TinyPair, decoder: SpeculativeDecoder, plain: PlainDecoding) -> None:
    end = plain(pair.target, pair.ids(PROMPT), max_new_tokens=10).tokens[6]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[end, 97], pad_token_id=97)
    wanted = pair.target.generate(pair.ids(PROMPT), generation_config=config)
    assert wanted.shape[1] < pair.ids(PROMPT).shape[1] + 12
    assert decoder.generate(PROMPT, generation_config=config).sequences.equal(wanted)
    assert pair.target.generate(pair.ids(PROMPT), custom_generate=decoder, generation_config=config).equal(wanted)


def test_max_length_counts_the_prompt_as_in_transformers(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    wanted = pair.target.generate(pair.ids(PROMPT), max_length=40, do_sample=False)
    assert decoder.generate(PROMPT, max_length=40, temperature=0).sequences.equal(wanted)
    stop = StoppingCriteriaList([MaxLengthCriteria(max_length=33)])
    wanted = pair.target.generate(pair.ids(PROMPT), max_length=40, do_sample=False, stopping_criteria=stop)
    assert wanted.shape == (1, 33)
    made = decoder.generate(PROMPT, max_length=40, temperature=0, stopping_criteria=stop)
    assert made.sequences.equal(wanted)


def test_a_custom_logits_processor_sees_the_prefix_that_plain_decoding_has(
    pair: TinyPair, decoder: SpeculativeDecoder
) -> None:
    class Parity(LogitsProcessor):
        """Works in place, as many do: forbids tokens of the parity that the sum of the prefix has."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, int(input_ids.sum()) % 2 :: 2] = -torch.inf
            return scores

    options = {"max_new_tokens": 24, "logits_processor": LogitsProcessorList([Parity()])}
    wanted = pair.target.generate(pair.ids(PROMPT), do_sample=False, **options)
    assert not wanted.equal(pair.target.generate(pair.ids(PROMPT), do_sample=False, max_new_tokens=24))
    assert decoder.generate(PROMPT, temperature=0, **options).sequences.equal(wanted)
    sampled = [
        d.generate(PROMPT, temperature=1.0, seed=1, **options).tokens for d in (decoder, decoder.with_policy("fixed:1"))
    ]
    assert sampled[0].equal(sampled[1])


def test_prefix_allowed_tokens_are_honoured(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    def allowed(batch: int, ids: Tensor) -> list[int]:
        return [(int(ids[-1]) * 7 + k) % 90 for k in (1, 2, 3)]

    options = {"max_new_tokens": 24, "prefix_allowed_tokens_fn": allowed}
    wanted = pair.target.generate(pair.ids(PROMPT), do_sample=False, **options)
    assert decoder.generate(PROMPT, temperature=0, **options).sequences.equal(wanted)


def test_return_dict_in_generate_gives_sequences_cache_and_records(
    pair: TinyPair, decoder: SpeculativeDecoder, inputs: dict[str, Tensor]
) -> None:
    output = pair.target.generate(
        **inputs, custom_generate=decoder, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    assert output.sequences.equal(pair.target.generate(**inputs, max_new_tokens=20, do_sample=False))
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    assert output.generation.sequences.equal(output.sequences)
    assert sum(step.tokens.shape[1] for step in output.generation.steps) == 19
    # The model goes on from that cache as from its own.
    goes_on = pair.target.generate(
        output.sequences, past_key_values=output.past_key_values, max_new_tokens=5, do_sample=False
    )
    assert goes_on.equal(pair.target.generate(**inputs, max_new_tokens=25, do_sample=False))


def test_the_output_carries_no_gradient_and_may_be_written_to(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    made = decoder.generate(PROMPT, max_new_tokens=8, temperature=0)
    for tensor in (made.tokens, made.sequences):
        assert not tensor.is_inference()
        tensor += 1
    returned = pair.target.generate(pair.ids(PROMPT), custom_generate=decoder, max_new_tokens=8)
    assert not returned.is_inference()


def test_a_result_adds_up(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    made = decoder.generate(PROMPT, max_new_tokens=24, temperature=0, eos_token_id=None)
    assert made.text == pair.tokenizer.decode(made.tokens[0], skip_special_tokens=True)
    assert made.sequences[:, :-24].equal(pair.ids(PROMPT))
    assert made.sequences[:, -24:].equal(made.tokens)
    assert made.acceptance_length == pytest.approx(23 / len(made.steps))
    total = made.seconds
    assert min(total.draft, total.verify, total.policy, total.rest) > 0
    assert total.total == pytest.approx(made.prefill.seconds.total + sum(step.seconds.total for step in made.steps))
    assert made.tokens_per_second == pytest.approx(24 / total.total)
    assert made.fallbacks == 0


# Streaming.


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.put_so_far: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_so_far.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def through_generate(decoder: SpeculativeDecoder, **options: Any) -> None:
    decoder.target.generate(
        decoder.token_ids(PROMPT), custom_generate=decoder, do_sample=False, eos_token_id=None, **options
    )


def through_the_decoder(decoder: SpeculativeDecoder, **options: Any) -> None:
    decoder.generate(PROMPT, temperature=0, eos_token_id=None, **options)


DOORS = {"model.generate": through_generate, "decoder.generate": through_the_decoder}


@pytest.mark.parametrize("door", DOORS)
def test_a_streamer_on_the_decoder_gets_prompt_and_tokens_as_from_transformers(pair: TinyPair, door: str) -> None:
    theirs, ours = Recorder(), Recorder()
    pair.target.generate(pair.ids(PROMPT), max_new_tokens=20, do_sample=False, eos_token_id=None, streamer=theirs)
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.2), "fixed:5", tokenizer=pair.tokenizer, streamer=ours)
    DOORS[door](decoder, max_new_tokens=20)
    assert ours.ended == theirs.ended == 1
    assert ours.put_so_far[0] == theirs.put_so_far[0] == pair.ids(PROMPT)[0].tolist(), "first the prompt"
    assert [t for put in ours.put_so_far for t in put] == [t for put in theirs.put_so_far for t in put]
    assert len(ours.put_so_far) > 3, "tokens must arrive as they are decided"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_text_streamer_prints_what_it_prints_under_transformers(
    pair: TinyPair, capsys: pytest.CaptureFixture[str], door: str, skip_prompt: bool
) -> None:
    pair.target.generate(
        pair.ids(PROMPT),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        streamer=TextStreamer(pair.tokenizer, skip_prompt=skip_prompt),
    )
    theirs = capsys.readouterr().out
    decoder = SpeculativeDecoder(
        pair.target,
        pair.agreeable(0.2),
        "fixed:5",
        tokenizer=pair.tokenizer,
        streamer=TextStreamer(pair.tokenizer, skip_prompt=skip_prompt),
    )
    DOORS[door](decoder, max_new_tokens=20)
    assert capsys.readouterr().out == theirs != ""


def test_an_iterator_streamer_ends_the_iteration(pair: TinyPair) -> None:
    streamer = TextIteratorStreamer(pair.tokenizer, skip_prompt=True, timeout=5)
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:5", tokenizer=pair.tokenizer, streamer=streamer)
    through_generate(decoder, max_new_tokens=20)
    text = decoder.with_policy("fixed:2").generate(PROMPT, max_new_tokens=20, temperature=0, eos_token_id=None).text
    assert "".join(streamer) == text


@pytest.mark.parametrize("policy", ["fixed:1", "fixed:5", "fixed:16"])
def test_the_pieces_of_stream_are_the_text(pair: TinyPair, policy: str) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.2), policy, tokenizer=pair.tokenizer)
    for prompt, temperature in itertools.product((PROMPT, "x = ", "The quick brown fox"), (0, 1.0)):
        options = {"max_new_tokens": 40, "temperature": temperature, "seed": 2}
        pieces = list(decoder.stream(prompt, **options))
        assert "".join(pieces) == decoder.generate(prompt, **options).text
        assert all(pieces)


def test_streaming_hands_out_text_before_the_end(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.2), "fixed:5", tokenizer=pair.tokenizer)
    calls: list[int] = []
    handle = pair.target.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        seen = []
        for _ in decoder.stream(PROMPT, max_new_tokens=60, temperature=1.0, seed=2, top_k=0, eos_token_id=None):
            seen.append(len(calls))
    finally:
        handle.remove()
    assert len(set(seen)) > 1
    assert seen[0] < calls.__len__()


# What cannot be honoured is refused by name.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, r"num_beams=3.*use num_beams=1"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, r"penalty_alpha=0.6"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, r"prompt_lookup_num_tokens=3.*drafter='ngram'"),
    "early exit": ({"assistant_early_exit": 2}, r"assistant_early_exit=2"),
    "no cache": ({"use_cache": False}, r"use_cache=False"),
    "static cache": ({"cache_implementation": "static"}, r"cache 'static'.*dynamic cache"),
    "offloaded static cache": ({"cache_implementation": "offloaded_static"}, r"cache 'offloaded_static'"),
    "guidance": ({"guidance_scale": 1.5}, r"guidance_scale=1.5"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, r"output_scores=True"),
    "logits": ({"output_logits": True, "return_dict_in_generate": True}, r"output_logits=True"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, r"output_attentions=True"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, r"output_hidden_states=True"),
    "speculation type": ({"speculation_type": "dflash"}, r"speculation_type='dflash'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(
    pair: TinyPair, decoder: SpeculativeDecoder, inputs: dict[str, Tensor], name: str
) -> None:
    options, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        pair.target.generate(**inputs, custom_generate=decoder, max_new_tokens=8, **options)
    with pytest.raises(ValueError, match=sentence):
        decoder.generate(PROMPT, max_new_tokens=8, **options)


def arguments_of_objects(pair: TinyPair) -> dict[str, tuple[dict[str, Any], str]]:
    filled = DynamicCache(config=pair.target.config)
    with torch.no_grad():
        pair.target(pair.ids("def"), past_key_values=filled)
    static = StaticCache(config=pair.target.config, max_cache_len=64)
    return {
        "assistant_model": ({"assistant_model": pair.assistant}, r"assistant_model: the decoder has its drafter"),
        "streamer": ({"streamer": Recorder()}, r"streamer: .*SpeculativeDecoder\(\.\.\., streamer=\.\.\.\)"),
        "a static cache": ({"past_key_values": static}, r"cache 'StaticCache'"),
        "a cache with tokens": ({"past_key_values": filled}, r"past_key_values already holds tokens"),
    }


@pytest.mark.parametrize("name", ["assistant_model", "streamer", "a static cache", "a cache with tokens"])
def test_an_object_that_cannot_be_honoured_is_refused_by_name(
    pair: TinyPair, decoder: SpeculativeDecoder, inputs: dict[str, Tensor], name: str
) -> None:
    options, sentence = arguments_of_objects(pair)[name]
    with pytest.raises(ValueError, match=sentence):
        pair.target.generate(**inputs, custom_generate=decoder, max_new_tokens=8, **options)


def test_padding_on_the_left_is_no_part_of_the_prompt(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    mask, options = torch.tensor([[0, 1, 1, 1]]), {"max_new_tokens": 8, "do_sample": False}
    wanted = pair.target.generate(pair.ids("abcd"), attention_mask=mask, **options)
    assert pair.target.generate(pair.ids("abcd"), attention_mask=mask, custom_generate=decoder, **options).equal(wanted)
    for hidden in ([[1, 0, 1, 1]], [[1, 1, 1, 0]], [[0, 0, 0, 0]]):
        with pytest.raises(ValueError, match="attention mask hides tokens: of a prompt only padding on its left"):
            pair.target.generate(
                pair.ids("abcd"), attention_mask=torch.tensor(hidden), custom_generate=decoder, max_new_tokens=4
            )
    positions = torch.tensor([[0, 3, 5, 20], [0, 1, 2, 3]])
    with pytest.raises(ValueError, match="position_ids"):
        pair.target.generate(
            pair.ids("abcd").repeat(2, 1), position_ids=positions, custom_generate=decoder, max_new_tokens=4
        )


def test_positions_that_plain_decoding_would_honour_are_refused_or_honoured(
    pair: TinyPair, decoder: SpeculativeDecoder
) -> None:
    options = {"position_ids": torch.tensor([[0, 3, 5, 20]]), "max_new_tokens": 12, "do_sample": False}
    wanted = pair.target.generate(pair.ids("abcd"), **options)
    assert not wanted.equal(pair.target.generate(pair.ids("abcd"), max_new_tokens=12, do_sample=False))
    try:
        made = pair.target.generate(pair.ids("abcd"), custom_generate=decoder, **options)
    except ValueError as error:
        assert "position_ids" in str(error)  # noqa: PT017
    else:
        assert made.equal(wanted)


def test_input_embeddings_are_refused(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    embeddings = pair.target.get_input_embeddings()(pair.ids("abcd"))
    with pytest.raises(ValueError, match="inputs_embeds"):
        pair.target.generate(inputs_embeds=embeddings, custom_generate=decoder, max_new_tokens=4)


def test_an_empty_prompt_is_refused(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        decoder.generate("", max_new_tokens=4)


def test_another_model_than_the_decoders_target_is_refused(decoder: SpeculativeDecoder) -> None:
    other = tiny_pair(seed=1).target
    with pytest.raises(ValueError, match="made for another target"):
        other.generate(torch.tensor([[1, 2]]), custom_generate=decoder, max_new_tokens=4)


def test_an_unknown_option_is_refused(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    with pytest.raises(ValueError, match="block_siez"):
        decoder.generate(PROMPT, max_new_tokens=4, block_siez=3)


def test_text_without_a_tokenizer_is_refused_with_the_way_out(pair: TinyPair) -> None:
    mute = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:4")
    calls: list[Callable[[], object]] = [
        lambda: mute.generate(PROMPT, max_new_tokens=4),
        lambda: mute.generate(pair.ids(PROMPT), max_new_tokens=4, stop_strings=["x"]),
        lambda: list(mute.stream(pair.ids(PROMPT), max_new_tokens=4)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"tokenizer: SpeculativeDecoder\(\.\.\., tokenizer=tokenizer\)"):
            call()


# From folders.


def test_from_pretrained_loads_target_drafter_and_tokenizer(tiny_folder: Path, pair: TinyPair) -> None:
    decoder = SpeculativeDecoder.from_pretrained(tiny_folder / "target", str(tiny_folder / "drafter"), "fixed:4")
    made = decoder.generate(PROMPT, max_new_tokens=12, temperature=0)
    wanted = pair.target.generate(pair.ids(PROMPT), max_new_tokens=12, do_sample=False)
    assert made.sequences.equal(wanted)
    assert decoder.target.dtype == torch.float32
    assert decoder.drafter.kind == "block-diffusion"
    assert decoder.spec.trained_block_size == 8
    assert decoder.spec.max_block_size == 16


def test_from_pretrained_takes_paths(tiny_folder: Path) -> None:
    drafter: Any = tiny_folder / "drafter"
    decoder = SpeculativeDecoder.from_pretrained(tiny_folder / "target", drafter)
    assert decoder.drafter.kind == "block-diffusion"


def test_from_pretrained_tells_drafters_apart_by_their_config(tiny_folder: Path) -> None:
    for drafter, kind in ((str(tiny_folder / "assistant"), "autoregressive"), ("ngram", "n-gram")):
        decoder = SpeculativeDecoder.from_pretrained(tiny_folder / "target", drafter)
        assert decoder.drafter.kind == kind
        assert decoder.generate(PROMPT, max_new_tokens=4).tokens.shape == (1, 4)


def test_a_target_without_a_drafter_is_refused_with_the_way_out(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"name a drafter for the target .*: a folder, a Hub name, or 'ngram'"):
        SpeculativeDecoder.from_pretrained(tiny_folder / "target")


def test_a_bfloat16_checkpoint_loads_as_float32_on_a_cpu(tmp_path: Path, pair: TinyPair) -> None:
    tiny_pair(tmp_path)
    half: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    pair.tokenizer.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    decoder = SpeculativeDecoder.from_pretrained(tmp_path / "half", str(tmp_path / "drafter"), device="cpu")
    assert decoder.target.dtype == torch.float32


# The same drafter under transformers' own DFlash decoding.


def test_the_drafter_runs_under_transformers_dflash_and_gives_the_same_greedy_tokens(pair: TinyPair) -> None:
    calls: list[int] = []
    handle = pair.drafter_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for prompt, count in itertools.product((PROMPT, "x = ", "The quick brown fox"), (1, 2, 9, 30)):
            ids = pair.ids(prompt)
            theirs = pair.target.generate(
                ids,
                assistant_model=pair.drafter_model,
                speculation_type="dflash",
                do_sample=False,
                max_new_tokens=count,
            )
            decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed")
            assert decoder.generate(ids, temperature=0, max_new_tokens=count).sequences.equal(theirs)
    finally:
        handle.remove()
    assert len(calls) > 100, "both must have drafted"


def test_both_runtimes_draft_the_same_tokens_with_it(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

    ids = pair.ids(PROMPT)
    theirs: dict[int, list[int]] = {}
    whole = DFlashTokenCandidateGenerator.get_candidates

    def spying(self: Any, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        candidates = whole(self, input_ids, *args, **options)
        if candidates[0].shape[1] > input_ids.shape[1]:
            theirs[input_ids.shape[1]] = candidates[0][0, input_ids.shape[1] :].tolist()
        return candidates

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", spying)
    pair.target.generate(
        ids,
        assistant_model=pair.drafter_model,
        speculation_type="dflash",
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=None,
    )
    ours: dict[int, list[int]] = {}
    session_type = BlockDiffusionSession
    draft = session_type.draft

    def spying_too(self: Any, *args: Any) -> Any:
        proposal = draft(self, *args)
        ours[self.text.length[0]] = proposal.tokens[0].tolist()
        return proposal

    monkeypatch.setattr(session_type, "draft", spying_too)
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed")
    decoder.generate(ids, temperature=0, max_new_tokens=24, eos_token_id=None)
    common = set(theirs) & set(ours)
    assert len(common) > 10
    for length in common:
        assert theirs[length] == ours[length]


@pytest.mark.slow
def test_the_shipped_drafter_gives_the_same_greedy_tokens_under_transformers_dflash(shipped: ShippedPair) -> None:
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed", tokenizer=shipped.tokenizer)
    steps = 0
    for prompt in prompts(limit=3):
        ids = shipped.tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
        theirs = shipped.target.generate(
            ids,
            assistant_model=shipped.drafter.model,
            speculation_type="dflash",
            do_sample=False,
            max_new_tokens=32,
        )
        made = decoder.generate(ids, temperature=0, max_new_tokens=32)
        assert made.near_ties == 0
        assert made.sequences.equal(theirs)
        steps += len(made.steps)
    assert steps < 9 * 31 / 1.5, "the shipped drafter is trained: its drafts must be worth something"
