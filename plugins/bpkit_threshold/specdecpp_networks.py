"""The acceptance head of SpecDec++ (2405.19715)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

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
