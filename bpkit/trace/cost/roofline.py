"""Costs by formula: what a step takes on a device of which only bandwidth, peak and the models' sizes are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from bpkit.trace.cost.figures import CostError
from bpkit.trace.cost.named import Free, NamedCost, Paid, without_empty
from bpkit.trace.cost.table import CostTable, RowsTable
from bpkit.types import PHASES

_Share = Annotated[float, Field(gt=0, le=1, strict=True)]
_Count = Annotated[int, Field(ge=1)]
TABLE_ROWS = (2, 4, 8, 16, 32, 64, 128)
TABLE_SIZES = (*range(1, 17), 24, 32, 64)
TABLE_WAITING = (2, 8, 64, 512)
TABLE_PROMPTS = tuple(2**power for power in range(4, 15))
"""Of what the table of a roofline has figures."""


class DeviceSpeed(BaseModel):
    """What a device does in a second.

    Attributes:
        bandwidth: bytes from its memory. peak: FLOPs in the models' dtype, without sparsity.
        bandwidth_share, peak_share: of them that kernels achieve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bandwidth: Paid
    peak: Paid
    bandwidth_share: _Share = 1.0
    peak_share: _Share = 1.0


class Experts(BaseModel):
    """The experts of a mixture, of all layers together.

    Attributes:
        total, active: of a layer; experts that a token is sent to.
        weights: bytes of all of them. flops: of a token, in those that it is sent to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    total: _Count
    active: _Count
    weights: Paid
    flops: Paid

    @model_validator(mode="after")
    def _has_as_many(self) -> Experts:
        if self.active > self.total:
            raise ValueError(f"has {self.active} active experts of {self.total}: give at most as many as there are")
        return self

    def touched(self, tokens: Any) -> Any:
        """The share of the experts that some of the tokens is sent to, were they sent evenly and independently.

        1 - (1 - active / total)^tokens (MoESD, 2505.19645). One number, or a float64 array of them.
        """
        return 1.0 - (1.0 - self.active / self.total) ** tokens


class ModelPass(BaseModel):
    """What a pass of a model moves and computes.

    Attributes:
        weights: bytes that every pass reads, without those of experts; the output layer counts, an embedding from which
            rows are looked up does not.
        flops: of a token, without those of experts and of attention: about two for each weight.
        context: bytes of keys and values of a token of the context.
        attention: FLOPs of a token for each token of its context: 4 * layers * heads * width of a head.
        experts: None of a dense model.
        overhead: seconds of every pass, whatever it holds: launches, and what does not overlap.
        several: seconds that a pass takes longer as soon as it holds more than one token: other kernels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Paid
    flops: Paid
    context: Free = 0.0
    attention: Free = 0.0
    experts: Experts | None = None
    overhead: Free = 0.0
    several: Free = 0.0


class DraftPass(ModelPass):
    """What a drafter does; of one that shares the target's output layer, that counts, too.

    Attributes:
        passes: `one` for the whole block, or one for `each` token.
        waiting: FLOPs for each waiting position but the first.
        scores: bytes that probabilities and entropies move for each position of the draft.
    """

    passes: Literal["one", "each"] = "one"
    waiting: Free = 0.0
    scores: Free = 0.0


@dataclass(frozen=True, slots=True)
class PassSeconds:
    """A `ModelPass` on a device, in seconds: `weights` of them all, `token` of one, and so on."""

    overhead: float
    several: float
    weights: float
    token: float
    context: float
    attention: float
    experts: float
    expert_token: float
    spared: float
    """Chance that a token is not sent to an expert."""

    @classmethod
    def of(cls, model: ModelPass, device: DeviceSpeed) -> PassSeconds:
        moved, computed = device.bandwidth * device.bandwidth_share, device.peak * device.peak_share
        experts = model.experts
        return cls(
            overhead=model.overhead,
            several=model.several,
            weights=model.weights / moved,
            token=model.flops / computed,
            context=model.context / moved,
            attention=model.attention / computed,
            experts=experts.weights / moved if experts else 0.0,
            expert_token=experts.flops / computed if experts else 0.0,
            spared=1.0 - experts.active / experts.total if experts else 1.0,
        )

    def __call__(self, tokens: Any, held: Any, attended: Any, most: Callable[[Any, Any], Any] = max) -> Any:
        """Seconds of a pass: numbers, or arrays with `np.maximum` for `most`.

        Args:
            tokens: in the pass. held: tokens of the contexts that are read. attended: pairs of a token and one of its
                context.
        """
        seconds = self.overhead + self.several * (tokens > 1)
        seconds += most(self.weights, self.token * tokens) + most(self.context * held, self.attention * attended)
        if self.experts:
            seconds += most(self.experts * (1.0 - self.spared**tokens), self.expert_token * tokens)
        return seconds


class Roofline(NamedCost):
    """A `bpkit.types.BatchCostModel` by formula, and the schema of a cost file that has `"kind": "roofline"`.

    A pass takes `overhead`, and for each of dense layers, attention and experts max(bytes / bandwidth, FLOPs / peak): a
    kernel overlaps its own reading with its own computing, so that the longer counts (Williams, Waterman & Patterson
    2009), while kernels follow one another, so that they add up. All dense layers see the same tokens; therefore they
    are bound by the same, and one maximum for them is exact.

    `verify` and `draft` go by the positions that are no padding, as in an engine that packs its rows, without stairs;
    each row reads a context as long as the longest's. `prefill` is a pass over tokens, as if all were of one prompt.
    `catch_up` counts the row that waits most alone: of the others only those wait for long that begin in the same step.

    Attributes:
        target, draft: what their passes do; without `draft` drafts are free, wherever they come from.
        sources: drafts of further sources, from source 1 on; None for free ones.
        rest: seconds of everything else in a step.
        context_length: where it is asked without one.
    """

    mixes_prompts = True
    kind: Literal["roofline"] = "roofline"
    device: DeviceSpeed
    target: ModelPass
    draft: DraftPass | None = None
    sources: tuple[DraftPass | None, ...] = ()
    rest: Free = 0.0
    context_length: Annotated[int, Field(ge=0)] = 1024

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(self, handler, "sources")

    # The BatchCostModel protocol

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        """Cost of one of `PHASES` for all rows of a step; see `BatchCostModel`. Raises CostError for another phase."""
        if phase == "verify":
            if size < 1:
                raise CostError(f"a step verifies at least the anchor: there is no verify width {size}")
            return float(self._target(positions, rows * context_length, positions * context_length))
        if phase == "rest":
            return self.rest
        if size < (1 if phase == "prefill" else 2):
            self._known(phase)
            return 0.0
        return float(self._price(phase, size, context_length, positions, max))

    def array(
        self,
        phase: str,
        sizes: ArrayLike,
        context_lengths: ArrayLike = 0,
        rows: ArrayLike = 1,
        positions: ArrayLike | None = None,
    ) -> NDArray[np.float64]:
        """`batch_seconds` of many at once; see `NamedCost`."""
        asked = np.asarray(sizes) * np.asarray(rows) if positions is None else np.asarray(positions)
        size, at, count, asked = np.broadcast_arrays(
            np.asarray(sizes), np.asarray(context_lengths), np.asarray(rows), asked
        )
        if phase == "rest":
            return np.full(size.shape, self.rest)
        asked = np.where(count == 1, size, asked)
        if phase == "verify":
            if size.size and size.min() < 1:
                raise CostError(f"a step verifies at least the anchor: there is no verify width {size.min()}")
            return np.asarray(self._target(asked, count * at, asked * at, np.maximum), np.float64)
        least = 1 if phase == "prefill" else 2
        found = self._price(phase, np.maximum(size, least), at, asked, np.maximum)
        return np.where(size < least, 0.0, found).astype(np.float64)

    def _price(self, phase: str, size: Any, at: Any, positions: Any, most: Callable[[Any, Any], Any]) -> Any:
        """Cost of the other phases, of sizes that cost something: numbers or arrays."""
        if phase == "prefill":
            return self._target(size, at + size, size * (at + size / 2), most)
        self._known(phase)
        if self.draft is None:
            return 0.0
        device, draft = self.device, self.draft
        if phase == "catch_up":
            return draft.waiting * (size - 1) / (device.peak * device.peak_share)
        if phase == "features":
            return draft.scores * positions / (device.bandwidth * device.bandwidth_share)
        assert self._drafter is not None
        rows = positions / size  # as many as draft, if all of them draft as much as the first
        if draft.passes == "one":
            return self._drafter(positions, rows * at, positions * at, most)
        return (size - 1) * self._drafter(rows, rows * at, rows * at, most)

    @staticmethod
    def _known(phase: str) -> None:
        if phase not in PHASES:
            raise CostError(f"there is no phase {phase!r} of a step; the phases are: {', '.join(PHASES)}")

    @cached_property
    def _target(self) -> PassSeconds:
        return PassSeconds.of(self.target, self.device)

    @cached_property
    def _drafter(self) -> PassSeconds | None:
        return None if self.draft is None else PassSeconds.of(self.draft, self.device)

    # Sources of drafts

    def of_source(self, source: int) -> Roofline:
        """What steps cost that draft from a source. Raises CostError for one that it does not price."""
        if source == 0 or (self.draft is None and not self.sources):  # drafts are free, wherever they come from
            return self
        if source > len(self.sources):
            raise CostError(
                f"cost model {self.name!r} prices {1 + len(self.sources)} source(s) of drafts, and source {source} was "
                "asked for: add what its passes do to 'sources', or null if they are free"
            )
        return self._of_sources[source - 1]

    @cached_property
    def _of_sources(self) -> list[Roofline]:
        return [self.model_copy(update={"draft": draft, "sources": ()}) for draft in self.sources]

    def with_sources(self, others: Sequence[Roofline]) -> Roofline:
        """This cost model with the drafts of further sources; all else is as it is here."""
        return self.model_copy(update={"sources": (*self.sources, *(other.draft for other in others))})

    # What it says

    @property
    def middle_context(self) -> int:
        """The context length where it is asked without one."""
        return self.context_length

    @property
    def largest_rows(self) -> float:
        """Any number of rows has a cost."""
        return math.inf

    @property
    def prices_prefill(self) -> bool:
        """That reading prompts has a cost."""
        return True

    def table(self) -> CostTable:
        """Its prices by size as a table, of passes without padding."""
        return CostTable(
            name=self.name,
            description=f"{self.description} These are figures of a formula, which prices sizes in between as well.",
            source=self.source,
            **self._tables(1),
            prefill={tokens: self.seconds("prefill", tokens, 0) for tokens in TABLE_PROMPTS},
            rows={rows: RowsTable(**self._tables(rows)) for rows in TABLE_ROWS},
            sources=tuple(other.table() for other in self._of_sources),
        )

    def _tables(self, rows: int) -> dict[str, Any]:
        middle = self.context_length
        contexts = sorted({middle // 8, middle // 2, middle, 4 * middle, 16 * middle})

        def priced(phase: str, size: int, at: int) -> float:
            return self.batch_seconds(phase, size, at, rows, rows * size)

        sizes = {"draft": TABLE_SIZES[1:], "catch_up": TABLE_WAITING, "features": TABLE_SIZES[1:]}
        drafts = {phase: {size: priced(phase, size, middle) for size in of_it} for phase, of_it in sizes.items()}
        return {
            **{phase: prices for phase, prices in drafts.items() if any(prices.values())},
            "verify": {size: {at: priced("verify", size, at) for at in contexts} for size in TABLE_SIZES},
            "rest": self.rest,
        }
