"""Which DFlash checkpoints are drafted with as they were trained, and for which target.

The layout has offshoots that keep its name for the config (`dflash_config`) and add settings. A setting that is
ignored drafts worse without a word, so that every key of a config is known here, or neutral, or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpkit.draft.vocabulary import PADDING

_ARCHITECTURES = ("DFlashDraftModel", "DFlashModel")

# Read by the model: of the config itself, and of its dflash_config.
_HONOURED = frozenset(
    "attention_bias block_size causal dflash_config head_dim hidden_act hidden_size intermediate_size is_causal "
    "layer_types mask_token_id max_position_embeddings max_window_layers num_attention_heads num_hidden_layers "
    "num_key_value_heads quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window "
    "target_layer_ids use_sliding_window".split()
)
# Change no draft: the drafter has no embedding, no head and no dropout; the rest is about files, training and output.
_METADATA = frozenset(
    "architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
    "initializer_range label2id loss_decay_gamma loss_type mask_token model_type num_anchors output_attentions "
    "output_hidden_states pad_token_id pretraining_tp problem_type return_dict target_model_id tie_word_embeddings "
    "torch_dtype transformers_version use_cache vocab_size".split()
)
# May be given if they say what the model does.
_ONLY: dict[str, Any] = {
    "output_multiplier": 1,
    "input_embedding_scale": 1,
    "partial_rotary_factor": 1,
    "use_qk_norm": True,
    "projector_type": "dflash",
}
_ROPE = frozenset(
    "attention_factor beta_fast beta_slow factor high_freq_factor long_factor low_freq_factor mscale mscale_all_dim "
    "original_max_position_embeddings partial_rotary_factor rope_theta rope_type short_factor truncate type".split()
)


def refuse_unknown_layout(path: str, config: Mapping[str, Any], *, vocab_size: int) -> None:
    """Raise if a config.json is of another layout, or for a target of another vocabulary than `vocab_size` tokens."""
    others = [name for name in config.get("architectures") or () if name not in _ARCHITECTURES]
    if others:
        raise ValueError(
            f"{path} is a {others[0]}, not a DFlash drafter of the known layout ({_ARCHITECTURES[0]}): "
            "use a DFlash checkpoint, a causal language model or n-grams as the drafter"
        )
    given = config.get("vocab_size")
    if given is not None and abs(given - vocab_size) > PADDING:
        raise ValueError(
            f"drafter {path} was made for a vocabulary of {given}, but the target has {vocab_size}: "
            "use the drafter that was trained for this target"
        )


def refuse_unfit(config: Any, target: Any, embedding_rows: int, name: str) -> None:
    """Raise if a drafter's `DFlashConfig` does not fit a target's text config, or asks for what the model does not."""
    nested = config.dflash_config or {}
    given = {**config.to_dict(), **nested}
    width, depth, layers = target.hidden_size, target.num_hidden_layers, config.target_layer_ids or ()
    faults = [
        f"was made for hidden size {made_for}, but the target has {width}"
        for made_for in (config.hidden_size, given.get("target_hidden_size") or width)
        if made_for != width
    ]
    if (given.get("num_target_layers") or depth) != depth:
        faults.append(f"was made for a target of {given['num_target_layers']} layers, but the target has {depth}")
    if not all(0 <= layer < depth for layer in layers):
        faults.append(f"wants features of target layers {layers}, but the target has layers 0 to {depth - 1}")
    way_out = "use the drafter that was trained for this target"
    if not (faults or 0 <= config.mask_token_id < embedding_rows):
        faults.append(f"has mask token {config.mask_token_id}, but the target embeds tokens 0 to {embedding_rows - 1}")
        way_out += ", or resize the target's embeddings to its tokenizer"
    if faults:
        raise ValueError(f"drafter {name} {faults[0]}: {way_out}")
    if asked := _not_honoured(config, nested):
        settings = ", ".join(f"{key} = {value!r}" for key, value in sorted(asked.items()))
        raise ValueError(
            f"drafter {name} was trained with settings that bpkit does not honour, and would draft worse without them: "
            f"{settings}; use another drafter, or remove them from its config.json if they change no draft"
        )


def _not_honoured(config: Any, nested: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, of the config or its `dflash_config`, that ask for what the model does not do."""
    everywhere = [*config.to_dict().items(), *nested.items()]
    asked = {key: value for key, value in everywhere if _is_unknown(key, value)}
    rope = config.rope_parameters or {}
    asked |= {f"rope_parameters.{key}": value for key, value in rope.items() if _is_unknown(key, value, _ROPE)}
    kinds = set(config.layer_types or ())
    if kinds - {"full_attention", "sliding_attention"} or ("sliding_attention" in kinds and not config.sliding_window):
        asked |= {"layer_types": config.layer_types, "sliding_window": config.sliding_window}
    # Some engines read it from here; the model has one window.
    if nested.get("sliding_window") not in (None, config.sliding_window):
        asked["dflash_config.sliding_window"] = nested["sliding_window"]
    vocab_size = dict(everywhere).get("draft_vocab_size")
    if vocab_size and vocab_size != config.vocab_size:
        asked["draft_vocab_size"] = vocab_size
    return asked


def _is_unknown(key: str, value: Any, known: frozenset[str] = _HONOURED | _METADATA) -> bool:
    """Whether a setting is neither known, nor switched off, nor what is done anyway."""
    if key in _ONLY:
        return value is not None and value != _ONLY[key]
    checked = ("num_target_layers", "target_hidden_size", "draft_vocab_size")
    switched_off = value is None or value is False or value in (0, "", [], {}, ())
    return not (key in known or key in checked or key.startswith("_") or switched_off)
