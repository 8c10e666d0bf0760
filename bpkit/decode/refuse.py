"""What speculative decoding cannot honour is refused with a sentence, never ignored."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    SynthIDTextWatermarkingConfig,
)

from bpkit.decode.pretrained import input_device, inside

# Options of a generation config that ask for another way of decoding, and what to do instead.
_OTHER_MODES = {
    "num_beams": (1, "beam search keeps several texts; use num_beams=1"),
    "num_beam_groups": (1, "beam search keeps several texts; leave it out"),
    "constraints": (None, "constrained beam search keeps several texts; use a logits processor"),
    "force_words_ids": (None, "constrained beam search keeps several texts; use a logits processor"),
    "penalty_alpha": (0, "contrastive search is another decoding method"),
    "dola_layers": (None, "DoLa is another decoding method"),
    "prompt_lookup_num_tokens": (None, "use drafter='ngram' instead"),
    "assistant_early_exit": (None, "early exit is another way of drafting; use one of bpkit's drafters"),
    "use_mtp": (False, "multi-token prediction is another way of drafting; use one of bpkit's drafters"),
    "speculation_type": (None, "the drafter and policy of the decoder decide how to speculate"),
    "guidance_scale": (1, "classifier-free guidance keeps state from token to token; leave it out"),
    "token_healing": (False, "heal the prompt before the call"),
    "prefill_chunk_size": (None, "say prefill_chunk=... to the decoder's own `generate`"),
    "output_scores": (False, "scores are not kept; call the target on the finished sequence"),
    "output_logits": (False, "logits are not kept; call the target on the finished sequence"),
    "output_attentions": (False, "attentions are not kept; call the target on the finished sequence"),
    "output_hidden_states": (False, "hidden states are not kept; call the target on the finished sequence"),
}


def refuse_what_we_cannot_do(
    model: PreTrainedModel, target: PreTrainedModel, ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Raise ValueError that names the option and the way out."""
    if inside(model) is not target:
        raise ValueError("this decoder was made for another target: call generate on decoder.target")
    for name, (neutral, instead) in _OTHER_MODES.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise ValueError(f"speculative decoding cannot honour {name}={value!r}: {instead}")
    if isinstance(config.watermarking_config, SynthIDTextWatermarkingConfig):
        raise ValueError("watermarking_config: SynthID keeps state from token to token; use a WatermarkingConfig")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds: the prompt must be token ids; pass input_ids")
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if not config.use_cache or model_kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False: speculative decoding needs the KV cache; leave use_cache on")
    _refuse_caches(config, model_kwargs.get("past_key_values"))
    reads_on = input_device(target)
    if ids.device.type != reads_on.type or (None not in (ids.device.index, reads_on.index) and ids.device != reads_on):
        raise ValueError(f"input_ids are on {ids.device}, the target reads them on {reads_on}: move them there")


def _refuse_caches(config: GenerationConfig, cache: Cache | None) -> None:
    if config.cache_implementation not in (None, "dynamic") or not isinstance(cache, DynamicCache | None):
        kind = config.cache_implementation or type(cache).__name__
        raise ValueError(f"cache {kind!r}: only a dynamic cache can drop rejected tokens; leave cache_implementation")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values already holds tokens: the decoder makes its own cache; pass the whole prompt")
    if getattr(cache, "_is_user_defined", False):
        raise ValueError(
            "past_key_values: the decoder makes its own cache; leave it out, and take the filled one from what "
            "return_dict_in_generate=True gives"
        )


_DROPPED = {
    "assistant_model": "the decoder has its drafter; pass it as SpeculativeDecoder(target, drafter)",
    "negative_prompt_ids": "only classifier-free guidance reads it, which keeps state; leave it out",
    "negative_prompt_attention_mask": "only classifier-free guidance reads it, which keeps state; leave it out",
    "synced_gpus": "requests draft and verify in passes of their own number; leave it out",
    "streamer": "transformers does not hand it to custom decoders; use SpeculativeDecoder(..., streamer=...)",
}


def refuse_what_generate_dropped() -> None:
    """Refuse arguments of `generate` that it does not pass on to a callable.

    It drops `assistant_model`, `streamer` and others without a word, so the only place to see them is its own frame.
    If that frame should look different in another version, nothing is refused.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "__call__":
        frame = frame.f_back
    caller = frame.f_back if frame is not None else None
    if caller is None or caller.f_code.co_name != "generate":
        return
    for name, instead in _DROPPED.items():
        value = caller.f_locals.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: {instead}")


def refuse_virtual_tokens(model: Any) -> None:
    """Refuse adapters of PEFT that put virtual tokens before the input of every pass."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = getattr(config, "peft_type", "prompt learning")
        raise ValueError(
            f"the target's adapter ({getattr(kind, 'value', kind)}) puts virtual tokens before every input, which a "
            "pass over several tokens cannot have; use an adapter that lives in the layers, such as LoRA"
        )


def refuse_changing_frequencies(model: PreTrainedModel, prompt_length: int, max_length: int) -> None:
    """Refuse a text in which rotary embeddings would change their frequencies after the prompt.

    A pass has one set of frequencies, that of its last position. Plain decoding would change them at another token
    than passes over several tokens do.
    """
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [x for x in parameters.values() if isinstance(x, dict)]
    last = max_length - 1  # the text's last token is not read
    for rope in kinds:  # several where layer types differ
        kind = str(rope.get("rope_type", ""))
        if "dynamic" in kind:
            kind, limit = "dynamic", int(config.max_position_embeddings)
            changes = last > limit
        elif kind == "longrope":
            limit = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
            changes = prompt_length <= limit < last
        else:
            continue
        if changes:
            raise ValueError(
                f"the target's rotary embedding ({kind}) changes its frequencies beyond {limit} tokens, and the text "
                f"may have {max_length}: keep prompt and max_new_tokens within {limit + 1}, or use plain generate"
            )
