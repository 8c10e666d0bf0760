"""Short names for things too large to compare: a model's weights, a list of prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder

VALUES = 4096
"""Values of each tensor that count: enough to tell training runs apart, few enough for large models."""


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and evenly spaced values of every tensor, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // VALUES)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_models(decoder: SpeculativeDecoder) -> tuple[str, str | None]:
    """Of the weights of target and drafter; None for a drafter without a model."""
    model = getattr(decoder.drafter, "model", None)
    return fingerprint_model(decoder.target), None if model is None else fingerprint_model(model)


def fingerprint_texts(texts: Iterable[str]) -> str:
    """SHA-256 over texts in order, as 16 hexadecimal digits."""
    return hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()[:16]


def fingerprint_values(values: Any) -> str:
    """SHA-256 over plain JSON values, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
