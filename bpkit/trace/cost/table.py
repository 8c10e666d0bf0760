"""What a step costs on some device: a table that is measured, written by hand, or made from published figures.

Costs are staircases, not lines (a kernel that is tiled by 8 costs as much for 5 positions as for 8), so nothing smooth
is fitted: a size between two given ones costs what the next larger given one does. Times are in seconds, or in any
other unit that the whole table shares: every comparison of policies is a ratio.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
)

from bpkit.trace.cost.figures import CostError, PromptFigures, StepFigures
from bpkit.trace.cost.named import Free, NamedCost, Paid, without_empty


def _shape(value: Any) -> str:
    return "by context length" if isinstance(value, Mapping) else "one figure"


_Size = Annotated[int, Field(ge=1)]
_BlockSize = Annotated[int, Field(ge=2)]
_Many = Annotated[int, Field(ge=2)]
_ByContext = Annotated[dict[Annotated[int, Field(ge=0)], Paid], Field(min_length=1)]
_Verify = Annotated[
    Annotated[Paid, Tag("one figure")] | Annotated[_ByContext, Tag("by context length")], Discriminator(_shape)
]
_VerifyTable = Annotated[dict[_Size, _Verify], Field(min_length=1)]


class Cell(BaseModel):
    """How well one figure of a measured table is known.

    Attributes:
        phase, size: as in `CostModel.seconds`; `rest` has size 1.
        context_length: mean of the samples', or None where all context lengths are taken together.
        count: samples.
        seconds: 10% trimmed mean. standard_error: of it, in seconds.
        variation: coefficient of variation of the samples (standard deviation / mean), outliers included.
        quartiles: 25th and 75th percentile of the samples, in seconds; None for differences of two means.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: str
    size: int
    context_length: int | None = None
    count: int
    seconds: float
    standard_error: float | None
    variation: float | None = None
    quartiles: tuple[float, float] | None = None

    @property
    def spread(self) -> float:
        """Standard error as a share of the figure; infinite where it is not known."""
        if self.standard_error is None or not self.seconds:
            return float("inf")
        return self.standard_error / abs(self.seconds)


class HeldOut(BaseModel):
    """How far tables of several rows are from steps that they were not fitted to.

    The runs are dealt into folds; steps of a fold are priced by tables made of the others (cross-validation). A *mix*
    is what like steps have in common: number of rows, padded width (1, 2, 3-4, 5-8, ...), whether more or less than
    half of the padded positions were verified, and the doubling of the context length. Its error is that of its mean
    price: measured over modelled, a 10% trimmed mean over its steps, less 1.

    Attributes:
        steps, mixes: that were compared.
        mean_error: of the mixes' errors, without sign.
        worst_error, worst_mix: of the mix that was furthest off.
        within_tenth: share of the mixes whose error was below 10%.
        noise: mean error that the standard errors of the mixes' prices would make alone, with tables that are right.
        step_error: median over single steps, without sign: the machine's noise is part of it.
        by_rows: mean error of mixes, by number of rows; the numbers that no table was fitted to are among them.
        between_error: mean error of the mixes of those numbers, None if there were none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    mixes: int
    mean_error: float
    worst_error: float
    worst_mix: str
    within_tenth: float
    noise: float
    step_error: float
    by_rows: dict[int, float]
    between_error: float | None


class Measured(BaseModel):
    """What a measured table was measured on, and how.

    Attributes:
        machine: processor, cores, GPU, versions, load average before measuring.
        threads: of torch. dtype: of the target.
        options: of generation.
        started: UTC. seconds: that the measuring took.
        steps, prompts, rounds: that were measured; a round goes over all prompts.
        ended: why measuring ended.
        worst_spread: largest relative standard error of the figures that were waited for; None where one of them is
            of a single sample.
        modelled_over_measured: the table's price of all measured steps, over the time that they took.
        drift: how much slower than the table's price the second half of the steps was than the first.
        held_out: of tables for several rows, how well they price what they were not fitted to.
        engine: with its version, where the steps were another engine's than bpkit's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    drafter: str
    drafter_kind: str
    device: str
    machine: dict[str, str | int | float | None]
    threads: int
    dtype: str
    rule: str
    options: dict[str, Any]
    command: str | None
    started: str
    seconds: float
    steps: int
    prompts: int
    rounds: int
    ended: str
    worst_spread: float | None
    modelled_over_measured: float
    drift: float
    held_out: HeldOut | None = None
    engine: str | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(self, handler, "held_out", "engine")


class Padding(BaseModel):
    """What a position that only fills up a row of a padded pass costs less than one that is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft: Free = 0.0
    verify: Free = 0.0


class RowsTable(BaseModel):
    """What steps of some number of rows cost; see `CostTable`, whose tables these are for more than one row.

    The rows of a step share passes as large as the largest of them. So sizes, waiting positions and context lengths
    are those of the widest and of the longest row, and figures hold where all rows are as wide: of others, each
    position that is there only to fill up takes off what `padding` says.

    Attributes:
        draft, catch_up, features, verify, rest: seconds of all rows together.
        padding: by phase; 0 where a pass over padding costs what one over tokens does.
        spread: of tables that were measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft: dict[_BlockSize, Free] = {}
    catch_up: dict[_Size, Free] = {}
    features: dict[_BlockSize, Free] = {}
    verify: _VerifyTable
    rest: Free = 0.0
    padding: Padding = Padding()
    spread: tuple[Cell, ...] = ()


class CostTable(NamedCost):
    """A `bpkit.types.BatchCostModel` as a table, and the schema of a cost file. All figures are in `unit`.

    Attributes:
        draft: by block size (autoregressive and n-gram drafters: drafted tokens plus one), one position waiting.
        catch_up: what a draft takes longer, by waiting positions; 0 below the first given, and above the last in
            proportion to the number of positions (the first draft of a request reads the whole prompt).
        features: probabilities and entropies of a draft, by block size.
        verify: by verified positions, anchor included; each one figure, or figures by context length, linear in
            between and constant outside.
        rest: everything else in a step.
        prefill: reading prompts, by their tokens in one pass of the target, of all rows together. Linear in between, in
            proportion above the largest; between one token, which a pass of width 1 reads, and the smallest linear too.
        rows: the tables of steps for several rows, by how many run; empty if it prices one row only.
        sources: what drafts of further sources cost, from source 1 on; their verify and rest are those of this table.
        spread, measured: of tables that were measured.

    A table that is left out costs nothing. Sizes between two given ones cost what the next larger one does. A step of
    a number of rows between two given ones costs what the line between their prices says.
    """

    draft: dict[_BlockSize, Free] = {}
    catch_up: dict[_Size, Free] = {}
    features: dict[_BlockSize, Free] = {}
    verify: _VerifyTable
    rest: Free = 0.0
    prefill: dict[_Size, Paid] = {}
    rows: dict[_Many, RowsTable] = {}
    sources: tuple[CostTable, ...] = ()
    spread: tuple[Cell, ...] = ()
    measured: Measured | None = None

    @field_validator("verify")
    @classmethod
    def _has_plain_decoding(cls, verify: dict[int, Any]) -> dict[int, Any]:
        if 1 not in verify:
            raise ValueError("needs width 1, the cost of a step without drafting")
        return verify

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(self, handler, "prefill", "rows", "sources")

    # The CostModel protocol

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        """Cost of one of `PHASES` for one row. Raises CostError for a size above the largest that the table gives."""
        if phase == "prefill":
            return self._prompts.at(size, context_length)
        return self._figures.seconds(phase, size, context_length)

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        """Cost of one of `PHASES` for all rows of a step; see `BatchCostModel`.

        Raises:
            CostError: a size, or a number of rows, above the largest that the table gives.
        """
        if rows == 1 or phase == "prefill":
            return self.seconds(phase, size, context_length)
        low, high, share = self._around(rows)
        lower, upper = (figures.seconds(phase, size, context_length) for figures in (low, high))
        saved = self._saved(phase, high.rows)
        if saved:
            return max(lower + share * (upper - lower) - saved * (rows * size - positions), 0.0)
        return lower + share * (upper - lower)

    def of_source(self, source: int) -> CostTable:
        """What steps cost that draft from a source. Raises CostError for one that the table does not price."""
        if source == 0 or (not self.draft and not self.sources):  # drafts are free, wherever they come from
            return self
        if source > len(self.sources):
            raise CostError(
                f"cost model {self.name!r} prices {1 + len(self.sources)} source(s) of drafts, and source {source} was "
                "asked for: measure it with `bpkit calibrate` and the same drafters, or join cost files, A+B"
            )
        return self.sources[source - 1]

    def with_sources(self, others: Sequence[CostTable]) -> CostTable:
        """This table with the drafts of further sources, as other tables price them, each measured by itself.

        Passes of the target that are wider than this table's widest are priced as in the table that has them.
        """
        whole = reduce(_with_wider_passes, others, self)
        drafts = tuple(whole._drafts_of(other) for other in (*self.sources, *others))
        return whole.model_copy(update={"sources": drafts})

    def _drafts_of(self, other: CostTable) -> CostTable:
        """The other's drafts, and all else as in this table."""
        rows = {
            number: of_rows.model_copy(
                update={
                    "verify": self.rows[number].verify,
                    "rest": self.rows[number].rest,
                    "padding": Padding(draft=of_rows.padding.draft, verify=self.rows[number].padding.verify),
                }
            )
            for number, of_rows in other.rows.items()
            if number in self.rows
        }
        own = {"verify": self.verify, "rest": self.rest, "prefill": self.prefill}
        return other.model_copy(update={**own, "rows": rows})

    def array(
        self,
        phase: str,
        sizes: ArrayLike,
        context_lengths: ArrayLike = 0,
        rows: ArrayLike = 1,
        positions: ArrayLike | None = None,
    ) -> NDArray[np.float64]:
        """`batch_seconds` of many at once; see `NamedCost`."""
        counts = np.asarray(rows)
        if phase == "prefill":
            size, at, _ = np.broadcast_arrays(np.asarray(sizes), np.asarray(context_lengths), counts)
            return self._prompts.array(size, at)
        if counts.ndim == 0 and counts == 1:
            return self._figures.array(phase, *np.broadcast_arrays(np.asarray(sizes), np.asarray(context_lengths)))
        asked = np.asarray(sizes) * counts if positions is None else np.asarray(positions)
        size, at, count, asked = np.broadcast_arrays(np.asarray(sizes), np.asarray(context_lengths), counts, asked)
        found = np.zeros(size.shape)
        for number in np.unique(count).tolist():
            here = count == number
            if number == 1:
                found[here] = self._figures.array(phase, size[here], at[here])
                continue
            low, high, share = self._around(number)
            lower, upper = (figures.array(phase, size[here], at[here]) for figures in (low, high))
            saved = self._saved(phase, high.rows) * (number * size[here] - asked[here])
            found[here] = np.maximum(lower + share * (upper - lower) - saved, 0.0)
        return found

    @cached_property
    def _figures(self) -> StepFigures:
        """Sorted once: `seconds` is called several times in every step."""
        return StepFigures(self, self.name)

    @cached_property
    def _prompts(self) -> PromptFigures:
        return PromptFigures(self.prefill, self._figures.phases["verify"])

    @cached_property
    def _figures_of_rows(self) -> tuple[list[int], list[StepFigures]]:
        """Numbers of rows, from 1, and the figures of each."""
        counts = sorted(self.rows)
        return [1, *counts], [self._figures, *(StepFigures(self.rows[n], self.name, n) for n in counts)]

    def _around(self, rows: int) -> tuple[StepFigures, StepFigures, float]:
        """The figures below and above a number of rows, and how far it is on the way. Raises CostError above all."""
        counts, figures = self._figures_of_rows
        place = bisect_left(counts, rows)
        if place == len(counts):
            given = f"it goes up to {counts[-1]}" if self.rows else "it has figures for one row only"
            raise CostError(
                f"cost model {self.name!r} cannot price a step of {rows} rows: {given}. Measure it with `bpkit "
                f"calibrate --batch-sizes 1,..,{rows}`, or add figures for {rows} rows or more to its 'rows'"
            )
        if counts[place] == rows:
            return figures[place], figures[place], 0.0
        low, high = counts[place - 1], counts[place]
        return figures[place - 1], figures[place], (rows - low) / (high - low)

    def _saved(self, phase: str, rows: int) -> float:
        """What a padded position costs less; between two given numbers of rows, as at the larger."""
        return float(getattr(self.rows[rows].padding, phase, 0.0))

    # What it says, at a context length in the middle if none is given

    @property
    def largest_rows(self) -> int:
        """The largest number of rows that has a cost."""
        return max(self.rows, default=1)

    @property
    def prices_prefill(self) -> bool:
        """Whether reading prompts has a cost; if not, it costs 0."""
        return bool(self.prefill)

    @property
    def largest_width(self) -> int:
        """The largest verify width that has a cost."""
        return max(self.verify)

    @property
    def largest_block_size(self) -> int | None:
        """The largest block size that has a draft cost; None if drafts cost nothing, whatever their size."""
        return max(self.draft, default=None)

    @property
    def middle_context(self) -> int:
        """A context length in the middle of those that verify width 1 is given for; 0 if it is given for none."""
        plain = self.verify[1]
        return sorted(plain)[len(plain) // 2] if isinstance(plain, dict) else 0

    def table(self) -> CostTable:
        """Itself."""
        return self


def _with_wider_passes(table: CostTable, other: CostTable) -> CostTable:
    """A table with what another has of wider passes of the target."""
    widest = max(table.verify)
    cells = (cell for cell in other.spread if cell.phase == "verify" and cell.size > widest)
    rows = {
        number: of_rows.model_copy(update={"verify": _wider(of_rows.verify, other.rows[number].verify)})
        for number, of_rows in table.rows.items()
        if number in other.rows
    }
    update = {"verify": _wider(table.verify, other.verify), "spread": (*table.spread, *cells)}
    return table.model_copy(update={**update, "rows": {**table.rows, **rows}})


def _wider(verify: _VerifyTable, other: _VerifyTable) -> _VerifyTable:
    widest = max(verify)
    return {**verify, **{width: cost for width, cost in other.items() if width > widest}}
