"""A constant block size: the baseline that every other policy has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.sizes import BlockSize
from bpkit.types import Context, CostModel, DecoderSpec, Plan

if TYPE_CHECKING:
    from torch import Tensor


class FixedConfig(PolicyConfig):
    """Options of `fixed`."""

    block_size: BlockSize = None
    source: int = Field(default=0, ge=0, description="of several sources of drafts the one that drafts, from 0")


class Fixed(Policy):
    """Always `block_size`, or the drafter's trained block size where none is given. 1 is plain decoding.

    Where a decoder has several sources of drafts, always from `source`.
    """

    Config = FixedConfig
    wants = frozenset()
    config: FixedConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        sources, self.source = decoder.sources, self.config.source
        if self.source >= len(sources):
            has = "one source" if len(sources) == 1 else f"{len(sources)} sources"
            raise PolicyError(
                f"policy 'fixed': this decoder has {has} of drafts, numbered from 0, and option `source` is "
                f"{self.source}: name more drafters, A+B, or another source"
            )
        self.block_size = self.config.block_size or sources[self.source].trained_block_size

    def select(self, state: State, context: Context) -> Tensor | Plan:
        size = context.full(self.block_size)
        return Plan(size, context.full(self.source)) if self.source else size

    def __repr__(self) -> str:
        return super().__repr__().replace(", source=0", "")  # which goes without saying
