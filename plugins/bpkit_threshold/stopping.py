"""What `threshold` and `svip` share: draft a fixed block, verify it up to the first position in doubt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft

if TYPE_CHECKING:
    from torch import Tensor


class StoppingConfig(PolicyConfig):
    """Options of every stop rule. A rule puts its own option first, so that `name:value` sets that one."""

    block_size: int | None = Field(
        default=None, ge=1, description="positions to draft, anchor included; by default the trained block size"
    )


class StopRule(Policy):
    """Base of policies that stop at the first position in doubt; a rule says what doubt is, in `trusts`."""

    config: StoppingConfig

    def trusts(self, draft: Draft) -> Tensor:
        """Which drafted positions are not in doubt: bool [batch, width]. Padding may be either."""
        raise NotImplementedError(f"{type(self).__name__} must define trusts(self, draft)")

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.block_size = self.config.block_size or decoder.trained_block_size

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        # The product of 1s and 0s stays 1 up to the first doubt. Rows are padded to the widest: the run may go on
        # into the padding, never past the row's own draft.
        run = self.trusts(draft).long().cumprod(dim=1).sum(dim=1)
        return run.minimum(draft.draft_length)

    def extend(self, state: State, draft: Draft) -> Tensor:
        # The token in doubt is drafted already when its doubt is known; `truncate` then leaves it out.
        return (draft.draft_length > 0) & (self.truncate(state, draft) == draft.draft_length)
