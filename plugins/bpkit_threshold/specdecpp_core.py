"""The acceptance head as a network that decides by itself, for export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.core import Core, Port
from bpkit.export.graph import count
from bpkit_threshold.specdecpp_networks import AcceptanceHead


class RiskCore(nn.Module):
    """Tokens before the first at which the risk of a refusal exceeds the threshold."""

    def __init__(self, head: AcceptanceHead, threshold: float) -> None:
        super().__init__()
        self.blocks, self.output, self.threshold = head.blocks, head.output, threshold

    def forward(self, draft_hidden: Tensor, draft_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the length int64 [batch], risk float32 [batch, width], margin float32 [batch]."""
        logits = self.output(self.blocks(draft_hidden))[..., 0]
        risk = 1 - F.logsigmoid(logits).cumsum(dim=1).exp()
        # The risk only grows along a draft, so that what is trusted is its beginning.
        trusted = torch.minimum(count(risk <= self.threshold), draft_length)
        inside = torch.arange(1, risk.shape[1] + 1) <= draft_length[:, None]
        return trusted, risk, torch.where(inside, (risk - self.threshold).abs(), 1.0).amin(dim=1)


class TruncateCore(RiskCore):
    """How much to verify: the token at which the draft stops as well, if it is kept."""

    def __init__(self, head: AcceptanceHead, threshold: float, *, keep_last: bool) -> None:
        super().__init__(head, threshold)
        self.more = int(keep_last)

    def forward(self, draft_hidden: Tensor, draft_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trusted, risk, margin = super().forward(draft_hidden, draft_length)
        return torch.minimum(trusted + self.more, draft_length), risk, margin


class ExtendCore(RiskCore):
    """Whether to draft on: there is a draft, and all of it is trusted."""

    def forward(self, draft_hidden: Tensor, draft_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trusted, risk, margin = super().forward(draft_hidden, draft_length)
        return (draft_length > 0) & (trusted == draft_length), risk, margin


def truncate_core(core: TruncateCore, width: int) -> Core:
    """With its ports, for a drafter of that width."""
    decides = Port("verify_length", ("batch",), "int64", "drafted tokens to verify")
    return Core("truncate", core, _inputs(width), (decides, *_scores()))


def extend_core(core: ExtendCore, width: int) -> Core:
    """With its ports, for a drafter of that width."""
    decides = Port("go_on", ("batch",), "bool", "whether to draft one token more")
    return Core("extend", core, _inputs(width), (decides, *_scores()))


def _inputs(width: int) -> tuple[Port, ...]:
    hidden = "the drafter's last hidden state that predicted each drafted token"
    return (
        Port("draft_hidden", ("batch", "width", width), "float32", hidden),
        Port("draft_length", ("batch",), "int64", "drafted tokens"),
    )


def _scores() -> tuple[Port, ...]:
    return (
        Port("risk", ("batch", "width"), "float32", "chance that one of the tokens so far is refused"),
        Port("margin", ("batch",), "float32", "distance of the nearest risk to the threshold"),
    )
