"""Everything that transformers' `generate` takes: the text is plain decoding's, or the option is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    TemperatureLogitsWarper,
)

from bpkit import SpeculativeDecoder
from bpkit.testing import TinyPair
from bpkit.testing.models import AgreeableDrafter

PROMPT = "def f(a, b):\n    return "
COUNT = 24


@pytest.fixture
def decoder(pair: TinyPair) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target, pair.agreeable(0.3), "fixed:5", tokenizer=pair.tokenizer, strict=True)


# Options that are honoured. `sampled` ones are compared with another policy, since plain sampling has other noise.

GREEDY: dict[str, dict[str, Any]] = {
    "no end token": {"eos_token_id": None},
    "several end tokens": {"eos_token_id": [5, 9, 30, 41]},
    "min_new_tokens": {"min_new_tokens": 10, "eos_token_id": [5, 9, 30, 41]},
    "min_length": {"min_length": 30, "eos_token_id": [5, 9, 30, 41]},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "suppress_tokens": {"suppress_tokens": [5, 9, 30]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 90, 2))},
    "bad_words_ids": {"bad_words_ids": [[5], [9, 30]]},
    "sequence_bias": {"sequence_bias": [[[5], -4.0], [[9, 30], 7.0]]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.3)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "max_time": {"max_time": 0.0},
    "a dynamic cache": {"cache_implementation": "dynamic"},
    "options of beams without beams": {"length_penalty": 0.5, "early_stopping": True},
    "options of assistants without one": {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.2},
    "guidance of 1": {"guidance_scale": 1.0},
    "no guidance by a penalty of 0": {"penalty_alpha": 0.0},
    "synced_gpus": {"synced_gpus": False},
    "disable_compile": {"disable_compile": True},
    "trust_remote_code": {"trust_remote_code": True},
    "logits_processor": {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])},
    "a generation config": {"generation_config": GenerationConfig(repetition_penalty=1.4, max_new_tokens=9)},
}

SAMPLED: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "top_h": {"top_h": 0.4},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "temperature": {"temperature": 1.7, "renormalize_logits": True},
    "with a penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("name", GREEDY)
def test_an_option_gives_the_text_of_plain_decoding(pair: TinyPair, decoder: SpeculativeDecoder, name: str) -> None:
    ids, options = pair.ids(PROMPT), {"max_new_tokens": COUNT, **GREEDY[name]}
    if "generation_config" in options:
        del options["max_new_tokens"]
    wanted = pair.target.generate(ids, do_sample=False, **options)
    assert pair.target.generate(ids, custom_generate=decoder, do_sample=False, **options).equal(wanted)
    assert decoder.generate(PROMPT, temperature=0, **options).sequences.equal(wanted)


@pytest.mark.parametrize("name", SAMPLED)
def test_an_option_of_sampling_does_not_depend_on_the_policy(
    pair: TinyPair, decoder: SpeculativeDecoder, name: str
) -> None:
    options = {"temperature": 1.0, "max_new_tokens": COUNT, "seed": 3, "eos_token_id": None, **SAMPLED[name]}
    made = [decoder.generate(PROMPT, policy=policy, **options).tokens for policy in ("fixed:5", "fixed:1", "fixed:3")]
    assert made[0].equal(made[1])
    assert made[0].equal(made[2])


def test_a_forced_first_token_is_forced_after_a_prompt_of_one(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    for text in ("a", "ab"):
        options = {"max_new_tokens": 8, "forced_bos_token_id": 11}
        wanted = pair.target.generate(pair.ids(text), do_sample=False, **options)
        assert decoder.generate(text, temperature=0, **options).sequences.equal(wanted)


def test_prompts_with_special_tokens_are_read_as_they_are(pair: TinyPair) -> None:
    end, mask = pair.tokenizer.eos_token, pair.tokenizer.mask_token
    for drafter in (pair.block_diffusion(), pair.autoregressive(), "ngram"):
        decoder = SpeculativeDecoder(pair.target, drafter, "fixed:5", tokenizer=pair.tokenizer, strict=True)
        for text in (f"x = {end}", f"{end}x{end}y", f"a{mask}b{mask}{mask}", f"{mask}"):
            ids = pair.ids(text)
            wanted = pair.target.generate(ids, do_sample=False, max_new_tokens=COUNT)
            assert pair.target.generate(ids, custom_generate=decoder, do_sample=False, max_new_tokens=COUNT).equal(
                wanted
            )
            assert decoder.generate(text, temperature=0, max_new_tokens=COUNT).sequences.equal(wanted)


def test_generated_mask_tokens_are_tokens_like_others(pair: TinyPair) -> None:
    options: dict[str, Any] = {"max_new_tokens": COUNT, "sequence_bias": [[[pair.tokenizer.mask_token_id], 25.0]]}
    wanted = pair.target.generate(pair.ids(PROMPT), do_sample=False, **options)
    assert (wanted == pair.tokenizer.mask_token_id).sum() > 2
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:5", tokenizer=pair.tokenizer)
    assert decoder.generate(PROMPT, temperature=0, **options).sequences.equal(wanted)


def test_pad_tokens_in_a_text_are_read_and_in_ids_are_told(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    pad = int(pair.ids("#")[0, 0])
    config = {"pad_token_id": pad, "max_new_tokens": 12}
    ids = pair.ids("a#b# c")
    wanted = pair.target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **config)
    assert decoder.generate("a#b# c", temperature=0, **config).sequences.equal(wanted)
    made = decoder.generate(ids, temperature=0, attention_mask=torch.ones_like(ids), **config)
    assert made.sequences.equal(wanted)
    with pytest.raises(ValueError, match=r"attention mask hides tokens: .*transformers makes one"):
        decoder.generate(ids, temperature=0, **config)


def test_positions_are_those_of_plain_decoding(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    options: dict[str, Any] = {"position_ids": torch.tensor([[0, 3, 5, 20]]), "max_new_tokens": 12, "do_sample": False}
    wanted = pair.target.generate(pair.ids("abcd"), **options)
    assert not wanted.equal(pair.target.generate(pair.ids("abcd"), max_new_tokens=12, do_sample=False))
    assert pair.target.generate(pair.ids("abcd"), custom_generate=decoder, **options).equal(wanted)


# Refused.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "use_mtp": ({"use_mtp": True}, "use_mtp=True"),
    "dola_layers": ({"dola_layers": "low"}, "dola_layers='low'"),
    "prefill_chunk_size": ({"prefill_chunk_size": 4}, "prefill_chunk_size=4"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "cache 'offloaded'"),
    "hybrid chunked cache": ({"cache_implementation": "hybrid_chunked"}, "cache 'hybrid_chunked'"),
    "a cache of the user's": ({"past_key_values": DynamicCache()}, "past_key_values: the decoder makes its own cache"),
    "negative_prompt_ids": ({"negative_prompt_ids": torch.tensor([[1, 2]])}, "negative_prompt_ids"),
    "negative mask": ({"negative_prompt_attention_mask": torch.ones(1, 2)}, "negative_prompt_attention_mask"),
    "synced_gpus": ({"synced_gpus": True}, "synced_gpus"),
    "a hole in the mask": ({"attention_mask": torch.tensor([[1] * 3 + [0] + [1] * 20])}, "attention mask hides tokens"),
    "an unknown keyword": ({"block_siez": 3}, "block_siez"),
    "images": ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values"),
    "arguments of kernels": ({"cu_seq_lens_q": torch.tensor([0, 24])}, "cu_seq_lens_q"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(pair: TinyPair, decoder: SpeculativeDecoder, name: str) -> None:
    options, sentence = REFUSED[name]
    assert pair.ids(PROMPT).shape[1] == 24
    with pytest.raises(ValueError, match=sentence):
        pair.target.generate(pair.ids(PROMPT), custom_generate=decoder, max_new_tokens=8, **options)
    with pytest.raises(ValueError, match=sentence):
        decoder.generate(pair.ids(PROMPT), max_new_tokens=8, **options)


def test_a_paged_cache_is_refused(decoder: SpeculativeDecoder) -> None:
    """`generate` would leave the decoder out for it."""
    with pytest.raises(ValueError, match="cache 'paged'"):
        decoder.generate(PROMPT, max_new_tokens=8, cache_implementation="paged")


def test_every_option_of_a_generation_config_was_looked_at() -> None:
    """A new one in transformers fails here: give it a row above, or refuse it."""
    tried = {name for options in (*GREEDY.values(), *SAMPLED.values()) for name in options}
    tried |= {name for options, _ in REFUSED.values() for name in options}
    elsewhere = (  # in tests/test_transformers.py, test_processors.py, test_rows.py, or in this file
        "max_length max_new_tokens stop_strings do_sample num_beams use_cache forced_bos_token_id token_healing "
        "watermarking_config output_attentions output_hidden_states output_scores output_logits "
        "return_dict_in_generate pad_token_id bos_token_id prompt_lookup_num_tokens assistant_early_exit "
        "speculation_type constraints force_words_ids num_beam_groups num_return_sequences"
    ).split()
    without_effect = (  # on decoding with a dynamic cache, without beams and without an assistant
        "cache_config max_cache_len decoder_start_token_id is_assistant num_assistant_tokens_schedule "
        "max_matching_ngram_size assistant_lookbehind target_lookbehind assistant_ensemble_weight compile_config "
        "continuous_batching_config low_memory diversity_penalty transformers_version"
    ).split()
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - tried - set(elsewhere) - set(without_effect) == set()


# Stop strings, start tokens.


def byte_tokenizer(*, start: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte, so that characters are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", *([start] if start else [])]
    vocab = {token: i for i, token in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A", special_tokens=[(start, vocab[start])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token=start)


def byte_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(**{**TEXT, "vocab_size": len(tokenizer)})
        return Qwen3ForCausalLM(config).eval()


TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def test_stop_strings_that_end_inside_a_character_stop_where_plain_decoding_does() -> None:
    tokenizer = byte_tokenizer()
    target = byte_model(tokenizer)
    ids = tokenizer("naïve €5", return_tensors="pt")["input_ids"]
    wished = tokenizer("a€ b€c€ é€ d€é", return_tensors="pt")["input_ids"][0].tolist()

    def spell(batch: int, sent: Tensor) -> list[int]:
        return [wished[(sent.shape[0] - ids.shape[1]) % len(wished)]]

    for drafter in ("ngram", AgreeableDrafter(target, corruption=0.3)):
        decoder = SpeculativeDecoder(target, drafter, "fixed:6", tokenizer=tokenizer)
        lengths = set()
        for strings in ("€c", ["é", "zz"], "é€ d", "b€", ["d€é"], "nowhere"):
            options: dict[str, Any] = {"max_new_tokens": 40, "prefix_allowed_tokens_fn": spell, "stop_strings": strings}
            wanted = target.generate(ids, do_sample=False, tokenizer=tokenizer, **options)
            lengths.add(wanted.shape[1])
            assert decoder.generate(ids, temperature=0, **options).sequences.equal(wanted)
            assert decoder.generate(ids, temperature=0, tokenizer=tokenizer, **options).sequences.equal(wanted)
            config = GenerationConfig(max_new_tokens=40, stop_strings=strings, do_sample=False)
            made = decoder.generate(ids, generation_config=config, prefix_allowed_tokens_fn=spell)
            assert made.sequences.equal(wanted)
        assert len(lengths) > 3


def test_stop_strings_of_the_targets_own_config_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    target = byte_model(tokenizer)
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(target.generate(ids, do_sample=False, max_new_tokens=20)[0, 3:])
    monkeypatch.setattr(target.generation_config, "stop_strings", [text[4:6]])
    wanted = target.generate(ids, do_sample=False, max_new_tokens=20, tokenizer=tokenizer)
    decoder = SpeculativeDecoder(target, "ngram", "fixed:6", tokenizer=tokenizer)
    assert decoder.generate(ids, temperature=0, max_new_tokens=20).sequences.equal(wanted)
    with pytest.raises(ValueError, match="stop strings"):  # transformers itself: it keeps the tokenizer to itself
        target.generate(ids, custom_generate=decoder, max_new_tokens=20, tokenizer=tokenizer)


def test_a_templated_prompt_gets_no_second_start_token() -> None:
    tokenizer = byte_tokenizer(start="<s>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    target = byte_model(tokenizer)
    decoder = SpeculativeDecoder(target, "ngram", "fixed:4", tokenizer=tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    meant = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2, "what would be wrong"
    wanted = target.generate(meant, do_sample=False, max_new_tokens=12)
    assert decoder.generate(text, temperature=0, max_new_tokens=12).sequences.equal(wanted)
    plain = tokenizer("hi", return_tensors="pt")["input_ids"]
    assert plain[0, 0] == tokenizer.bos_token_id
    assert decoder.generate("hi", temperature=0, max_new_tokens=12).sequences[:, : plain.shape[1]].equal(plain)


# Inputs beside tokens.


def llava() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=32,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=60)
    ids = torch.tensor([[1, 2, *[60] * 4, 3, 4, 5]])
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}


def gemma3() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = Gemma3TextConfig(**TEXT, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    config = Gemma3Config(
        vision_config=vision,
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    ids = torch.tensor([[1, 2, 61, *[60] * 4, 62, 3, 4, 5]])
    types = (ids == 60).long()
    images = {"pixel_values": torch.randn(1, 3, 8, 8), "token_type_ids": types}
    return Gemma3ForConditionalGeneration(config), {"input_ids": ids, **images}


QWEN_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
QWEN_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}


def qwen_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[1, 2, 58, *[60] * 4, 59, 3, 4, 5]])
    images = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": ids, "mm_token_type_ids": (ids == 60).long(), **images}


def qwen2_5_vl() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {**QWEN_VISION, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_scaling": rope}, vision_config=vision, **QWEN_TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config), qwen_inputs()


def qwen3_vl() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    vision = {**QWEN_VISION, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(text_config={**TEXT, "rope_scaling": rope}, vision_config=vision, **QWEN_TOKENS)
    return Qwen3VLForConditionalGeneration(config), qwen_inputs()


def qwen3_5() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A hybrid: its recurrent layers cannot drop tokens."""
    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
    }
    vision = {**QWEN_VISION, "depth": 2, "num_position_embeddings": 16}
    config = Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_TOKENS)
    return Qwen3_5ForConditionalGeneration(config), qwen_inputs()


def mllama() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Its middle layer attends to the image alone."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {
        **TEXT,
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_scaling": rope,
    }
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=60))
    images = {
        "pixel_values": torch.randn(1, 1, 1, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
    }
    return model, {"input_ids": torch.tensor([[60, 1, 5, 3, 4]]), **images}


def gpt2() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Its token types are added to the embeddings of every token, generated ones included."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3)
    ids = torch.tensor([[1, 2, 3, 4, 5, 1, 2]])
    return GPT2LMHeadModel(config), {"input_ids": ids, "token_type_ids": torch.tensor([[1, 1, 1, 2, 2, 2, 2]])}


WITH_INPUTS = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "gpt2": gpt2,
}


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_inputs_beside_tokens_are_forwarded(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target, inputs = WITH_INPUTS[name]()
    target = target.eval()
    assert target.generation_config is not None
    target.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    wanted = target.generate(**inputs, **options)
    without = target.generate(inputs["input_ids"].where(inputs["input_ids"] != 60, 6), **options)
    for drafter in ("ngram", AgreeableDrafter(target, corruption=0.2)):
        decoder = SpeculativeDecoder(target, drafter, "fixed:4", strict=True)
        # One that runs in between must not disturb it: some models remember positions of the last prompt.
        other = decoder.run(torch.tensor([[7, 8, 9]]), temperature=0, max_new_tokens=6)
        run = decoder.run(**{"prompt" if key == "input_ids" else key: v for key, v in inputs.items()}, **options)
        next(run)
        other.finish()
        assert run.finish().sequences.equal(wanted)
        assert target.generate(**inputs, custom_generate=decoder, **options).equal(wanted)
        text = inputs["input_ids"].where(inputs["input_ids"] != 60, 6)
        assert target.generate(text, custom_generate=decoder, **options).equal(without)
    assert not wanted[:, -20:].equal(without[:, -20:])


@pytest.mark.parametrize("more", ["", "cross_attention_mask"])
def test_images_that_are_read_in_every_pass_are_refused(more: str) -> None:
    target, inputs = mllama()
    if more:
        inputs[more] = torch.ones(1, 5, 1, 1, dtype=torch.long)
    decoder = SpeculativeDecoder(target.eval(), "ngram", "fixed:4")
    with pytest.raises(ValueError, match=f"{more or 'pixel_values'}: Mllama.* without custom_generate"):
        target.generate(**inputs, custom_generate=decoder, max_new_tokens=8)
    text = {"inputs": torch.tensor([[1, 5, 3, 4]]), "max_new_tokens": 12, "do_sample": False}
    assert target.generate(**text, custom_generate=decoder).equal(target.generate(**text))
