"""The perceptron that both methods use, and what may stand before it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.learn.standard import Standard

__all__ = ["Normalisation", "ResidualMLP", "Standard", "normalisation"]

Normalisation = Literal["none", "standard", "layer", "softmax"]


class ResidualMLP(nn.Module):
    """Input -> width, then width -> width with a residual connection, then a linear output.

    Each layer is linear, ReLU, dropout; what entered a layer is added after them, from the second layer on.

    Args:
        depth: layers before the output: 2 in BlockPilot, 3 in AdaEAGLE's LDLP.
    """

    def __init__(self, inputs: int, width: int, outputs: int, *, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = [inputs] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.output = nn.Linear(width, outputs)
        self.dropout = dropout
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs] -> [batch, outputs]."""
        for place, layer in enumerate(self.layers):
            passed = F.dropout(F.relu(layer(x)), self.dropout, self.training)
            x = passed + x if place > 0 else passed
        scores: Tensor = self.output(x)
        return scores


def normalisation(kind: Normalisation, size: int) -> nn.Module:
    """What stands before the perceptron; `none` and `standard` are affine, so that they fold into a linear head."""
    if kind == "standard":
        return Standard(size)
    if kind == "layer":
        return nn.LayerNorm(size, elementwise_affine=False)
    return nn.Softmax(dim=-1) if kind == "softmax" else nn.Identity()
