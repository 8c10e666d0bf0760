"""What a runtime hands to an exported network, by name: features, counts and cost curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bpkit.export.core import FEATURES
from bpkit.export.curves import TYPICAL_CONTEXT, Curves
from bpkit.policy import State
from bpkit.types import Context, Draft

Given = dict[str, Tensor]


class Inputs:
    """Makes the inputs of a network from a context or a draft.

    Args:
        names: of the inputs. curves: cost curves at a context length.
    """

    def __init__(self, names: Iterable[str], curves: Callable[[int], Curves]) -> None:
        self.names, self.curves = tuple(names), curves
        self._rows: dict[tuple[str, int], tuple[Tensor, Curves]] = {}  # the curves are held, so that ids stay theirs
        self.typical = torch.tensor(curves(TYPICAL_CONTEXT).steps)  # float32 [1 + sizes]

    def __call__(self, source: Context | Draft, state: State) -> Given:
        """Each input, batch axis first; what is neither a feature, a count nor a curve is looked up in the state."""
        context = source.context if isinstance(source, Draft) else source
        return {name: self._one(name, source, context, state) for name in self.names}

    def _one(self, name: str, source: Context | Draft, context: Context, state: State) -> Tensor:
        if name in FEATURES:
            value = (source.predictions or {}).get(name)
            value = source[name] if value is None else value
            return value.float() if value.is_floating_point() else value
        if name == "context_length":
            return context.context_length
        if name in ("block_size", "draft_length") and isinstance(source, Draft):
            counts: Tensor = getattr(source, name)
            return counts
        if name == "typical_step_seconds":
            return self.typical
        if name in ("step_seconds", "verify_seconds"):
            rows = [self._row(name, length) for length in context.context_length.tolist()]
            return rows[0][None] if len(rows) == 1 else torch.stack(rows)
        given: Tensor = state[name]
        return given

    def _row(self, name: str, context_length: int) -> Tensor:
        """A curve at one context length: float32 [values]."""
        curves = self.curves(context_length)  # the same object for lengths that are rounded to one
        key = (name, id(curves))
        if key not in self._rows:
            values = curves.steps if name == "step_seconds" else curves.verify
            self._rows[key] = (torch.tensor(values), curves)
        return self._rows[key][0]
