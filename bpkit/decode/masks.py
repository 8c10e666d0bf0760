"""Which keys the queries of a pass see, where its rows hold different counts of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def causal(places: Tensor, first: int, end: int, window: int | None = None) -> Tensor:
    """Each query sees the keys up to its own place, the last `window` of them if there is a window.

    What lies behind a row's last token, padding and tokens of before, has later places and is not seen.

    Args:
        places: of the queries, int64 [rows, width].
        first: place of the first key. end: place after the last.

    Returns:
        bool [rows, 1, width, keys], True where a query sees a key.
    """
    keys = torch.arange(first, end, device=places.device)
    queries = places[:, None, :, None]
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    return seen


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as numbers to add to scores: 0, or the least of the type."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
