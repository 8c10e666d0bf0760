"""Stop rules: a draft is kept up to the first position that is not trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpkit.policy.policy import Policy, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature

if TYPE_CHECKING:
    from torch import Tensor


class StopRule(Policy):
    """Drafts `block_size` positions and keeps those before the first that is not `trusted`.

    With an autoregressive drafter the draft ends there; a block-diffusion drafter has drafted its whole block by then,
    and what is verified is trimmed. The config has an option `block_size`; None is the trained block size.
    """

    config: Any

    def trusted(self, state: State, draft: Draft) -> Tensor:
        """Which positions are trusted: bool [batch, width]. What follows the first that is not does not matter."""
        raise NotImplementedError(f"{type(self).__name__} must define trusted(self, state, draft)")

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.block_size: int = self.config.block_size or decoder.trained_block_size

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return trusted_whole(draft, self.trusted(state, draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return trusted_length(draft, self.trusted(state, draft))


def trusted_length(draft: Draft, trusted: Tensor) -> Tensor:
    """Positions before the first that is not trusted.

    Args:
        trusted: bool [batch, width]; what stands in the padding of a row shorter than the widest is ignored.

    Returns:
        int64 [batch], 0 .. `draft.draft_length`.
    """
    # The product of 1s and 0s stays 1 up to the first 0. A run may go on into the padding, hence the minimum.
    run: Tensor = trusted.cumprod(dim=1).sum(dim=1)
    return run.minimum(draft.draft_length)


def trusted_whole(draft: Draft, trusted: Tensor) -> Tensor:
    """Whether there is a draft and all of it is trusted: bool [batch]. Arguments as above."""
    return (draft.draft_length > 0) & (trusted_length(draft, trusted) == draft.draft_length)


# The rules, each bool [batch, width]. -----------------------------------------------------------------------------


def sure(draft: Draft, least: float) -> Tensor:
    """The drafter's probability of the token is at least `least`."""
    return draft[Feature.DRAFT_PROBABILITY] >= least


def low_entropy(draft: Draft, most: float) -> Tensor:
    """The root of the drafter's entropy, in nats, is at most `most` (SVIP, 2411.18462)."""
    # Squared on the other side: an entropy of 0 may be rounded to -1e-8, and its root would be NaN.
    return draft[Feature.DRAFT_ENTROPY] <= most**2


def high_entropy_bound(draft: Draft, least: float | Tensor, gamma: float) -> Tensor:
    """The bound on acceptance 1 - sqrt(`gamma` H) is at least `least`; H is in nats (AdaEDL, 2410.18351).

    Args:
        least: one for all, or float64 [batch, 1].
    """
    return draft[Feature.DRAFT_ENTROPY] <= (1 - least) ** 2 / gamma  # solved for the entropy, as above
