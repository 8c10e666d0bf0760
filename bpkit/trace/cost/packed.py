"""Costs of an engine that packs its rows: a pass goes by positions, whosever they are, and nothing is padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from bpkit.trace.cost.figures import CostError
from bpkit.trace.cost.named import Free, NamedCost, Paid, without_empty
from bpkit.trace.cost.table import CostTable, Measured, RowsTable
from bpkit.types import PHASES

_Count = Annotated[int, Field(ge=1)]
TABLE_PROMPTS = tuple(2**power for power in range(4, 15))
"""Tokens of prompts that its table has figures of."""


class Line:
    """Seconds by a number: linear between given numbers, flat below the first, and above the last as before it.

    >>> line = Line({1: 2.0, 4: 5.0, 8: 7.0})
    >>> line.at(0), line.at(2), line.at(12)
    (2.0, 3.0, 9.0)
    """

    def __init__(self, given: Mapping[int, float]) -> None:
        self.places = np.array(sorted(given), np.float64)
        self.values = np.array([given[place] for place in sorted(given)], np.float64)
        self.slope = 0.0
        if len(self.places) > 1:
            self.slope = float(np.diff(self.values[-2:])[0] / np.diff(self.places[-2:])[0])

    def at(self, number: float) -> float:
        """Seconds at a number."""
        return float(self.array(number))

    def array(self, numbers: ArrayLike) -> NDArray[np.float64]:
        """`at` of many: float64 of their shape; 0 without any figures."""
        asked = np.asarray(numbers, np.float64)
        if not len(self.places):
            return np.zeros(asked.shape)
        beyond = np.maximum(asked - self.places[-1], 0.0)
        return np.asarray(np.interp(asked, self.places, self.values) + self.slope * beyond)


class PackedCost(NamedCost):
    """A `bpkit.types.BatchCostModel` of an engine without padding, and the schema of a file with `"kind": "packed"`.

    A pass of the target reads what is verified of all rows, and of prompts, one position after the other. What it takes
    goes by their number alone: `verify` of a step and `prefill` beside it are parts of one line. A draft is as long for
    every row as for the row with the longest, as in vLLM, where a step has one number of draft tokens.

    Attributes:
        passes: seconds of a step by the positions of the target's pass, but for rows and drafts.
        row: seconds of each row that runs.
        draft: seconds of a pass of the drafter by its positions: rows times block size if one pass drafts a block,
            rows if it takes a pass for each token. Empty if drafts are free.
        draft_passes: `one` for a block, or one for `each` token.
        features: seconds for probabilities and entropies of each drafted position.
        max_rows, max_block_size: the largest that were measured. Lines go on above.
        context_length: where it is asked without one; no price depends on it.
        measured: on what, and how.
    """

    mixes_prompts: ClassVar[bool] = True

    kind: Literal["packed"] = "packed"
    passes: Annotated[dict[_Count, Paid], Field(min_length=1)]
    row: Free = 0.0
    draft: dict[_Count, Free] = {}
    draft_passes: Literal["one", "each"] = "one"
    features: Free = 0.0
    max_rows: _Count = 128
    max_block_size: _Count = 16
    context_length: Annotated[int, Field(ge=0)] = 0
    measured: Measured | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(self, handler, "draft", "measured")

    # The BatchCostModel protocol

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        """Cost of one of `PHASES` for all rows of a step; see `BatchCostModel`. Raises CostError for another phase."""
        return float(self.array(phase, size, context_length, rows, positions))

    def array(
        self,
        phase: str,
        sizes: ArrayLike,
        context_lengths: ArrayLike = 0,
        rows: ArrayLike = 1,
        positions: ArrayLike | None = None,
    ) -> NDArray[np.float64]:
        """`batch_seconds` of many at once; see `NamedCost`."""
        whole = np.asarray(sizes) * np.asarray(rows)
        size, count, asked, _ = np.broadcast_arrays(
            np.asarray(sizes), np.asarray(rows), whole if positions is None else np.asarray(positions), context_lengths
        )
        if phase == "verify":
            if size.size and size.min() < 1:
                raise CostError(f"a step verifies at least the anchor: there is no verify width {size.min()}")
            return self._passes.array(np.where(count == 1, size, asked))
        if phase == "prefill":
            return np.where(size < 1, 0.0, self._passes.array(size))
        if phase == "rest":
            return np.asarray(self.row * count, np.float64)
        if phase == "draft":
            each = self._draft.array(count) * (size - 1)
            found = each if self.draft_passes == "each" else self._draft.array(count * size)
        elif phase == "features":
            found = self.features * count * size
        elif phase == "catch_up":  # the drafter reads what the target just did in the same pass
            found = np.zeros(size.shape)
        else:
            raise CostError(f"there is no phase {phase!r} of a step; the phases are: {', '.join(PHASES)}")
        return np.asarray(np.where(size < 2, 0.0, found), np.float64)

    @cached_property
    def _passes(self) -> Line:
        return Line(self.passes)

    @cached_property
    def _draft(self) -> Line:
        return Line(self.draft)

    def of_source(self, source: int) -> Self:
        """Itself for source 0. Raises CostError for another: an engine has one drafter."""
        if source == 0 or not self.draft:
            return self
        raise CostError(
            f"cost model {self.name!r} is of an engine with one drafter, and source {source} of drafts was asked for"
        )

    def with_sources(self, others: Sequence[Any]) -> Self:
        """Raises CostError: an engine has one drafter."""
        raise CostError(f"cost model {self.name!r} is of an engine with one drafter: it cannot be joined with another")

    # What it says

    @property
    def middle_context(self) -> int:
        """The context length where it is asked without one."""
        return self.context_length

    @property
    def largest_rows(self) -> int:
        """The largest number of rows that was measured; more cost what the lines say."""
        return self.max_rows

    @property
    def prices_prefill(self) -> bool:
        """That reading prompts has a cost."""
        return True

    def table(self) -> CostTable:
        """Its prices by size as a table, of passes without padding."""
        powers = [1 << power for power in range(1, self.max_rows.bit_length())]
        return CostTable(
            name=self.name,
            description=self.description,
            source=self.source,
            unit=self.unit,
            **self._tables(1),
            prefill={tokens: self.seconds("prefill", tokens, 0) for tokens in TABLE_PROMPTS},
            rows={rows: RowsTable(**self._tables(rows)) for rows in sorted({*powers, self.max_rows} - {1})},
            measured=self.measured,
        )

    def _tables(self, rows: int) -> dict[str, Any]:
        sizes = range(1, self.max_block_size + 1)

        def priced(phase: str) -> dict[int, float]:
            return {size: self.batch_seconds(phase, size, 0, rows, rows * size) for size in sizes}

        drafts = {phase: {s: price for s, price in priced(phase).items() if s > 1} for phase in ("draft", "features")}
        return {
            **{phase: prices for phase, prices in drafts.items() if any(prices.values())},
            "verify": priced("verify"),
            "rest": self.row * rows,
        }
