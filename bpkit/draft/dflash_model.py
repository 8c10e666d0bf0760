"""The DFlash draft model (Chen et al., 2602.06036) as a transformers model, in the published checkpoint layout.

Hidden states of a few target layers are concatenated, projected (`fc`), normalised (`hidden_norm`) and injected as
extra keys and values into every layer. The queries are a block: the anchor's embedding and mask embeddings. The
model has no embedding and no head of its own; it uses the target's.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache, Qwen3Config
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from bpkit.decode.masks import added


@strict
class DFlashConfig(Qwen3Config):
    """Configuration of a DFlash drafter.

    Published checkpoints keep `mask_token_id` and `target_layer_ids` under `dflash_config`, and `block_size` either
    beside it or (Qwen3.5 and later) inside it. Both are read; all three are attributes here, as transformers' own
    `DFlashTokenCandidateGenerator` expects, and `save_pretrained` writes the published layout.

    Attributes:
        target_layer_ids: layer *i* means `hidden_states[i + 1]` of the target.
        is_causal: whether later positions of a block are hidden; by default only in sliding-window layers. Some
            checkpoints say it as `dflash_config.causal`.
    """

    has_no_defaults_at_init = True  # transformers compares a config that it writes or logs to the defaults otherwise

    dflash_config: dict[str, Any] | None = None
    block_size: int = 0
    mask_token_id: int = -1
    target_layer_ids: list[int] | None = None
    is_causal: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        nested = self.dflash_config or {}
        self.block_size = self.block_size or nested.get("block_size") or 16
        if self.mask_token_id == -1:
            self.mask_token_id = nested.get("mask_token_id", -1)
        self.target_layer_ids = self.target_layer_ids or nested.get("target_layer_ids")
        if self.is_causal is None:
            self.is_causal = nested.get("causal")
        if self.mask_token_id == -1 or not self.target_layer_ids:
            raise ValueError(
                "not a DFlash drafter: its config.json needs dflash_config.mask_token_id and "
                "dflash_config.target_layer_ids (is this the folder of the target?)"
            )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        moved = {name: values.pop(name, None) for name in ("mask_token_id", "target_layer_ids")}
        values["dflash_config"] = {**(values.get("dflash_config") or {}), **moved}
        values["architectures"] = ["DFlashDraftModel"]  # the name that engines look for
        if values.get("is_causal") is None:
            values.pop("is_causal", None)
        return values


class DFlashAttention(Qwen3Attention):
    """Queries from the block; keys and values from context features and block; no causal mask."""

    def __init__(self, config: DFlashConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        places: tuple[Tensor, int] | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Returns like hidden_states.

        Args:
            hidden_states: [batch, block, hidden]. context: [batch, new context, hidden].
            places: positions of the block, int64 [batch, block], and the one after the last key's; by default the block
                is the last keys.
        """
        batch, width, _ = hidden_states.shape
        source = torch.cat([context, hidden_states], dim=1)
        query = self.q_norm(self.q_proj(hidden_states).view(batch, width, -1, self.head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(source).view(batch, source.shape[1], -1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(source).view(batch, source.shape[1], -1, self.head_dim).transpose(1, 2)
        cos, sin = (part.unsqueeze(1) for part in rotary)
        query = query * cos[..., -width:, :] + rotate_half(query) * sin[..., -width:, :]
        key = key * cos + rotate_half(key) * sin
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_mask = self._mask(query, key, places, attention_mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if attend is eager_attention_forward and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = added(attention_mask, query.dtype)
        output, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(output.reshape(batch, width, -1))  # type: ignore[no-any-return]

    def _mask(
        self, query: Tensor, key: Tensor, places: tuple[Tensor, int] | None, given: Tensor | None
    ) -> Tensor | None:
        """What is given, without keys outside of the window and, in a causal layer, without those ahead."""
        causal = self.sliding_window is not None if self.config.is_causal is None else self.config.is_causal
        if self.sliding_window is None and not causal:
            return given
        count = key.shape[2]
        keys = torch.arange(count, device=key.device)
        block = keys[None, -query.shape[2] :]
        if places is not None:
            block, end = places
            keys = keys + (end - count)
        ahead = (keys - block[..., None])[:, None]
        visible = ahead.abs() < (self.sliding_window or count)
        if causal:
            visible &= ahead <= 0
        if given is None:
            return visible
        given = given[..., -count:]
        return visible & given if given.dtype == torch.bool else given.masked_fill(~visible, float("-inf"))


class DFlashLayer(Qwen3DecoderLayer):
    """A Qwen3 layer whose attention also sees the context features."""

    def __init__(self, config: DFlashConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = DFlashAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **attention)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))  # type: ignore[no-any-return]


class DFlashModel(Qwen3PreTrainedModel):
    """The draft model. `from_pretrained` loads z-lab's checkpoints and local folders of the same layout."""

    config: DFlashConfig
    config_class = DFlashConfig
    main_input_name = "noise_embeds"
    _no_split_modules = ["DFlashLayer"]

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        assert config.target_layer_ids is not None
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        key_end: int | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Denoise a block in one pass.

        Args:
            noise_embeds: target embeddings of anchor and masks, [batch, block, hidden].
            context_hidden_states: features of the target positions since the last call, concatenated over
                `target_layer_ids`, [batch, new context, layers * hidden].
            position_ids: positions of new context and block, int64 [batch, new context + block].
            attention_mask: bool or additive [batch, 1, block, keys], or 1/0 [batch, keys]; by default all is seen.
            past_key_values: keys and values of the earlier context. This call appends those of the new context
                *and of the block*: crop the block off again.
            key_end: given if blocks end at different keys: columns of the cache are positions then, and this is their
                count. Sliding and causal layers go by it. By default the block is the last keys.

        Returns:
            `last_hidden_state`, [batch, block, hidden], for the target's head.
        """
        place = self.hidden_norm.weight  # its device and dtype, also where the matrices are quantised
        context = self.hidden_norm(self.fc(context_hidden_states.to(place)))
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            new = context.shape[1] + noise_embeds.shape[1]
            position_ids = torch.arange(seen, seen + new, device=place.device)[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None, :]
        hidden = noise_embeds.to(place)
        places = None if key_end is None else (position_ids[:, -hidden.shape[1] :], key_end)
        rotary = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                context=context,
                rotary=rotary,
                attention_mask=attention_mask,
                places=places,
                past_key_values=past_key_values,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


def block_attention_mask(anchors: Tensor, block_size: int, context: int) -> Tensor:
    """Which keys the positions of blocks side by side see: context before the anchor, and their own block.

    Args:
        anchors: int64 [batch, blocks].

    Returns:
        bool [batch, 1, blocks * block_size, context + blocks * block_size].
    """
    batch, blocks = anchors.shape
    anchor = anchors.repeat_interleave(block_size, dim=1)
    before = torch.arange(context, device=anchors.device) < anchor[..., None]
    owner = torch.arange(blocks, device=anchors.device).repeat_interleave(block_size)
    same = (owner[:, None] == owner).expand(batch, -1, -1)
    return torch.cat([before, same], dim=-1)[:, None]
