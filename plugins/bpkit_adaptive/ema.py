"""Adaptive speculation as in SGLang: a moving average of accepted tokens walks along a ladder of block sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSizesWithNoDraft
from bpkit.types import Context, CostModel, DecoderSpec, Step

if TYPE_CHECKING:
    from torch import Tensor


class EmaConfig(PolicyConfig):
    """Options of `ema`. Hysteresis is in accepted tokens."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "alpha": (0.1, 0.2, 0.4),
        "up": (-0.5, 0.0, 0.5),
        "down": (-0.25, 0.5),
        "interval": (1, 5),
    }

    block_sizes: BlockSizesWithNoDraft = Field(
        default=(1, 2, 4, 8, 16), description="the ladder: a list, or text such as 1+4+8; 1 (no draft) is always on it"
    )
    alpha: float = Field(default=0.2, gt=0, le=1, description="weight of the newest step in the moving average")
    interval: int = Field(default=5, ge=1, description="steps between two decisions")
    warmup: int = Field(default=10, ge=0, description="steps before the first")
    up: float = Field(default=0.0, description="added to the average that is needed to climb")
    down: float = Field(default=-0.25, description="added to the average at which to descend")
    start: int | None = Field(default=None, ge=1, description="first block size; by default the trained one, if listed")
    across_requests: bool = Field(default=True, description="begin a request where the last one ended")


class EmaMemory(PolicyMemory):
    """Where a row is: its block size, the moving average of accepted tokens, and the steps so far."""

    block_size: Annotated[int, Field(ge=1)] | None = None
    average: Annotated[float, Field(allow_inf_nan=False)] | None = None
    steps: Annotated[int, Field(ge=0)] = 0


class Ema(RememberingPolicy[EmaMemory]):
    """After `warmup` steps, every `interval` steps, climbs or descends a ladder of draft lengths d_0 < d_1 < ...

        average <- (1 - alpha) average + alpha num_accepted
        descend from d_i to d_(i-1) while average <= d_(i-1) - 1/2 + down     (to length 0: average <= 1/2 + down)
        else climb from d_i to d_(i+1) while average > d_i - 1/2 + up

    From the no-draft arm it tries the smallest draft at the next decision: without a draft nothing is learned. Rule and
    constants are SGLang's (`--speculative-adaptive`, `AdaptiveStepSlot`); what differs, docs/policies/adaptive.md says.
    Every row has an average of its own, which steps that verified nothing leave alone.
    """

    Config = EmaConfig
    Memory = EmaMemory
    wants = frozenset()
    config: EmaConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.ladder = [size for size in self.config.block_sizes if size <= decoder.max_block_size]
        start = self.config.start or decoder.trained_block_size
        self.start = start if start in self.ladder else self.ladder[len(self.ladder) // 2]

    def begin(self, context: Context) -> State:
        known = self.memory
        # SGLang's neutral beginning: one less than the draft length.
        average = self.start - 2 if known.average is None else known.average
        return {
            "block_size": context.full(known.block_size if known.block_size in self.ladder else self.start),
            "average": context.full(0).double() + average,
            "steps": context.full(known.steps),
        }

    def select(self, state: State, context: Context) -> Tensor:
        block_size: Tensor = state["block_size"]
        return block_size

    def observe(self, state: State, step: Step) -> None:
        average = state["average"]
        blended = average + self.config.alpha * (step.num_accepted - average)
        state["average"] = blended.where(step.verify_length > 0, average)
        state["steps"] = state["steps"] + 1
        late = state["steps"] - self.config.warmup
        due = (late > 0) & (late % self.config.interval == 0)
        if due.any():
            rows = zip(state["block_size"].tolist(), state["average"].tolist(), due.tolist(), strict=True)
            moved = [self._moved(size, average) if now else (size, average) for size, average, now in rows]
            sizes, averages = zip(*moved, strict=True)
            state["block_size"] = state["block_size"].new_tensor(sizes)
            state["average"] = state["average"].new_tensor(averages)

    def _moved(self, block_size: int, average: float) -> tuple[int, float]:
        """The block size of the next steps, and the average, which only a first draft ever changes."""
        lengths = [size - 1 for size in self.ladder]
        first = place = self.ladder.index(block_size)
        if lengths[place] == 0:
            place = min(place + 1, len(lengths) - 1)
            return self.ladder[place], average if average >= 0 else lengths[place] - 1.0
        while place > 0 and average <= (lengths[place - 1] - 0.5 if lengths[place - 1] else 0.5) + self.config.down:
            place -= 1
        if place == first:
            while place < len(lengths) - 1 and average > lengths[place] - 0.5 + self.config.up:
                place += 1
        return self.ladder[place], average

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            # Rows of one batch end together here; the middle one stands for them, because sizes have no mean.
            rows = sorted(zip(*(state[name].tolist() for name in ("average", "block_size", "steps")), strict=True))
            average, block_size, steps = rows[len(rows) // 2]
            self.memory = EmaMemory(block_size=block_size, average=average, steps=steps)
