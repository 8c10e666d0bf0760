"""Which keys the queries of a pass see, where its rows hold different counts of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from bpkit.decode.trees import Level, Tree


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


def of_trees(held: Tensor, tree: Tree | Level, first: int, end: int, window: int | None = None) -> Tensor:
    """Each node sees what its row held before the anchor, the anchor and the nodes of its own path.

    Where there is a window it is one of positions in the text, of which siblings have the same.

    Args:
        held: tokens of each row before the anchor, which is the first column, int64 [rows, 1].
        first, end: as in `causal`.

    Returns:
        bool [rows, 1, width of the pass, keys], True where a query sees a key.
    """
    keys, columns = torch.arange(first, end, device=held.device), tree.depth.shape[1]
    column = keys - held
    inside, own = (column >= 0) & (column < columns), column.clamp(0, columns - 1)
    on_path = tree.above.gather(2, own[:, None].expand(-1, tree.above.shape[1], -1))
    seen = on_path & inside[:, None] | (column < 0)[:, None]
    if window is not None:
        places = torch.where(inside, held + tree.depth.gather(1, own), keys)
        seen &= places[:, None] > (held + tree.queries)[..., None] - window
    return seen[:, None]


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as numbers to add to scores: 0, or the least of the type."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
