"""Rows of targets whose layers do not read rows of different lengths together: each row has a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor
from transformers import PreTrainedModel

from bpkit.decode.inputs import ModelInputs
from bpkit.decode.stateful import StatefulTarget
from bpkit.decode.target import CachedTarget, TargetOutput


class RowByRow:
    """A target session that reads one row after another, each with a session of its own.

    Args:
        rows: how many.
        capacity: unused: caches grow. slots: unused.
        wanted: of `LiveTarget`.
    """

    kind: ClassVar[type[CachedTarget]]
    shares_passes: ClassVar[bool] = False
    stateful: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, *, rows: int, capacity: int, slots: int, **wanted: Any) -> None:
        self.rows = [self.kind(model, **wanted) for _ in range(rows)]
        self._first = self.rows[0]  # knows the model where no row runs
        self._read: list[CachedTarget] = []
        """Rows that the last pass read."""

    @property
    def positions(self) -> int | None:
        return self._first.positions

    @property
    def held(self) -> list[int]:
        return [row.held for row in self.rows]

    @property
    def reread(self) -> int:
        return max((row.reread for row in self._read), default=0)

    @property
    def wrapper(self) -> Any:
        return self._first.wrapper

    @wrapper.setter
    def wrapper(self, wrapper: Any) -> None:
        for row in (self._first, *self.rows):
            row.wrapper = wrapper

    @property
    def inputs(self) -> list[ModelInputs | None]:
        return [row.inputs for row in self.rows]

    @inputs.setter
    def inputs(self, inputs: Sequence[ModelInputs | None]) -> None:
        for row, given in zip(self.rows, inputs, strict=True):
            row.inputs = given

    def prefill(self, tokens: Tensor, counts: Sequence[int], *, last: bool, **inputs: Any) -> TargetOutput:
        made = self._each(tokens, counts, lambda row, ids: row.prefill(ids, **inputs))
        return stacked(made, 1, max(counts) if last else tokens.shape[1])

    def verify(self, tokens: Tensor, counts: Sequence[int]) -> TargetOutput:
        made, width = self._each(tokens, counts, lambda row, ids: row.verify(ids)), tokens.shape[1]
        return stacked(made, width, width)

    def _each(
        self, tokens: Tensor, counts: Sequence[int], read: Callable[[CachedTarget, Tensor], TargetOutput]
    ) -> list[TargetOutput | None]:
        """What every row gives, None for those that read nothing."""
        self._read = [row for row, count in zip(self.rows, counts, strict=True) if count]
        return [
            read(row, tokens[i : i + 1, :count]) if count else None
            for i, (row, count) in enumerate(zip(self.rows, counts, strict=True))
        ]

    def rollback(self, counts: Sequence[int]) -> None:
        for row, count in zip(self.rows, counts, strict=True):
            row.rollback(count)

    def keep(self, rows: Sequence[int]) -> None:
        self.rows, self._read = [self.rows[row] for row in rows], []

    def join(self, other: RowByRow) -> None:
        self.rows, self._read = [*self.rows, *other.rows], []

    def embed(self, tokens: Tensor) -> Tensor:
        return self._first.embed(tokens)

    def cache(self, row: int) -> Any:
        return self.rows[row].cache


class CachedRows(RowByRow):
    """Rows with a `DynamicCache` each."""

    kind = CachedTarget


class StatefulRows(RowByRow):
    """Rows with recurrent states each."""

    kind = StatefulTarget
    stateful = True


def stacked(rows: Sequence[TargetOutput | None], width: int, features: int) -> TargetOutput:
    """What rows give, each [1, count, ...] or nothing, side by side: [rows, width, ...] with zeros behind.

    Args:
        width: positions of logits and last hidden states. features: positions of features.
    """
    only = rows[0] if len(rows) == 1 else None
    if (
        only is not None
        and only.logits.shape[1] == width
        and (only.features is None or only.features.shape[1] == features)
    ):
        return only

    def of(name: str, width: int) -> Tensor | None:
        parts = {i: value for i, row in enumerate(rows) if (value := getattr(row, name, None)) is not None}
        if not parts:
            return None
        some: Tensor = next(iter(parts.values()))
        made = some.new_zeros((len(rows), width, *some.shape[2:]))
        for i, value in parts.items():
            made[i, : value.shape[1]] = value[0]
        return made

    return TargetOutput(cast("Tensor", of("logits", width)), of("features", features), of("last_hidden", width))
