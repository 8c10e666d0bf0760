"""A trained perceptron of one output as bare matrix products, for decisions at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpkit_mlp.networks import ResidualMLP, Standard


class Regressor:
    """What `mlp(standard(x))` gives for a `ResidualMLP` of one output, in eval mode and in float32.

    For a single row most of a module's time is not arithmetic: the weights are stored the other way round here, which
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
            self.layers.append((weight.t().contiguous(), bias))
        self.output = mlp.output.weight.detach()[0].contiguous()
        self.offset = mlp.output.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [batch, inputs] -> [batch]."""
        if self.output.device != x.device:
            self._move(x.device)
        (weight, bias), *residual = self.layers
        x = torch.addmm(bias, x, weight).relu_()
        for weight, bias in residual:
            x = torch.addmm(bias, x, weight).relu_().add_(x)
        return torch.addmv(self.offset, x, self.output)

    def _move(self, device: torch.device) -> None:
        self.layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers]
        self.output, self.offset = self.output.to(device), self.offset.to(device)
