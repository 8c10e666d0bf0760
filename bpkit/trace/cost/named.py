"""What cost models that files and presets hold have in common, wherever their prices come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from numpy import float64
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler

Free = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Paid = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]


def without_empty(model: BaseModel, handler: SerializerFunctionWrapHandler, *names: str) -> dict[str, Any]:
    """A model as it is written, without some of its fields where they say nothing."""
    written: dict[str, Any] = handler(model)
    return {name: value for name, value in written.items() if value or name not in names}


class NamedCost(BaseModel, ABC):
    """A `bpkit.types.BatchCostModel` that says what it is of.

    Attributes:
        name, description: in words. source: of published figures.
        unit: of all prices.

    Class attributes:
        mixes_prompts: whether the engine that is priced reads prompts in the passes of rows that run, as vLLM does.
    """

    mixes_prompts: ClassVar[bool] = False

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str = "custom"
    description: str = ""
    source: str = ""
    unit: Literal["seconds", "plain steps"] = "seconds"

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, other figures included: nothing that was looked up before is kept."""
        copied = super().model_copy(update=update, deep=deep)
        for looked_up in copied.__dict__.keys() - type(self).model_fields:
            del copied.__dict__[looked_up]
        return copied

    # The BatchCostModel protocol

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        """Cost of one of `PHASES` for one row. Raises CostError for what it does not price."""
        return self.batch_seconds(phase, size, context_length, 1, size)

    @abstractmethod
    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        """Cost of one of `PHASES` for all rows of a step; see `BatchCostModel`. Raises CostError, as `seconds`."""

    @abstractmethod
    def array(
        self,
        phase: str,
        sizes: ArrayLike,
        context_lengths: ArrayLike = 0,
        rows: ArrayLike = 1,
        positions: ArrayLike | None = None,
    ) -> NDArray[float64]:
        """`batch_seconds` of many at once: float64, of the shape that all arguments broadcast to.

        Args:
            positions: that are no padding; None if there is no padding.

        Raises CostError, as `batch_seconds`.
        """

    @abstractmethod
    def of_source(self, source: int) -> Self:
        """What steps cost that draft from a source. Raises CostError for one that it does not price."""

    @abstractmethod
    def with_sources(self, others: Sequence[Any]) -> Self:
        """This cost model with the drafts of further sources, as others of its class price them."""

    @abstractmethod
    def table(self) -> Any:
        """Its prices by size as a `CostTable`, which is itself if it is one."""

    # What it says, at a context length in the middle if none is given

    @property
    @abstractmethod
    def middle_context(self) -> int:
        """A context length in the middle of those that it is of."""

    @property
    @abstractmethod
    def largest_rows(self) -> float:
        """The largest number of rows that has a cost; infinite if all have one."""

    @property
    @abstractmethod
    def prices_prefill(self) -> bool:
        """Whether reading prompts has a cost; if not, it costs 0."""

    def target_efficiency(self, width: int, context_length: int | None = None) -> float:
        """T(1) / T(width): what share of the ideal a verification keeps (MoESD, 2505.19645). 1 is ideal."""
        at = self.middle_context if context_length is None else context_length
        return self.seconds("verify", 1, at) / self.seconds("verify", width, at)

    def break_even(self, block_size: int, context_length: int | None = None) -> float:
        """The mean acceptance length from which drafting this block at every step beats plain decoding.

        (draft + verify + rest) / (verify of width 1 + rest), with one position waiting and the whole draft verified.
        """
        return self.step(block_size, context_length) / self.step(1, context_length)

    def step(self, block_size: int, context_length: int | None = None, rows: int = 1) -> float:
        """Cost of a step with one position waiting whose whole draft is verified; block size 1 is a plain step.

        Args:
            rows: that all draft a block of this size.
        """
        at = self.middle_context if context_length is None else context_length

        def seconds(phase: str, size: int) -> float:
            return self.batch_seconds(phase, size, at, rows, rows * size)

        return seconds("draft", block_size) + seconds("verify", block_size) + seconds("rest", 1)
