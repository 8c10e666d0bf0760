"""Matrix products of linear layers in float32 on a CPU, by oneDNN.

torch gives them to MKL, which uses the whole width of the vector units on Intel's processors only. On a core of an AMD
EPYC (Zen 5) the layers of the shipped pair come to 105 GFLOP/s with MKL and 230 with oneDNN, which every build of torch
for x86 has. With few rows, as in decoding, MKL has stairs there too: two rows take half as long again as one. Weights
that are laid out for oneDNN beforehand have none (`docs/decoding.md`). Results differ in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

PACKED_BYTES = 2**28
"""Weights are laid out as oneDNN wants them, beforehand and once, where the copies take no more than this."""
_ROWS, _ROWS_OF_A_STEP = 256, 8
"""Rows of a product that the layout is for: while tracing, and while decoding."""
Products = Literal["torch", "onednn", "auto"]


def use_products(kind: Products, *models: nn.Module | None) -> None:
    """From now on, let the plain linear layers of these models compute by oneDNN, if `kind` says so.

    Only in inference mode, as bpkit decodes: training, and transformers' own `generate`, compute as they always did.
    A second copy of the weights is made, laid out as oneDNN wants them. What computes so already is left alone. `auto`
    is `onednn` for the layers that it serves, if any.

    Raises:
        ValueError: another kind, or one that serves no layer of the first model.
    """
    if kind == "torch":
        return
    if kind not in ("onednn", "auto"):
        raise ValueError(f"products are 'torch', 'onednn' or 'auto', not {kind!r}")
    for model in models:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)] if model is not None else []
        for layer in filter(_served, layers):
            _compute(layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS_OF_A_STEP))
        if kind != "auto" and model is models[0] and not any("forward" in vars(layer) for layer in layers):
            raise ValueError(
                f"products 'onednn' are for linear layers in float32 on an x86 CPU, and {type(model).__name__} has "
                "none there: use 'torch'"
            )


@contextmanager
def quick_products(*models: nn.Module, pack: bool = False) -> Iterator[None]:
    """Within, the plain linear layers of these models compute by oneDNN where that serves them. May be nested.

    Args:
        pack: lay out the weights beforehand, which pays for more than a few passes.
    """
    layers = {layer for model in models for layer in model.modules() if isinstance(layer, nn.Linear) and _served(layer)}
    pack &= sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS) if pack else layer.weight
        _compute(layer, packed)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # another thread may have been here


def product(values: Tensor, weight: Tensor) -> Tensor:
    """[rows, count] of [rows, width] and [count, width], which must be contiguous: else oneDNN takes ages."""
    return _by_onednn(values, weight, None) if _serves(weight) and weight.is_contiguous() else values @ weight.mT


def _compute(layer: nn.Linear, packed: Tensor) -> None:
    """Let a layer compute by oneDNN with its weight, which may be laid out for it."""
    vars(layer)["forward"] = partial(_linear, layer.weight, packed, layer.bias)


def _served(layer: nn.Linear) -> bool:
    """Whether it is a linear layer as it was made: subclasses, and what other libraries wrapped, are left alone."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and _serves(layer.weight)


def _serves(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch._C.has_mkl and torch._C._has_mkldnn


def _linear(weight: Tensor, packed: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    if not torch.is_inference_mode_enabled() or values.dtype != torch.float32:
        return nn.functional.linear(values, weight, bias)
    return _by_onednn(values, packed, bias)


def _by_onednn(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
    return found
