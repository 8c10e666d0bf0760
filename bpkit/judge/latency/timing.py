"""Times calls of several functions in turn, a few calls of one, then a few of the next, so that drift meets all."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bpkit.judge.statistics import interval, resample

Ask = Callable[[int], Any]
"""The call of that number: it may choose its inputs by it."""
Nanoseconds = NDArray[np.int64]
Name = TypeVar("Name", bound=Hashable)
BLOCK = 20
"""Calls of one function before it is the next one's turn."""


def interleave(asks: Mapping[Name, Ask], *, calls: int, warm_up: int, device: torch.device) -> dict[Name, Nanoseconds]:
    """Time `calls` calls of each, rounded up to whole blocks: int64 [blocks, BLOCK] by name.

    Args:
        warm_up: calls of each before, which do not count.
        device: whose queue each call waits for, if it has one.
    """
    for ask in asks.values():
        _block(ask, 0, warm_up, device)
    blocks: dict[Name, list[Nanoseconds]] = {name: [] for name in asks}
    for number in range(-(-calls // BLOCK)):
        order = list(asks)
        for name in order if number % 2 == 0 else order[::-1]:
            blocks[name].append(_block(asks[name], number * BLOCK, BLOCK, device))
    return {name: np.stack(found) for name, found in blocks.items()}


def _block(ask: Ask, first: int, count: int, device: torch.device) -> Nanoseconds:
    spent = np.empty(count, dtype=np.int64)
    clock, cuda = time.perf_counter_ns, device.type == "cuda"
    for place in range(count):
        started = clock()
        ask(first + place)
        if cuda:
            torch.cuda.synchronize(device)
        spent[place] = clock() - started
    return spent


def percentile(spent: NDArray[Any], which: float) -> float:
    """In microseconds, of nanoseconds."""
    return float(np.percentile(spent, which)) / 1e3


def ratio(slow: NDArray[Any], fast: NDArray[Any], seed: int = 0) -> dict[str, Any]:
    """How many times as long the first takes, from pairs of neighbouring blocks.

    Args:
        slow, fast: nanoseconds, [blocks, calls]; each row was measured beside the same row of the other.

    Returns:
        `value`, the median over pairs of blocks of the ratio of their medians; `interval`, its 95% bootstrap over
        pairs; `quartiles` of the pairs; `pairs`, how many.
    """
    each = np.median(slow, axis=1) / np.median(fast, axis=1)
    picks = resample(len(each), seed)
    return {
        "value": float(np.median(each)),
        "interval": interval(np.median(each[picks], axis=1)),
        "quartiles": [float(q) for q in np.quantile(each, [0.25, 0.75])],
        "pairs": len(each),
    }
