"""What to expect before a draft and after it. Both give hazards: does the next token stand, if all before it do?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.graph import best, survival
from bpkit.learn.gains import NEVER
from bpkit.learn.networks import Standard, WorthOfASecond

SURE = 1e-6
"""Probabilities are taken to be at least so far from 0 and 1."""


class Before(nn.Module):
    """How much of a draft will stand, from what is known at the anchor.

    Two layers, the second residual, and a table that shifts the hazards of each block size: block-diffusion drafts of
    different sizes differ a little.

    Args:
        inputs: width of the input. sizes: block sizes, ascending.
    """

    def __init__(self, inputs: int, sizes: Sequence[int], hidden: int, dropout: float) -> None:
        super().__init__()
        width = max(sizes) - 1
        self.dropout = nn.Dropout(dropout)
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.hazards = nn.Linear(hidden, width)
        self.of_size = nn.Parameter(torch.zeros(len(sizes), width))
        inside = torch.arange(1, width + 1) < torch.tensor(sizes)[:, None]  # the tokens of each size
        self.register_buffer("inside", inside.float(), persistent=False)

    def logits(self, x: Tensor) -> Tensor:
        """That token k stands if all before it do: float32 [batch, inputs] -> [batch, sizes, width]."""
        x = self.dropout(F.silu(self.first(self.dropout(x))))
        x = x + F.silu(self.second(x))
        return cast("Tensor", self.hazards(x)[:, None] + self.of_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens expected to stand: float32 [batch, inputs] -> [batch, sizes]."""
        return (survival(self.logits(x)) * cast("Tensor", self.inside)).sum(dim=-1)

    @torch.no_grad()
    def take_raw_inputs(self, standard: Standard) -> None:
        """Go on with raw inputs in the place of standardised ones, which becomes part of the first layer."""
        weight, bias = self.first.weight, self.first.bias
        weight.div_(standard.scale.to(weight.device))
        bias.sub_(weight @ standard.mean.to(weight.device))


class After(nn.Module):
    """Hazards from the drafter's own word on each token: a calibration, logistic in three figures of each token.

    The log-odds of its probability, the entropy of its distribution, and the log-probability of the draft so far, with
    a bias for each block size and place.
    """

    def __init__(self, sizes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
        self.bias = nn.Parameter(torch.zeros(sizes, width))

    def forward(self, probability: Tensor, entropy: Tensor, bias: Tensor) -> Tensor:
        """All float32 [..., width]; `bias` is a row of the table for each draft. Returns logits [..., width]."""
        p = probability.clamp(SURE, 1 - SURE)
        log_p = p.log()
        own, doubt, so_far = self.weight.unbind()
        return own * (log_p - torch.log1p(-p)) + doubt * entropy + so_far * log_p.cumsum(dim=-1) + bias


class Truncation(nn.Module):
    """As much of a draft as pays for its verification.

    Args:
        facts: of the policy. columns: places of the usable block sizes among those of training.
        rate: as in `bpkit.learn.LearnedConfig`.
    """

    def __init__(self, after: After, facts: dict[str, Any], columns: Sequence[int], rate: float) -> None:
        super().__init__()
        trained = facts["block_sizes"]
        self.after, self.worth = after, WorthOfASecond(facts, columns, rate)
        rows = torch.zeros(max(trained) + 1, dtype=torch.int64)
        rows[trained] = torch.arange(len(trained))
        self.register_buffer("rows", rows)  # of the table of biases, by block size

    def gains(
        self,
        draft_probability: Tensor,
        draft_entropy: Tensor,
        block_size: Tensor,
        draft_length: Tensor,
        verify_seconds: Tensor,
        rho: Any,
    ) -> Tensor:
        """Tokens gained by verifying 0, 1, ... of the draft: float32 [batch, 1 + width].

        Args:
            verify_seconds: of passes over 1, 2, ... positions, [batch, largest size]. rho: what a second is worth.
        """
        width = draft_probability.shape[1]
        bias = self.after.bias[cast("Tensor", self.rows)[block_size]][:, :width]
        tokens = survival(self.after(draft_probability, draft_entropy, bias)).cumsum(dim=1)
        gains = tokens - rho * (verify_seconds[:, 1 : width + 1] - verify_seconds[:, :1])
        gains = torch.where(torch.arange(1, width + 1) <= draft_length[:, None], gains, NEVER)
        return torch.cat([torch.zeros_like(gains[:, :1]), gains], dim=1)

    def forward(
        self,
        draft_probability: Tensor,
        draft_entropy: Tensor,
        block_size: Tensor,
        draft_length: Tensor,
        verify_seconds: Tensor,
        typical_step_seconds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns verify_length int64 [batch], the gains, and margin float32 [batch]."""
        rho, _ = self.worth(typical_step_seconds)
        scores = self.gains(draft_probability, draft_entropy, block_size, draft_length, verify_seconds, rho)
        place, margin = best(scores)
        return place, scores, margin
