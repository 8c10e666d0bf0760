"""What a step costs on some device: a table that is measured, written by hand, or made from published figures.

Costs are staircases, not lines (a kernel that is tiled by 8 costs as much for 5 positions as for 8), so nothing smooth
is fitted: a size between two given ones costs what the next larger given one does. Times are in seconds, or in any
other unit that the whole table shares: every comparison of policies is a ratio.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from bpkit.files import write_at_once
from bpkit.types import PHASES

EXAMPLE = '{"verify": {"1": 1.0, "2": 1.1, "4": 1.3}}'


class CostError(ValueError):
    """A cost model cannot be read, or does not say what was asked; the message names the place and how to mend it."""


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
        for kept in ("_stairs", "_widths", "_curves"):
            copied.__dict__.pop(kept, None)
        return copied

    # The CostModel protocol

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        """Cost of one of `PHASES`. Raises CostError for a size above the largest that the table gives."""
        if phase == "verify":
            return self._curves[self._column(size)].at(context_length)
        if phase == "rest":
            return self.rest
        stairs = self._stairs_of(phase)
        found = stairs.at(size)
        if found is None:
            raise self._too_large(phase, size, stairs.sizes)
        return found

    def array(self, phase: str, sizes: ArrayLike, context_lengths: ArrayLike = 0) -> NDArray[np.float64]:
        """`seconds` of many sizes and context lengths: float64, of the shape that both broadcast to.

        Raises CostError, as `seconds`.
        """
        wanted, contexts = np.broadcast_arrays(np.asarray(sizes), np.asarray(context_lengths))
        if phase == "rest":
            return np.full(wanted.shape, self.rest)
        if phase != "verify":
            stairs = self._stairs_of(phase)
            if wanted.size and stairs.at(int(wanted.max())) is None:
                raise self._too_large(phase, int(wanted.max()), stairs.sizes)
            return stairs.array(wanted)
        columns = np.searchsorted(self._widths, wanted)
        for width in (int(wanted.min()), int(wanted.max())) if wanted.size else ():
            self._column(width)
        found = np.empty(wanted.shape)
        for column in np.unique(columns):
            here = columns == column
            found[here] = self._curves[column].array(contexts[here])
        return found

    # What it says

    @property
    def largest_width(self) -> int:
        """The largest verify width that has a cost."""
        return self._widths[-1]

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
        """T(1) / T(width): what share of the ideal a verification keeps (MoESD, 2505.19645). 1 is ideal.

        Args:
            context_length: by default one in the middle.
        """
        at = self.middle_context if context_length is None else context_length
        return self.seconds("verify", 1, at) / self.seconds("verify", width, at)

    def break_even(self, block_size: int, context_length: int | None = None) -> float:
        """The mean acceptance length from which drafting this block at every step beats plain decoding.

        (draft + verify + rest) / (verify of width 1 + rest), with one position waiting and the whole draft verified.

        Args:
            context_length: by default one in the middle.
        """
        at = self.middle_context if context_length is None else context_length
        return self.step(block_size, at) / self.step(1, at)

    def step(self, block_size: int, context_length: int | None = None) -> float:
        """Cost of a step with one position waiting whose whole draft is verified; block size 1 is a plain step."""
        at = self.middle_context if context_length is None else context_length
        return self.seconds("draft", block_size, at) + self.seconds("verify", block_size, at) + self.rest

    # Sorted once: `seconds` is called several times in every step.

    @cached_property
    def _stairs(self) -> dict[str, _Stairs]:
        return {
            "draft": _Stairs(self.draft, free_below=2),
            "catch_up": _Stairs(self.catch_up, free_below=min(self.catch_up, default=1), in_proportion_above=True),
            "features": _Stairs(self.features, free_below=2),
        }

    @cached_property
    def _widths(self) -> list[int]:
        return sorted(self.verify)

    @cached_property
    def _curves(self) -> list[_Curve]:
        """In the order of `_widths`."""
        return [_curve(self.verify[width]) for width in self._widths]

    def _stairs_of(self, phase: str) -> _Stairs:
        if phase not in self._stairs:
            raise CostError(f"there is no phase {phase!r} of a step; the phases are: {', '.join(PHASES)}")
        return self._stairs[phase]

    def _column(self, width: int) -> int:
        column = bisect_left(self._widths, width)
        if width < 1:
            raise CostError(f"a step verifies at least the anchor: there is no verify width {width}")
        if column == len(self._widths):
            raise self._too_large("verify", width, self._widths)
        return column

    def _too_large(self, phase: str, size: int, given: list[int]) -> CostError:
        what = "verify width" if phase == "verify" else "block size"
        return CostError(
            f"cost model {self.name!r} has no {phase} cost for {what} {size}: it gives {', '.join(map(str, given))}. "
            f"Add a figure for {size} or more to its {phase!r}, measure again with `bpkit calibrate --max-block-size "
            f"{size}`, or keep policies to block size {given[-1]}"
        )


class _Stairs:
    """Figures by size; a size between two given ones takes the next larger one's. Without any, everything is free.

    Args:
        free_below: smaller sizes cost nothing.
        in_proportion_above: whether larger sizes than the largest cost proportionally more; else they have no cost.
    """

    def __init__(self, given: Mapping[int, float], *, free_below: int, in_proportion_above: bool = False) -> None:
        self.sizes = sorted(given)
        self.values = [given[size] for size in self.sizes]
        self.free_below, self.in_proportion_above = free_below, in_proportion_above

    def at(self, size: int) -> float | None:
        """The figure of a size, or None if there is none."""
        if size < self.free_below or not self.sizes:
            return 0.0
        place = bisect_left(self.sizes, size)
        if place < len(self.sizes):
            return self.values[place]
        return self.values[-1] * (size / self.sizes[-1]) if self.in_proportion_above else None

    def array(self, sizes: NDArray[Any]) -> NDArray[np.float64]:
        """`at` of every size, float64; those without a figure are as the largest."""
        if not self.sizes:
            return np.zeros(sizes.shape)
        place = np.minimum(np.searchsorted(self.sizes, sizes), len(self.sizes) - 1)
        found = np.asarray(self.values, np.float64)[place]
        if self.in_proportion_above:
            found = np.where(sizes > self.sizes[-1], found * (sizes / self.sizes[-1]), found)
        return np.where(sizes < self.free_below, 0.0, found)


class _Curve:
    """Figures by context length, ascending: linear in between, constant outside."""

    def __init__(self, contexts: list[int], values: list[float]) -> None:
        self.contexts, self.values = contexts, values
        self.slopes = [
            (after - before) / (later - earlier)
            for (earlier, later), (before, after) in zip(pairwise(contexts), pairwise(values), strict=True)
        ]

    def at(self, context_length: int) -> float:
        place = bisect_left(self.contexts, context_length)
        if place == 0:
            return self.values[0]
        if place == len(self.contexts):
            return self.values[-1]
        return self.values[place - 1] + self.slopes[place - 1] * (context_length - self.contexts[place - 1])

    def array(self, context_lengths: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(np.interp(context_lengths, self.contexts, self.values), np.float64)


def _curve(given: float | Mapping[int, float]) -> _Curve:
    by_context = given if isinstance(given, Mapping) else {0: given}
    contexts = sorted(by_context)
    return _Curve(contexts, [by_context[context] for context in contexts])


# Tables made from another


def flat(cost: CostTable) -> CostTable:
    """Every step costs the same, what verifying one position does: then tokens/s and acceptance length coincide."""
    return _derived(cost, "flat", 0.0, "Every step costs what a target pass over one position does; drafts are free.")


def linear(cost: CostTable, slope: float = 0.1) -> CostTable:
    """A target pass over v positions costs `1 + slope * (v - 1)` times one over a single position; drafts are free."""
    said = f"A target pass over v positions costs 1 + {slope:g} (v - 1) times one over a single position."
    return _derived(cost, "linear", slope, f"{said} Drafts are free.")


def _derived(cost: CostTable, name: str, slope: float, description: str) -> CostTable:
    plain = cost.seconds("verify", 1, cost.middle_context)
    widths = range(1, max(cost.largest_width, cost.largest_block_size or 1) + 1)
    verify: dict[int, float | dict[int, float]] = {v: plain * (1 + slope * (v - 1)) for v in widths}
    return CostTable(
        name=name, description=f"{description} One position: as in {cost.name!r}.", unit=cost.unit, verify=verify
    )


# Files


def read_cost(path_or_preset: str | Path) -> CostTable:
    """Read a cost file, or make a preset by its name.

    Raises:
        CostError: the file is no cost model; the message names file, key and what to write there.
        FileNotFoundError: there is neither such a file nor such a preset.
    """
    from bpkit.traces.presets import PRESETS

    if str(path_or_preset) in PRESETS:
        return PRESETS[str(path_or_preset)]
    file = Path(path_or_preset)
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no cost file {str(path_or_preset)!r}, and no preset of that name; the presets are: "
            f"{', '.join(PRESETS)}; `bpkit calibrate --out {file.name}` measures one"
        )
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CostError(f"{file} is not valid JSON ({error}); a cost model looks like {EXAMPLE}") from None
    if not isinstance(stated, dict):
        raise CostError(f"{file} must hold an object such as {EXAMPLE}, not a {type(stated).__name__}")
    try:
        return CostTable.model_validate({"name": file.stem, **stated})
    except ValidationError as error:
        raise CostError(f"{file}: {'; '.join(_fault(fault) for fault in error.errors())}") from None


def write_cost(cost: CostTable, path: str | Path) -> None:
    """Write a cost file at once: whoever reads it sees the old file or the whole new one."""
    write_at_once(Path(path), json.dumps(cost.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")


_HOW_TO_MEND = {
    "extra_forbidden": "is not a key of a cost model; the keys are: " + ", ".join(CostTable.model_fields),
    "missing": f"is missing: give the cost of target passes by verified positions, such as {EXAMPLE}",
    "too_short": f"is empty: give at least one figure, such as {EXAMPLE}",
    "greater_than": "must be above 0",
    "greater_than_equal": "must not be negative",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "dict_type": 'must hold figures by size, such as {"2": 0.1, "4": 0.2}',
    "literal_error": "is another than this version of bpkit knows",
}


def _fault(fault: Any) -> str:
    """One fault of a cost file: key, what is wrong, what is there."""
    place = [str(part) for part in fault["loc"] if part not in ("one figure", "by context length")]
    value = "" if isinstance(fault["input"], (dict, list)) else f", not {fault['input']!r}"
    if place[-1] == "[key]":
        where, bound = ".".join(place[:-1]), fault.get("ctx", {}).get("ge")
        return f"{where}: keys must be whole numbers{'' if bound is None else f' from {bound}'}{value}"
    if fault["type"] in ("extra_forbidden", "missing"):
        value = ""
    said = _HOW_TO_MEND.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    return f"{'.'.join(place)} {said}{value}"
