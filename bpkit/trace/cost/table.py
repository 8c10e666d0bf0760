"""What a step costs on some device: a table that is measured, written by hand, or made from published figures.

Costs are staircases, not lines (a kernel that is tiled by 8 costs as much for 5 positions as for 8), so nothing smooth
is fitted: a size between two given ones costs what the next larger given one does. Times are in seconds, or in any
other unit that the whole table shares: every comparison of policies is a ratio.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from bpkit.types import PHASES


def _shape(value: Any) -> str:
    return "by context length" if isinstance(value, Mapping) else "one figure"


_Free = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
_Paid = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
_Size = Annotated[int, Field(ge=1)]
_BlockSize = Annotated[int, Field(ge=2)]
_ByContext = Annotated[dict[Annotated[int, Field(ge=0)], _Paid], Field(min_length=1)]
_Verify = Annotated[
    Annotated[_Paid, Tag("one figure")] | Annotated[_ByContext, Tag("by context length")], Discriminator(_shape)
]


class CostError(ValueError):
    """A cost model cannot be read, or does not say what was asked; the message names the place and how to mend it."""


class Figures:
    """Figures of one phase, sorted once and asked often: stairs by size, lines by context length.

    A size between two given ones takes the next larger one's figure. Without any, everything is free. A figure is one
    number, or numbers by context length: linear in between, constant outside.

    Args:
        free_below: smaller sizes cost nothing.
        in_proportion_above: whether larger sizes than the largest cost proportionally more; else they have no figure.
    """

    def __init__(
        self, given: Mapping[int, float | dict[int, float]], *, free_below: int, in_proportion_above: bool = False
    ) -> None:
        self.sizes = sorted(given)
        by_context = [given[size] for size in self.sizes]
        self.curves = [sorted(by.items()) if isinstance(by, dict) else [(0, by)] for by in by_context]
        self.free_below, self.in_proportion_above = free_below, in_proportion_above

    def at(self, size: int, context_length: int) -> float:
        """The figure of a size, which is no larger than the largest given or in proportion to it."""
        if size < self.free_below or not self.sizes:
            return 0.0
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes):
            return self.curves[-1][0][1] * (size / self.sizes[-1])
        curve = self.curves[place]
        after = bisect_left(curve, (context_length,))
        if after == 0 or after == len(curve):
            return curve[max(after - 1, 0)][1]
        (earlier, low), (later, high) = curve[after - 1 : after + 1]
        return low + (high - low) / (later - earlier) * (context_length - earlier)

    def array(self, sizes: NDArray[Any], context_lengths: NDArray[Any]) -> NDArray[np.float64]:
        """`at` of every size and context length, two arrays of one shape: float64 of that shape."""
        if not self.sizes:
            return np.zeros(sizes.shape)
        place = np.minimum(np.searchsorted(self.sizes, sizes), len(self.sizes) - 1)
        found = np.array([curve[0][1] for curve in self.curves], np.float64)[place]
        for column, curve in enumerate(self.curves):
            if len(curve) > 1:
                here = place == column
                contexts, values = zip(*curve, strict=True)
                found[here] = np.interp(context_lengths[here], contexts, values)
        if self.in_proportion_above:
            found = np.where(sizes > self.sizes[-1], found * (sizes / self.sizes[-1]), found)
        return np.where(sizes < self.free_below, 0.0, found)


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


class Measured(BaseModel):
    """What a measured table was measured on, and how.

    Attributes:
        machine: processor, cores, GPU, versions, load average before measuring.
        threads: of torch. dtype: of the target.
        options: of generation.
        started: UTC. seconds: that the measuring took.
        steps, prompts, rounds: that were measured; a round goes over all prompts.
        ended: why measuring ended.
        worst_spread: largest relative standard error of the figures that were waited for.
        modelled_over_measured: the table's price of all measured steps, over the time that they took.
        drift: how much slower than the table's price the second half of the steps was than the first.
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
    worst_spread: float
    modelled_over_measured: float
    drift: float


class CostTable(BaseModel):
    """A `bpkit.types.CostModel` as a table, and the schema of a cost file. All figures are in `unit`.

    Attributes:
        draft: by block size (autoregressive and n-gram drafters: drafted tokens plus one), one position waiting.
        catch_up: what a draft takes longer, by waiting positions; 0 below the first given, and above the last in
            proportion to the number of positions (the first draft of a request reads the whole prompt).
        features: probabilities and entropies of a draft, by block size.
        verify: by verified positions, anchor included; each one figure, or figures by context length, linear in
            between and constant outside.
        rest: everything else in a step.
        spread, measured: of tables that were measured. source: of published figures.

    A table that is left out costs nothing. Sizes between two given ones cost what the next larger one does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str = "custom"
    description: str = ""
    source: str = ""
    unit: Literal["seconds", "plain steps"] = "seconds"
    draft: dict[_BlockSize, _Free] = {}
    catch_up: dict[_Size, _Free] = {}
    features: dict[_BlockSize, _Free] = {}
    verify: Annotated[dict[_Size, _Verify], Field(min_length=1)]
    rest: _Free = 0.0
    spread: tuple[Cell, ...] = ()
    measured: Measured | None = None

    @field_validator("verify")
    @classmethod
    def _has_plain_decoding(cls, verify: dict[int, Any]) -> dict[int, Any]:
        if 1 not in verify:
            raise ValueError("needs width 1, the cost of a step without drafting")
        return verify

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> CostTable:
        """A copy, other figures included: nothing that was looked up before is kept."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("_figures", None)
        return copied

    # The CostModel protocol

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        """Cost of one of `PHASES`. Raises CostError for a size above the largest that the table gives."""
        if phase == "rest":
            return self.rest
        return self._reaching(phase, size, size).at(size, context_length)

    def array(self, phase: str, sizes: ArrayLike, context_lengths: ArrayLike = 0) -> NDArray[np.float64]:
        """`seconds` of many sizes and context lengths: float64, of the shape that both broadcast to.

        Raises CostError, as `seconds`.
        """
        wanted, contexts = np.broadcast_arrays(np.asarray(sizes), np.asarray(context_lengths))
        if phase == "rest" or not wanted.size:
            return np.full(wanted.shape, self.rest)
        return self._reaching(phase, int(wanted.min()), int(wanted.max())).array(wanted, contexts)

    @cached_property
    def _figures(self) -> dict[str, Figures]:
        """Sorted once: `seconds` is called several times in every step."""
        return {
            "draft": Figures(self.draft, free_below=2),
            "catch_up": Figures(self.catch_up, free_below=min(self.catch_up, default=1), in_proportion_above=True),
            "features": Figures(self.features, free_below=2),
            "verify": Figures(self.verify, free_below=1),
        }

    def _reaching(self, phase: str, smallest: int, largest: int) -> Figures:
        """The figures of a phase. Raises CostError if there are none for sizes from the smallest to the largest."""
        figures = self._figures.get(phase)
        if figures is None:
            raise CostError(f"there is no phase {phase!r} of a step; the phases are: {', '.join(PHASES)}")
        if phase == "verify" and smallest < 1:
            raise CostError(f"a step verifies at least the anchor: there is no verify width {smallest}")
        if figures.sizes and largest > figures.sizes[-1] and not figures.in_proportion_above:
            what = "verify width" if phase == "verify" else "block size"
            raise CostError(
                f"cost model {self.name!r} has no {phase} cost for {what} {largest}: it gives "
                f"{', '.join(map(str, figures.sizes))}. Add a figure for {largest} or more to its {phase!r}, measure "
                f"again with `bpkit calibrate --max-block-size {largest}`, or keep policies to block size "
                f"{figures.sizes[-1]}"
            )
        return figures

    # What it says, at a context length in the middle if none is given

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

    def target_efficiency(self, width: int, context_length: int | None = None) -> float:
        """T(1) / T(width): what share of the ideal a verification keeps (MoESD, 2505.19645). 1 is ideal."""
        at = self.middle_context if context_length is None else context_length
        return self.seconds("verify", 1, at) / self.seconds("verify", width, at)

    def break_even(self, block_size: int, context_length: int | None = None) -> float:
        """The mean acceptance length from which drafting this block at every step beats plain decoding.

        (draft + verify + rest) / (verify of width 1 + rest), with one position waiting and the whole draft verified.
        """
        return self.step(block_size, context_length) / self.step(1, context_length)

    def step(self, block_size: int, context_length: int | None = None) -> float:
        """Cost of a step with one position waiting whose whole draft is verified; block size 1 is a plain step."""
        at = self.middle_context if context_length is None else context_length
        return self.seconds("draft", block_size, at) + self.seconds("verify", block_size, at) + self.rest
