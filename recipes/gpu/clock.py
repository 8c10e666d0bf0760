"""Time on a device: of calls, of copies of memory, and what is left of a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


class Deadline:
    """When a section must have ended."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.at - time.monotonic()

    def __bool__(self) -> bool:
        """Whether there is time left."""
        return self.left > 0


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int, *, warm: int = 3) -> float:
    """The median time of a call, from when the device is idle until it is again."""
    spent = []
    for number in range(warm + repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        if number >= warm:
            spent.append(1e3 * (time.perf_counter() - started))
    return statistics.median(spent)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a device reads and writes in a copy of 2 GB (of 16 MB on a CPU)."""
    count = (2 << 30) if device.type == "cuda" else (16 << 20)
    source, copy = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * count / (1e-3 * milliseconds(lambda: copy.copy_(source), device, 10))
