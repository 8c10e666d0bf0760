"""Adaptive speculation as in SGLang: a moving average of accepted tokens walks along a ladder of block sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State, fade
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
    across_requests: bool = Field(default=True, description="begin a request where those before it ended")


class EmaMemory(PolicyMemory):
    """Where a row is: its block size, the moving average of accepted tokens, and the steps so far."""

    fading = frozenset({"average"})
    latest = frozenset({"block_size"})  # sizes have no mean

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
        import torch  # here, so that options can be listed without it

        self.ladder = [size for size in self.config.block_sizes if size <= decoder.max_block_size]
        start = self.config.start or decoder.trained_block_size
        self.start = start if start in self.ladder else self.ladder[len(self.ladder) // 2]
        *lower, _ = lengths = [size - 1 for size in self.ladder]
        self.sizes, self.lengths = torch.tensor(self.ladder), torch.tensor(lengths)
        # An average above these does not fall to the rung, and climbs from it: float64 [rungs - 1], ascending.
        falls = [(length - 0.5 if length else 0.5) + self.config.down for length in lower]
        climbs = [length - 0.5 + self.config.up for length in lower]
        self.falls, self.climbs = (torch.tensor(rule, dtype=torch.float64) for rule in (falls, climbs))

    def known(self) -> EmaMemory:
        """The memory as this ladder takes it up; without one, SGLang's beginning: one less than the draft length."""
        known = self.memory
        return EmaMemory(
            block_size=known.block_size if known.block_size in self.ladder else self.start,
            average=self.start - 2 if known.average is None else known.average,
            steps=known.steps,
        )

    def begin(self, context: Context) -> State:
        return self.known().rows(context)

    def select(self, state: State, context: Context) -> Tensor:
        block_size: Tensor = state["block_size"]
        return block_size

    def observe(self, state: State, step: Step) -> None:
        average, alpha, verified = state["average"], self.config.alpha, step.verify_length > 0
        blended = average + alpha * (step.num_accepted - average)
        state["average"] = blended.where(verified, average)
        fade(state, 1 - alpha, verified)
        state["steps"] = state["steps"] + 1
        late = state["steps"] - self.config.warmup
        due = (late > 0) & (late % self.config.interval == 0)
        if due.any():
            self._move(state, due)

    def _move(self, state: State, due: Tensor) -> None:
        """Where the rows go that are due: bool [batch]."""
        average, place = state["average"], _above(state["block_size"], self.sizes)
        fallen, climbed = place.minimum(_above(average, self.falls)), place.maximum(_above(average, self.climbs))
        probing = place == 0
        moved = fallen.where(fallen < place, climbed).where(~probing, min(1, len(self.ladder) - 1))
        state["block_size"] = self.sizes[moved].where(due, state["block_size"])
        unknown = due & probing & (average < 0)  # nothing was drafted yet
        state["average"] = (self.lengths[moved] - 1.0).where(unknown, average)
        fade(state, 0.0, unknown)

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            self.memory = self.known().after(state)


def _above(values: Tensor, steps: Tensor) -> Tensor:
    """How many of ascending `steps` each value is above: int64 [batch]."""
    return (values[:, None] > steps).sum(dim=1)
