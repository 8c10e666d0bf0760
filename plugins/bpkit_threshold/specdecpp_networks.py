"""The acceptance head of SpecDec++ (2405.19715), and what is decided by it."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.graph import clearance, count, running_product
from bpkit.policy import PolicyError


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class AcceptanceHead(nn.Module):
    """Residual blocks, each with weights of its own, and a linear layer to one logit.

    Args:
        width: of the drafter's hidden state. blocks: how many; 0 is logistic regression.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.output = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float32 [..., width]. Returns logits that a token is accepted if all before it are, [...]."""
        if hidden.shape[-1] != self.width:
            raise PolicyError(
                f"policy 'specdecpp': the head was trained for a drafter of width {self.width}, this one has "
                f"{hidden.shape[-1]}; train it with `bpkit train specdecpp TRACE --out FOLDER`"
            )
        return cast("Tensor", self.output(self.blocks(hidden))[..., 0])


class Risk(nn.Module):
    """How much of a draft to trust: tokens before the first at which the risk of a refusal exceeds the threshold.

    Args:
        method: what it decides as a network of its own: `truncate`, how much to verify, or `extend`, whether to go on.
        keep_last: verify also the token at which the draft stops.
    """

    def __init__(
        self, head: AcceptanceHead, threshold: float, *, keep_last: bool, method: Literal["truncate", "extend"]
    ) -> None:
        super().__init__()
        self.head, self.threshold, self.more = head, threshold, int(keep_last)
        self.decide = self.verify_length if method == "truncate" else self.go_on

    def log_accepted(self, draft_hidden: Tensor) -> Tensor:
        """Logarithm of the chance that each token is accepted if all before it are: float32 [batch, width]."""
        return F.logsigmoid(self.head(draft_hidden))

    def risk(self, log_accepted: Tensor) -> Tensor:
        """Chance that one of the tokens so far is refused: float32 [batch, width]."""
        return 1 - running_product(log_accepted)

    def trusted(self, risk: Tensor, draft_length: Tensor) -> Tensor:
        """int64 [batch]."""
        # The risk only grows along a draft, so that what is trusted is its beginning.
        return torch.minimum(count(risk <= self.threshold), draft_length)

    def verify_length(self, risk: Tensor, draft_length: Tensor) -> Tensor:
        """How much to verify: int64 [batch]."""
        return torch.minimum(self.trusted(risk, draft_length) + self.more, draft_length)

    def go_on(self, risk: Tensor, draft_length: Tensor) -> Tensor:
        """Whether there is a draft, and all of it is trusted: bool [batch]."""
        return (draft_length > 0) & (self.trusted(risk, draft_length) == draft_length)

    def forward(self, draft_hidden: Tensor, draft_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the decision [batch], risk float32 [batch, width], margin float32 [batch]."""
        risk = self.risk(self.log_accepted(draft_hidden))
        return self.decide(risk, draft_length), risk, clearance((risk - self.threshold).abs(), draft_length)
