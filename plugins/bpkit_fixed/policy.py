"""A constant block size: the baseline that every other policy has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpkit.policy import Policy, PolicyConfig, State
from bpkit.sizes import BlockSize
from bpkit.types import Context, CostModel, DecoderSpec

if TYPE_CHECKING:
    from torch import Tensor


class FixedConfig(PolicyConfig):
    """Options of `fixed`."""

    block_size: BlockSize = None


class Fixed(Policy):
    """Always `block_size`, or the drafter's trained block size where none is given. 1 is plain decoding."""

    Config = FixedConfig
    wants = frozenset()
    config: FixedConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.block_size = self.config.block_size or decoder.trained_block_size

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)
