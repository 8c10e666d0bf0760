"""The state of a batch: some rows of it, what keeps them from being moved, how two states differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.decode.guard import kind_of
from bpkit.policy import State
from bpkit.testing.checks.records import same


def state_rows(state: State, places: Sequence[int]) -> State:
    """Some rows of a state, in this order."""
    return {name: value[list(places)].clone() for name, value in state.items()}


def bad_state(state: object, rows: int) -> str | None:
    """What keeps a state from being moved row by row."""
    if not isinstance(state, dict):
        return f"the state is {kind_of(state)}, not a dict of tensors"
    for name, value in state.items():
        if not isinstance(value, Tensor):
            return f"state[{name!r}] is {kind_of(value)}, not a tensor: the runtime cannot move rows of it"
        if value.ndim == 0 or value.shape[0] != rows:
            return f"state[{name!r}] has shape {list(value.shape)} for {rows} requests: the batch axis comes first"
    return None


def unlike(one: State, other: State) -> str | None:
    """The name of a tensor that differs by more than rounding, if there is one in both."""
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.shape == b.shape and a.is_floating_point() and b.is_floating_point():
            if not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
                return name
        elif not same(a, b):
            return name
    return None
