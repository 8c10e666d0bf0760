"""Pieces of decisions that every runtime computes alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each row's largest score, the first of equals, and how far it is ahead of the next.

    Args:
        scores: float32 [batch, choices], two choices at least.

    Returns:
        int64 [batch] and float32 [batch].
    """
    place = scores.argmax(dim=1)
    others = torch.where(torch.arange(scores.shape[1]) == place[:, None], -torch.inf, scores)
    return place, scores.amax(dim=1) - others.amax(dim=1)


def count(mask: Tensor) -> Tensor:
    """How many are true along the last axis, int64. Not by a cast: tract takes integers made so for axis lengths."""
    return torch.where(mask, 1, 0).sum(dim=-1)


def running_product(logarithms: Tensor) -> Tensor:
    """Product of a row up to each place, from logarithms [..., width]: ONNX has running sums only."""
    return logarithms.cumsum(dim=-1).exp()


def survival(logits: Tensor) -> Tensor:
    """Chance that a token and all before it stand, from logits of hazards [..., width]."""
    return running_product(nn.functional.logsigmoid(logits))


def clearance(distance: Tensor, length: Tensor) -> Tensor:
    """Least distance to a threshold among the drafted tokens of a row, at most 1.

    Args:
        distance: float32 [batch, width]. length: int64 [batch].
    """
    inside = torch.arange(1, distance.shape[1] + 1) <= length[:, None]
    return torch.where(inside, distance, 1.0).amin(dim=1)
