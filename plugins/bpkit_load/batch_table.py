"""vLLM's dynamic speculative decoding: a block size for each number of running rows, from a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec
from bpkit_load.row_tables import from_one_row, read_table, rows_of_entry

if TYPE_CHECKING:
    from torch import Tensor

Table = Annotated[
    dict[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
    BeforeValidator(read_table),
    AfterValidator(from_one_row),
]


class BatchTableConfig(PolicyConfig):
    """Options of `batch_table`."""

    table: Table = Field(
        default={1: 8, 4: 4, 16: 1},
        description="running rows: block size, from so many rows on; a mapping, or text such as 1:8+4:4+16:1",
    )


class BatchTable(Policy):
    """The block size that stands in the table for the largest number of rows not above those that run.

    That is vLLM's `num_speculative_tokens_per_batch_size`: ranges of batch sizes from 1 on, each with a number of
    drafted tokens (here block size = drafted tokens + 1); what lies between two ranges, or above the last, has the
    number of the range before it; sizes above the decoder's largest are taken as that.
    """

    Config = BatchTableConfig
    wants = frozenset()
    joint = True
    config: BatchTableConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.largest = decoder.max_block_size

    def select(self, state: State, context: Context) -> Tensor:
        table = self.config.table
        return context.full(min(table[rows_of_entry(table, context.running)], self.largest))
