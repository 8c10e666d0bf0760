"""Labels for networks that say how far drafts stand: of each token whether it does, if all before it did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


def hazard_labels(accepted: Tensor, left: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Whether each token stands, and whether that is known and all before it stood.

    Args:
        accepted: of each position and block size, integer [batch, sizes].
        left: most that can be accepted at each position, because the output ends: integer [batch].
        sizes: the block sizes.

    Returns:
        Both float32 [batch, sizes, width], `width` the longest draft.
    """
    accepted, left = accepted.long()[..., None], left.long()[:, None, None]
    place = torch.arange(max(sizes) - 1, device=accepted.device)
    length = torch.tensor(list(sizes), device=accepted.device)[:, None] - 1
    stands = place < accepted
    first_that_fell = (place == accepted) & (accepted < left)
    return stands.float(), ((stands | first_that_fell) & (place < length)).float()


def hazard_loss(logits: Tensor, stands: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that count: all of one shape, or `logits` one that expands to it."""
    losses = F.binary_cross_entropy_with_logits(logits.expand_as(stands), stands, reduction="none")
    mean: Tensor = (losses * counts).sum() / counts.sum().clamp(min=1)
    return mean


def visited(accepted: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where steps of each block size begin if that size is kept throughout.

    Args:
        accepted: of each position and block size, [rows, sizes].

    Returns:
        bool [rows, sizes].

    >>> visited(np.array([[1], [9], [0], [0]]))[:, 0].tolist()
    [True, False, True, True]
    """
    found = np.zeros(accepted.shape, np.bool_)
    for column in range(accepted.shape[1]):
        row, steps = 0, (accepted[:, column] + 1).tolist()
        while row < len(steps):
            found[row, column] = True
            row += steps[row]
    return found


def mean_yields(accepted: Tensor, visits: Tensor) -> list[float]:
    """Tokens per step of each block size, over the steps that it would take: a mean over positions is too long.

    Args:
        accepted, visits: of all prompts, [rows, sizes].
    """
    accepted, visits = accepted.double(), visits.double()
    return (((1 + accepted) * visits).sum(dim=0) / visits.sum(dim=0)).tolist()
