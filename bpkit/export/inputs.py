"""What a runtime hands to an exported network, by name: features, counts and cost curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter

import torch
from torch import Tensor

from bpkit.export.core import FEATURES
from bpkit.export.curves import TYPICAL_CONTEXT, Curves
from bpkit.policy import State
from bpkit.types import Context, Draft

Given = dict[str, Tensor]


class CurveRows:
    """One of the cost curves at the context length of each row.

    Args:
        curves: at a context length, one object for many lengths. pick: the curve of these.
    """

    def __init__(self, curves: Callable[[int], Curves], pick: Callable[[Curves], list[float]]) -> None:
        self.curves, self.pick = curves, pick
        self._places: dict[int, tuple[int, Curves]] = {}  # the curves are held, so that ids stay theirs
        self._table = torch.empty(0, 0)

    def __call__(self, context_length: Tensor) -> Tensor:
        """float32 [batch, values], from int64 [batch]."""
        places = [self._place(length) for length in context_length.tolist()]
        return self._table[places[0]][None] if len(places) == 1 else self._table[places]

    def _place(self, context_length: int) -> int:
        curves = self.curves(context_length)
        if id(curves) not in self._places:
            row = torch.tensor(self.pick(curves))[None]
            self._table = torch.cat([self._table, row]) if self._places else row
            self._places[id(curves)] = len(self._places), curves
        return self._places[id(curves)][0]


class Inputs:
    """Makes the inputs of a network from a context or a draft.

    Args:
        names: of the inputs. curves: cost curves at a context length.
    """

    def __init__(self, names: Iterable[str], curves: Callable[[int], Curves]) -> None:
        self.names = tuple(names)
        self.typical = torch.tensor(curves(TYPICAL_CONTEXT).steps)  # float32 [1 + sizes]
        self.seconds = {
            "step_seconds": CurveRows(curves, attrgetter("steps")),
            "verify_seconds": CurveRows(curves, attrgetter("verify")),
        }

    def __call__(self, source: Context | Draft, state: State) -> Given:
        """Each input, batch axis first; what is neither a feature, a count nor a curve is looked up in the state."""
        context = source.context if isinstance(source, Draft) else source
        return {name: self._one(name, source, context, state) for name in self.names}

    def _one(self, name: str, source: Context | Draft, context: Context, state: State) -> Tensor:
        if name in FEATURES:
            value = (source.predictions or {}).get(name)
            value = source[name] if value is None else value
            if isinstance(source, Draft):
                value = without_padding(value, source.draft_length)
            return value.float() if value.is_floating_point() else value
        if name == "context_length":
            return context.context_length
        if name in ("block_size", "draft_length") and isinstance(source, Draft):
            counts: Tensor = getattr(source, name)
            return counts
        if name == "typical_step_seconds":
            return self.typical
        if name in self.seconds:
            return self.seconds[name](context.context_length)
        given: Tensor = state[name]
        return given


def without_padding(value: Tensor, draft_length: Tensor) -> Tensor:
    """A feature of drafts, [batch, width, ...], with 0 beyond each row's length, where there may be anything."""
    if len(draft_length) == 1:
        return value
    inside = torch.arange(value.shape[1]) < draft_length[:, None]
    if inside.all():
        return value
    outside = ~inside.to(value.device)
    return value.masked_fill(outside[(...,) + (None,) * (value.ndim - 2)], 0)
