"""Matrix products of linear layers in float32 on a CPU, by oneDNN.

torch gives them to MKL, which uses the whole width of the vector units on Intel's processors only. On a core of an AMD
EPYC (Zen 5) the layers of the shipped pair come to 105 GFLOP/s with MKL and 230 with oneDNN, which every build of torch
for x86 has. Results differ in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def quick_products(*models: nn.Module) -> Iterator[None]:
    """Within, the plain linear layers of these models compute by oneDNN where that serves them. May be nested."""
    layers = {layer for model in models for layer in model.modules() if isinstance(layer, nn.Linear) and _served(layer)}
    for layer in layers:
        vars(layer)["forward"] = partial(_linear, layer.weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _served(layer: nn.Linear) -> bool:
    """Whether it is a linear layer as it was made: subclasses, and what other libraries wrapped, are left alone."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and torch._C.has_mkl
        and torch._C._has_mkldnn
    )


def _linear(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    if not torch.is_inference_mode_enabled() or values.dtype != torch.float32:
        return nn.functional.linear(values, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
    return product
