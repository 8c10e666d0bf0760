"""Checks leave the process as they found it, and decide themselves what randomness a policy finds lying about."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bpkit.decode.guard import PolicyFaultWarning
from bpkit.learn.trained import TrainedElsewhereWarning


@contextmanager
def undisturbed() -> Iterator[None]:
    """Global generators are restored, and warnings that belong to checking are not shown.

    Models as tiny as these run in one thread: several would wait for one another, on a busy machine ten times as long.
    """
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        for category in (TrainedElsewhereWarning, PolicyFaultWarning):
            warnings.simplefilter("ignore", category)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(numpy)


def seed_everything(seed: int) -> None:
    """Seed the global generators, which a policy should not use: its own is `context.generator`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
