"""Tiny random models of many architectures, to try a decoder on: made in milliseconds, no network.

Random models hardly ever repeat themselves, so that an n-gram is never right about them. These do: most of the time
the next token depends on the last one alone, in cycles of a few tokens, which attention and noise break now and then.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel

VOCABULARY = 96
WINDOW = 6
"""Positions that sliding layers see; shorter than any text worth trying."""
CYCLE = 5
"""Tokens after which a text comes back to where it was, unless something else was likelier."""
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.22,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_GEMMA: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    # Caps low enough to change these models' scores.
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0},
    "gemma3_text": _GEMMA,
    "gpt2": {"n_positions": 128},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _LINEAR,
}
"""Of each `model_type` the values of its config beside the common shape."""


def tiny_model(model_type: str, *, seed: int = 0, **values: Any) -> PreTrainedModel:
    """A causal language model of that `model_type`, float32 on the CPU; the same seed gives the same weights.

    Args:
        values: of its config, over those of `ARCHITECTURES`.

    >>> type(tiny_model("gpt2")).__name__
    'GPT2LMHeadModel'
    """
    shape = {**_SHAPE, **ARCHITECTURES.get(model_type, {}), **values}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).float().eval()
        _repeat(model)
    return model


@torch.no_grad()
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
