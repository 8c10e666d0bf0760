"""The models of a run: random ones of a large shape, made on the device, and the pair that ships."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel
from recipes.gpu.sizes import Sizes


def random_pair(sizes: Sizes, device: torch.device) -> BlockDiffusionDrafter:
    """A drafter with random weights, bound to a target with random weights; bfloat16 on a GPU."""
    config = {**sizes.target, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    with _making(device):
        target = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
        drafter = DFlashModel(
            DFlashConfig(
                **{**config, "num_hidden_layers": sizes.drafter_layers, "tie_word_embeddings": False},
                block_size=sizes.block_size,
                mask_token_id=1,
                target_layer_ids=[*sizes.feature_layers],
            )
        ).eval()
    return BlockDiffusionDrafter(drafter, target, name="random")


@contextmanager
def _making(device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def shipped_pair(device: torch.device, dtype: torch.dtype = torch.float32) -> SpeculativeDecoder:
    """The pair that ships, without capture, under `fixed:1`: plain decoding."""
    return SpeculativeDecoder.from_pretrained(
        policy="fixed:1", device=str(device), dtype=dtype, capture="off", strict=True
    )


def captured(decoder: SpeculativeDecoder) -> SpeculativeDecoder:
    """The same with its passes captured; on a CPU with all but the capture."""
    return SpeculativeDecoder(
        decoder.target, decoder.drafter, "fixed:1", tokenizer=decoder.tokenizer, strict=True, capture="on"
    )


def weight_bytes(*models: torch.nn.Module) -> int:
    """Of all parameters, each once: what a pass reads of them, the embedding standing for the head it is tied to."""
    weights: dict[int, Tensor] = {id(weight): weight for model in models for weight in model.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def head_bytes(target: PreTrainedModel) -> int:
    """Of the target's head, which a drafter reads as well."""
    weight: Tensor = target.get_output_embeddings().weight
    return weight.numel() * weight.element_size()
