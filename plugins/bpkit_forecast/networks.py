"""What to expect before a draft and after it. Both give hazards: does the next token stand, if all before it do?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SURE = 1e-6
"""Probabilities are taken to be at least so far from 0 and 1."""


class Before(nn.Module):
    """Hazards from what is known at the anchor.

    Two layers, the second residual, and a table that shifts the hazards of each block size: block-diffusion drafts of
    different sizes differ a little.

    Args:
        inputs: width of the input. sizes: block sizes. width: longest draft.
    """

    def __init__(self, inputs: int, sizes: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.hazards = nn.Linear(hidden, width)
        self.of_size = nn.Parameter(torch.zeros(sizes, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [batch, inputs]. Returns logits that token k stands if all before it do, [batch, sizes, width]."""
        x = self.dropout(F.silu(self.first(self.dropout(x))))
        x = x + F.silu(self.second(x))
        return cast("Tensor", self.hazards(x)[:, None] + self.of_size)

    @torch.no_grad()
    def take_raw_inputs(self, mean: Tensor, scale: Tensor) -> None:
        """Go on with raw inputs in the place of `(x - mean) * scale`, which becomes part of the first layer."""
        self.first.weight.mul_(scale)
        self.first.bias.sub_(self.first.weight @ mean)


class Prepared:
    """A trained `Before` as bare matrix products, for some of its block sizes: the same chances, sooner.

    For a single row most of a module's time is not arithmetic, and the weights are stored the other way round here,
    which the matrix product reads faster. (numpy's calls are cheaper still, but in the loop its threads and torch's get
    in each other's way.)

    Args:
        columns: places of the block sizes among those of training.
    """

    def __init__(self, before: Before, columns: Sequence[int]) -> None:
        layers = (before.first, before.second, before.hazards)
        self.weights = [layer.weight.detach().t().contiguous() for layer in layers]
        self.biases = [layer.bias.detach() for layer in layers]
        self.of_size = before.of_size.detach()[list(columns)].contiguous()

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Inputs in pieces, float [batch, ...]. Returns chances that tokens 1 .. k stand, [batch, columns, width]."""
        first, second, last = self.weights
        x = F.silu(torch.addmm(self.biases[0], torch.cat([part.float() for part in parts], dim=1), first), inplace=True)
        x = F.silu(torch.addmm(self.biases[1], x, second), inplace=True).add_(x)
        hazards = torch.addmm(self.biases[2], x, last)[:, None] + self.of_size
        return hazards.sigmoid_().cumprod(dim=-1)


class Calibrated:
    """A trained `After` for single rows, in plain Python: for a dozen tokens that is sooner than tensors."""

    def __init__(self, after: After) -> None:
        self.weight: list[float] = after.weight.tolist()
        self.bias: list[list[float]] = after.bias.tolist()

    def __call__(self, place: int, probability: Sequence[float], entropy: Sequence[float]) -> list[float]:
        """Chances that tokens 1 .. k of a draft stand; `place` is that of its block size in training."""
        own, doubt, so_far = self.weight
        stands, chance, path = [], 1.0, 0.0
        for p, e, bias in zip(probability, entropy, self.bias[place], strict=False):
            p = min(max(p, SURE), 1 - SURE)
            log_p = math.log(p)
            path += log_p
            chance /= 1 + math.exp(-(own * (log_p - math.log1p(-p)) + doubt * e + so_far * path + bias))
            stands.append(chance)
        return stands


class After(nn.Module):
    """Hazards from the drafter's own word on each token: a calibration, logistic in three figures of each token.

    The log-odds of its probability, the entropy of its distribution, and the log-probability of the draft so far, with
    a bias for each block size and place.
    """

    def __init__(self, sizes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
        self.bias = nn.Parameter(torch.zeros(sizes, width))

    def forward(self, probability: Tensor, entropy: Tensor, bias: Tensor) -> Tensor:
        """All float32 [..., width]; `bias` is a row of the table for each draft. Returns logits [..., width]."""
        log_p = probability.clamp(SURE, 1 - SURE).log()
        odds = log_p - torch.log1p(-probability.clamp(SURE, 1 - SURE))
        own, doubt, so_far = self.weight.unbind()
        return own * odds + doubt * entropy + so_far * log_p.cumsum(dim=-1) + bias
