"""Every architecture of causal language models that transformers has, at its smallest: random weights, no network.

Texts of random models hardly ever repeat themselves, so that an n-gram is never right about them. Those of
`repeating_causal_lm` do: most of the time the next token depends on the last one alone, in cycles of a few tokens,
which attention and noise break now and then.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel

LARGEST = 7_000_000
"""Parameters of the largest model that is made."""

WINDOW = 8
"""Positions that sliding layers see."""

_WIDTH = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "lru_width", "embedding_size", "word_embed_proj_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "feed_forward_size")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k", "top_k_experts")
_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size")
_COMMON: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_LAYERS, 4),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_INNER, 64),
    **dict.fromkeys(_POSITIONS, 256),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_ACTIVE, 2),
    **dict.fromkeys(_WINDOWS, WINDOW),
    "encoder_layers": 1,
    "depth": 2,
    "image_size": 28,
    "patch_size": 14,
    "spatial_merge_size": 1,
    "vocab_size": 64,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "n_mamba_heads": 2,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "state_size": 8,
    "index_head_dim": 8,
    "index_n_heads": 16,  # with few, keys score exactly 0 and which of them are chosen is left to chance
    "index_topk": 4,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}

_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4, "head_dim": None}
_LATENT_8 = {"num_key_value_heads": 4, "head_dim": 8}
_ROPE_BY_TYPE = {name: {"rope_type": "default", "rope_theta": 10000.0} for name in set(_SLIDING["layer_types"])}
_SHARED_KV = {**_SLIDING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 2}
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT_8,
    "bailing_hybrid": {**_LATENT_8, **_MIXED},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere2": _SLIDING,
    "cohere_compass_text": {**_SLIDING, "rope_parameters": _ROPE_BY_TYPE},
    "dots3_note_text": _LATENT_8,
    "cpmant": {"prompt_types": 4, "prompt_length": 8, "segment_types": 8, "dim_head": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT_8,
    "falcon": {"head_dim": ...},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma3n_text": {**_SHARED_KV, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**_SHARED_KV, "head_dim": ..., "global_head_dim": 8},
    "gemma4_unified_text": {**_SLIDING, "head_dim": ..., "global_head_dim": 8},
    "glm4_moe_lite": _LATENT_8,
    "glm_moe_dsa": _LATENT_8,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _MIXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_LATENT, **_MIXED},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "longcat_flash": _LATENT_8,
    "mamba2": {"head_dim": 16},
    "minicpm3": _LATENT,
    "minimax": {"layer_types": ["full_attention", "linear_attention"] * 2, "block_size": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"]},
    "olmo_hybrid": _MIXED,
    "prophetnet": {
        "num_hidden_layers": ...,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_attention_heads": ...,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen3_5_moe_text": _MIXED,
    "qwen3_5_text": _MIXED,
    "qwen3_next": _MIXED,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [],
        "ple_embed_dim": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "attn_layers": ["local", "local"],
        "num_hidden_layers": ...,
        "local_attn_chunk_length": 16,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 8,
        "shape_vocab_size": 64,
    },
    "xlnet": {"max_position_embeddings": ...},
    "xlstm": {"v_head_dim": ..., "head_dim": ..., "hidden_size": 128, "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "youtu": _LATENT,
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Values of a config beside or over the common ones; ... leaves a common one out."""

_TEXT: dict[str, str] = {
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
    "emu3": "emu3_text_model",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
    "musicgen": "musicgen_decoder",
    "musicgen_melody": "musicgen_melody_decoder",
}
"""Model types that wrap the config of another; the text model is made from that one."""


_WHOLE = ("dbrx",)
"""Types whose values above hold for the configs in theirs too."""


def model_types() -> list[str]:
    """All model types of causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **values: Any) -> PreTrainedConfig:
    """A config of the type with all sizes shrunk, those of the configs in it as well."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    names = (
        () if model_type in _WHOLE else [name for name in kind.sub_configs if getattr(default, name, None) is not None]
    )
    parts = {name: _shrunk(type(getattr(default, name)), name) for name in names}
    config = kind(**_shrunk(kind, model_type) | parts | values)
    for name in ("is_decoder", "use_cache"):
        if getattr(config, name, None) is False:
            setattr(config, name, True)
    return config


def _shrunk(kind: type[PreTrainedConfig], name: str) -> dict[str, Any]:
    default = kind()
    name = kind.model_type if kind.model_type in _SPECIAL else name
    known = {name: value for name, value in _COMMON.items() if _has(default, name)} | _SPECIAL.get(name, {})
    return {"model_type": kind.model_type} | {name: value for name, value in known.items() if value is not ...}


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a value that differs from layer to layer
        return True


def tiny_causal_lm(model_type: str, *, seed: int = 0, spread: float = 3.0, **values: Any) -> PreTrainedModel:
    """A causal language model of the type, float32.

    Args:
        spread: factor on all matrices but embeddings; at 1 the layers of most architectures hardly change a score.
        values: of its config.

    Raises:
        MemoryError: the smallest config that we know is too large.
    """
    config = tiny_config(_TEXT.get(model_type, model_type), **values)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    with torch.device("meta"):
        count = sum(weight.numel() for weight in kind(config).parameters())
    if count > LARGEST:
        raise MemoryError(f"{count:,} parameters at its smallest")
    return _made(kind, config, seed, spread=spread)


def _made(kind: Any, config: PreTrainedConfig, seed: int, *, spread: float = 1.0, repeating: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config).float().eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name and "lm_head" not in name:
                weight *= spread
        if repeating:
            _repeat(model)
    return model


# Texts that repeat themselves


VOCABULARY = 96
CYCLE = 5
"""Tokens after which a text comes back to where it was, unless something else was likelier."""
REPEATING: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    # Caps low enough to change these models' scores.
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gpt2": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_5_text": {},
}
"""Types that are tried with all options, and values of their configs."""


def repeating_causal_lm(model_type: str, *, seed: int = 0, layers: int = 2, **values: Any) -> PreTrainedModel:
    """A small model whose texts repeat themselves. `values` are of its config, over those of `REPEATING`."""
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.22, "tie_word_embeddings": False}
    shape |= dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"))
    config = tiny_config(model_type, **{**shape, **REPEATING.get(model_type, {}), **values})
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return _made(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, seed, repeating=True)


def _repeat(model: PreTrainedModel) -> None:
    """Make the head answer each token's embedding with the next token of its cycle, most of the time."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    meaning = torch.randn_like(embedding.weight)
    # Gemma multiplies embeddings when it reads them.
    embedding.weight.copy_(1.5 * meaning / getattr(embedding, "scalar_embed_scale", 1.0))
    tokens = torch.arange(len(meaning))
    following = tokens - tokens % CYCLE + (tokens + 1) % CYCLE
    cycled = following < len(tokens)  # the last tokens have no whole cycle
    answers = torch.randn_like(meaning)
    answers[following[cycled]] += 2 * meaning[cycled]
    head.weight.copy_(0.2 * answers)


# Drafters


@torch.no_grad()
def disturbed(model: PreTrainedModel, *, noise: float = 0.15, seed: int = 0) -> PreTrainedModel:
    """A copy with noise on its weights, a share of each weight's own spread: it agrees with the model now and then."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in made.parameters():
        spread = weight.std(correction=0) * noise
        weight += torch.randn(weight.shape, generator=generator) * spread
    return made


def tiny_dflash(target: PreTrainedModel, *, block_size: int = 8, seed: int = 0) -> BlockDiffusionDrafter:
    """An untrained DFlash drafter of one layer for a target; its mask token is the last of the vocabulary."""
    text = target.config.get_text_config()
    config = DFlashConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        block_size=block_size,
        mask_token_id=text.vocab_size - 1,
        target_layer_ids=list(range(text.num_hidden_layers)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DFlashModel(config).float().eval()
    return BlockDiffusionDrafter(model, target)
