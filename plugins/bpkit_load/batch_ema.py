"""SGLang's adaptive speculative decoding: one moving average for the batch, ladders of block sizes by batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSizes
from bpkit.types import Context, CostModel, DecoderSpec, Step
from bpkit_load.row_tables import from_one_row, read_table, rows_of_entry

if TYPE_CHECKING:
    from torch import Tensor

Ladders = Annotated[
    dict[Annotated[int, Field(ge=1)], BlockSizes], BeforeValidator(read_table), AfterValidator(from_one_row)
]


class BatchEmaConfig(PolicyConfig):
    """Options of `batch_ema`. Hysteresis is in accepted tokens."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (0.1, 0.2, 0.4), "up": (-0.5, 0.0, 0.5), "interval": (1, 5)}

    ladders: Ladders = Field(
        default={1: (2, 4, 6, 8), 8: (1, 2, 4), 32: (1, 2), 64: (1,)},
        description="running rows: ladder of block sizes, from so many rows on; a mapping, or text such as 1:2+4+8:1+2",
    )
    alpha: float = Field(default=0.2, gt=0, le=1, description="weight of the newest step in the moving average")
    interval: int = Field(default=5, ge=1, description="steps between two decisions of a ladder")
    warmup: int = Field(default=10, ge=0, description="steps of a ladder before the first")
    up: float = Field(default=0.0, description="added to the average that is needed to climb")
    down: float | None = Field(
        default=None,
        description="added to the average at which to descend; by default -0.25 for the first ladder, 0 for others",
    )
    start: int | None = Field(
        default=None, ge=1, description="first block size; by default the trained one; a ladder without it: its middle"
    )


class BatchEmaMemory(PolicyMemory):
    """Of each ladder, by its number of rows: its block size, the moving average of accepted tokens, steps so far."""

    block_size: dict[int, Annotated[int, Field(ge=1)]] = {}
    average: dict[int, Annotated[float, Field(allow_inf_nan=False)]] = {}
    steps: dict[int, Annotated[int, Field(ge=0)]] = {}


class BatchEma(RememberingPolicy[BatchEmaMemory]):
    """The ladder for the number of running rows says the block size of all rows, and each ladder learns by itself.

    After a step of rows with one ladder, draft lengths d_0 < d_1 < ...:

        average <- (1 - alpha) average + alpha mean(num_accepted)         unless it drafted nothing
        descend from d_i to d_(i-1) while average <= d_(i-1) - 1/2 + down (to length 0: average <= 1/2 + down)
        else climb from d_i to d_(i+1) while average > d_i - 1/2 + up

    The ladder's block size moves after `warmup` of its steps, at every `interval`-th. From the no-draft rung it tries
    the smallest draft at the next decision. The mean is over rows of which something was verified. Rule, ladders and
    constants are SGLang's (`--speculative-adaptive`); docs/policies/load.md says what differs. `ema` is the same rule
    for each row.
    """

    Config = BatchEmaConfig
    Memory = BatchEmaMemory
    wants = frozenset()
    joint = True
    config: BatchEmaConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        first = self.config.start or decoder.trained_block_size
        self.ladders = {
            rows: [size for size in sizes if size <= decoder.max_block_size] or [1]
            for rows, sizes in self.config.ladders.items()
        }
        self.starts = {
            rows: first if first in ladder else ladder[len(ladder) // 2] for rows, ladder in self.ladders.items()
        }

    def block_size(self, rows: int) -> int:
        """Of the ladder that is kept for this number of rows."""
        size = self.memory.block_size.get(rows)
        return size if size in self.ladders[rows] else self.starts[rows]

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size(rows_of_entry(self.ladders, context.running)))

    def observe(self, state: State, step: Step) -> None:
        accepted, verified = step.num_accepted.tolist(), step.verify_length.tolist()
        known, rows = self.memory, rows_of_entry(self.ladders, len(accepted))
        size, drafting = self.block_size(rows), sum(length > 0 for length in verified)
        average = known.average.get(rows, size - 2)  # SGLang begins one below the draft length
        if drafting:
            average += self.config.alpha * (sum(accepted) / drafting - average)
        steps = known.steps.get(rows, 0) + 1
        late = steps - self.config.warmup
        if late > 0 and late % self.config.interval == 0:
            size, average = self._moved(rows, size, average)
        known.block_size[rows], known.average[rows], known.steps[rows] = size, average, steps

    def _moved(self, rows: int, size: int, average: float) -> tuple[int, float]:
        """Where a ladder goes from a block size, and its average then."""
        lengths = [size - 1 for size in self.ladders[rows]]
        place = lengths.index(size - 1)
        if lengths[place] == 0:
            length = lengths[min(1, len(lengths) - 1)]
            return length + 1, average if average >= 0 or length == 0 else length - 1
        down = self.config.down if self.config.down is not None else (-0.25 if rows == 1 else 0.0)
        falls = [(length - 0.5 if length else 0.5) + down for length in lengths]
        climbs = [length - 0.5 + self.config.up for length in lengths]
        lower = place
        while lower > 0 and average <= falls[lower - 1]:
            lower -= 1
        if lower == place:
            while place < len(lengths) - 1 and average > climbs[place]:
                place += 1
        else:
            place = lower
        return lengths[place] + 1, average
