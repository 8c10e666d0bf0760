"""On which device a part of a model works, and moving models that may be moved."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def move(model: Model, device: torch.device | str) -> Model:
    """Move a model to a device, but leave it where it is if it is quantised or split over several devices."""
    quantised = getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None
    if quantised or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return model
    moved: Model = model.to(device)
    return moved


def device_of(part: nn.Module | None, model: PreTrainedModel) -> torch.device:
    """The device that a part of a model takes its input on; without weights of its own, the model's.

    Weights that were offloaded lie on the meta device: their hook says where they are computed with.
    """
    execution = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
    if execution is not None:
        return torch.device(f"cuda:{execution}" if isinstance(execution, int) else execution)
    weight = getattr(part, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) and not weight.is_meta else model.device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes token ids."""
    return device_of(model.get_input_embeddings(), model)


def head_device(model: PreTrainedModel) -> torch.device:
    """Where a model computes its logits."""
    return device_of(model.get_output_embeddings(), model)


def working_dtype(part: nn.Module | None, model: PreTrainedModel) -> torch.dtype:
    """The dtype of a part's input: its weight's, or the model's where that is packed or of 8 bits or fewer."""
    weight = getattr(part, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
        return weight.dtype
    dtype: torch.dtype = model.dtype
    return dtype
