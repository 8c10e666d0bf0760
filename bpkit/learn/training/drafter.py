"""A DFlash drafter for any target (Chen et al., 2602.06036), on the target's own outputs.

Many blocks are trained in one pass over a sequence: block *i* starts at a random anchor, sees the target's features
strictly before the anchor and its own positions, and learns the tokens that followed. Position k of a block weighs
exp(-(k-1)/gamma). Block sizes are mixed, because a policy will ask for many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bpkit.decode.pretrained import hidden_states_at
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel, block_attention_mask
from bpkit.learn.training.answers import DrafterRun, learned_from, load_target, target_answers
from bpkit.learn.training.model import autocast, train_model

BLOCK_SIZES = (4, 8, 16, 16, 16, 32)
"""Drawn at random, relative to a trained block size of 16: mostly the trained one."""
NOISE_POSITIONS = 512
"""Block positions in one sequence: 32 blocks of 16, or 128 of 4."""
_AS_THE_TARGET = (
    "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps "
    "rope_parameters max_position_embeddings"
).split()


def position_weights(block_size: int, device: torch.device) -> Tensor:
    """exp(-(k-1)/gamma) for k = 1 .. block_size - 1; gamma is the paper's 7, 5, 4 at 16, 10, 8, and linear between."""
    gamma = 1 + 3 * block_size / 8
    return torch.exp(-torch.arange(block_size - 1, device=device) / gamma)


class BlockScorer(nn.Module):
    """Drafter, target head and cross-entropy: the part worth compiling."""

    def __init__(self, drafter: DFlashModel) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(
        self, noise: Tensor, features: Tensor, positions: Tensor, mask: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        """Cross-entropy of each block position in nats, float32 [batch, blocks * block_size]; 0 at label -100."""
        with autocast(noise.device):
            hidden = self.drafter(noise, features, positions, mask).last_hidden_state
            logits = hidden @ head.T
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)


class BlockDraftLoss(nn.Module):
    """Weighted cross-entropy of random blocks in the responses of a batch of sequences."""

    def __init__(self, drafter: DFlashModel, target: PreTrainedModel) -> None:
        super().__init__()
        self.scorer = BlockScorer(drafter)
        self._frozen = (target.eval().requires_grad_(False),)  # in a tuple, to stay out of checkpoints and DDP

    def compile(self, **options: Any) -> None:
        self.scorer.compile(**options)

    def forward(self, ids: Tensor, prompt_length: Tensor, length: Tensor) -> Tensor:
        """ids: int64 [batch, time], right-padded; prompt_length, length: int64 [batch]. Returns a scalar."""
        config, target = self.scorer.drafter.config, self._frozen[0].to(ids.device)
        block_size = BLOCK_SIZES[int(torch.randint(len(BLOCK_SIZES), ()))] * config.block_size // 16
        blocks = NOISE_POSITIONS // block_size
        # Each leaves at least one token of the response to predict.
        span = (length - 1 - prompt_length).clamp(min=1)[:, None]
        drawn = (torch.rand(len(length), blocks, device=length.device) * span).long()
        anchors = prompt_length[:, None] + drawn
        places = (anchors[..., None] + torch.arange(block_size, device=ids.device)).flatten(1)
        inside = places < length[:, None]
        tokens = ids.gather(1, places.clamp(max=ids.shape[1] - 1))
        is_anchor = torch.arange(places.shape[1], device=ids.device) % block_size == 0
        with torch.no_grad(), autocast(ids.device):
            layers = [i + 1 for i in config.target_layer_ids or ()]
            states = target.model(ids, use_cache=False, output_hidden_states=hidden_states_at(layers)).hidden_states
            features = torch.cat([states[i] for i in layers], dim=-1)
            noise = target.get_input_embeddings()(torch.where(is_anchor, tokens, config.mask_token_id))
        context = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        losses = self.scorer(
            noise,
            features,
            torch.cat([context, places], dim=1),
            block_attention_mask(anchors, block_size, ids.shape[1]),
            target.get_output_embeddings().weight,
            torch.where(inside & ~is_anchor, tokens, -100),
        )
        weights = F.pad(position_weights(block_size, ids.device), (1, 0)).repeat(blocks) * inside
        mean: Tensor = (losses * weights).sum() / weights.sum()
        return mean


def train_drafter(
    target_path: str,
    out: Path,
    *,
    prompts: list[str],
    run: DrafterRun,
    block_size: int = 16,
    target_layer_ids: list[int] | None = None,
    mask_token_id: int | None = None,
) -> None:
    """Let the target answer prompts, train a drafter on the answers and write it to the folder `out`.

    Args:
        target_layer_ids: layers that give the features; by default three spread over the target.
        mask_token_id: what stands for tokens that are to be drafted; by default the tokenizer's mask token.

    Raises:
        ValueError: there is no mask token, or there is a drafter to start from that does not fit.
    """
    tokenizer, target = load_target(target_path, run)
    if run.start_from is not None:
        drafter = _earlier(run.start_from, target, block_size)
    else:
        mask = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
        if mask is None:
            raise ValueError(
                f"the tokenizer of {target_path} has no mask token: name the id of a token that texts do not have with "
                "--mask-token, such as a reserved one"
            )
        drafter = _fresh(target, mask, run.layers, block_size, target_layer_ids)
    answers = target_answers(target, tokenizer, prompts, out, run)
    shape = {
        "layers": drafter.config.num_hidden_layers,
        "block_size": block_size,
        "target_layer_ids": drafter.config.target_layer_ids,
    }
    texts = learned_from(prompts, run)
    train_model("train_drafter", drafter, BlockDraftLoss(drafter, target), answers, out, run, texts=texts, **shape)


def _fresh(
    target: PreTrainedModel, mask_token_id: int, layers: int, block_size: int, target_layer_ids: list[int] | None
) -> DFlashModel:
    """A drafter with random weights, of the target's width."""
    base = target.config
    depth = base.num_hidden_layers
    config = DFlashConfig(
        **{name: getattr(base, name) for name in _AS_THE_TARGET},
        num_hidden_layers=layers,
        tie_word_embeddings=False,
        mask_token_id=mask_token_id,
        architectures=["DFlashModel"],
        block_size=block_size,
        target_layer_ids=target_layer_ids or [1, depth // 2, depth - 2],
    )
    drafter = DFlashModel(config)
    drafter.norm.load_state_dict(target.model.norm.state_dict())
    return drafter


def _earlier(path: Path, target: PreTrainedModel, block_size: int) -> DFlashModel:
    """A drafter that was trained before, in float32; it is trained for blocks of `block_size` from here on.

    Raises:
        ValueError: it is no block-diffusion drafter for that target.
    """
    drafter: DFlashModel = BlockDiffusionDrafter.load(str(path), target).model.float()
    drafter.set_attn_implementation("sdpa")
    drafter.config.block_size = block_size
    return drafter
