"""Inputs of networks, standardised."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standard(nn.Module):
    """(x - mean) / scale with the figures of the training examples, which are saved with the weights."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def fit(self, x: Tensor) -> None:
        """Take mean and standard deviation of each column of x, [rows, size]."""
        self.mean.copy_(x.mean(dim=0))
        # A column that never moves says nothing, and dividing by its rounding error would make it shout.
        deviation = x.std(dim=0, correction=0)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale
