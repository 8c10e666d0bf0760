"""A trained perceptron as bare matrix products, for decisions of one row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpkit_mlp.networks import ResidualMLP, Standard

SMALL = 1 << 20
"""Numbers up to which a weight is copied the other way round: beyond the caches the copy is no faster."""


class Products:
    """What `mlp(standard(x))` gives for a `ResidualMLP`, in eval mode and in float32.

    For a single row most of a module's time is not arithmetic: small weights are stored the other way round here, which
    the matrix product reads faster, and the normalisation is part of the first layer.
    """

    def __init__(self, mlp: ResidualMLP, standard: Standard | None = None) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer in mlp.layers:
            assert isinstance(layer, nn.Linear)
            weight, bias = layer.weight.detach(), layer.bias.detach()
            if standard is not None and not self.layers:
                scaled = weight.double() / standard.scale
                weight, bias = scaled.float(), (bias - scaled @ standard.mean.double()).float()
            self.layers.append((_turned(weight), bias))
        self.output = _turned(mlp.output.weight.detach())
        self.offset = mlp.output.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [batch, inputs] -> [batch, outputs]."""
        return torch.addmm(self.offset, self._last_layer(x), self.output)

    def _last_layer(self, x: Tensor) -> Tensor:
        (weight, bias), *residual = self.layers
        x = torch.addmm(bias, x, weight).relu_()
        for weight, bias in residual:
            x = torch.addmm(bias, x, weight).relu_().add_(x)
        return x


class Regressor(Products):
    """Of a `ResidualMLP` with one output: float32 [batch, inputs] -> [batch]."""

    def __init__(self, mlp: ResidualMLP, standard: Standard | None = None) -> None:
        super().__init__(mlp, standard)
        self.output = self.output[:, 0].contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmv(self.offset, self._last_layer(x), self.output)


def _turned(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [inputs, outputs]."""
    return weight.t().contiguous() if weight.numel() <= SMALL else weight.t()
