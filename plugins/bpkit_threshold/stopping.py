"""From "which positions are trusted" to "how many to verify": what `threshold` and `svip` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpkit.types import Draft

if TYPE_CHECKING:
    from torch import Tensor


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
