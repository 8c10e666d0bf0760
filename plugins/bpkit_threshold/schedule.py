"""The +2/-1 schedule of transformers' assisted generation: draft more while drafts are accepted whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec, Step

if TYPE_CHECKING:
    from torch import Tensor


class ScheduleConfig(PolicyConfig):
    """Options of `schedule`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"start": (1, 2, 3, 5, 7, 11, 15)}

    start: int | None = Field(
        default=None, ge=1, description="drafted tokens in the first step; by default the trained block size less one"
    )


class Schedule(Policy):
    """Two drafted tokens more after a step whose draft was accepted whole, otherwise one less, at least one.

    This is `num_assistant_tokens_schedule="heuristic_transient"`: every request begins at `start` again.

    *Whole* means all that was verified: a draft that was cut short near the end, or an n-gram drafter that proposed
    less than was asked, is not held against the schedule. A step that verified nothing changes nothing.
    """

    Config = ScheduleConfig
    wants = frozenset()
    config: ScheduleConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.largest = decoder.max_block_size - 1  # in drafted tokens, as everything here
        self.start = min(max(self.config.start or decoder.trained_block_size - 1, 1), self.largest)

    def begin(self, context: Context) -> State:
        return {"draft_length": context.full(self.start)}  # int64 [batch]

    def select(self, state: State, context: Context) -> Tensor:
        block_size: Tensor = state["draft_length"] + 1  # and the anchor
        return block_size

    def observe(self, state: State, step: Step) -> None:
        length: Tensor = state["draft_length"]
        whole = step.num_accepted == step.verify_length
        moved = (length + 2).where(whole, length - 1).clamp(1, self.largest)
        state["draft_length"] = moved.where(step.verify_length > 0, length)
