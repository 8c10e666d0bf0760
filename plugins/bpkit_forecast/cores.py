"""`forecast` as networks that decide by themselves, for export: what `Plan` does in Python, as a graph."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bpkit.export.core import Core, Port
from bpkit.export.gains import NEVER, TYPICAL, GainsCore, Going, cost_ports, gain_ports, over_plain
from bpkit.export.graph import best, survival
from bpkit_forecast.networks import After, Before

VERIFY = "seconds of a target pass over 1, 2, ... positions, at this row's context length"


class SelectCore(GainsCore):
    """The size that gains most at the going speed; the best fixed size where choosing does not pay."""

    def __init__(self, before: Before, facts: dict[str, Any], columns: list[int], config: Any) -> None:
        super().__init__()
        trained = facts["block_sizes"]
        sizes = torch.tensor([trained[column] for column in columns])
        self.first, self.second, self.hazards = before.first, before.second, before.hazards
        self.register_buffer("of_size", before.of_size.detach()[columns])
        self.register_buffer("inside", (torch.arange(1, max(trained)) < sizes[:, None]).float())
        self.weigh(facts, columns, config)

    def forward(
        self,
        target_features: Tensor,
        anchor_embedding: Tensor,
        last_hidden: Tensor,
        step_seconds: Tensor,
        typical_step_seconds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns block_size int64 [batch], gains float32 [batch, 1 + sizes] in tokens, margin float32 [batch]."""
        rho, floor = self.going(typical_step_seconds)
        stands = self._stands(target_features, anchor_embedding, last_hidden)
        tokens = (stands * cast("Tensor", self.inside)).sum(dim=-1)
        return self.decide(over_plain(tokens, step_seconds, rho), typical_step_seconds, rho, floor)

    def _stands(self, *inputs: Tensor) -> Tensor:
        """Chances that tokens 1 .. k stand, [batch, sizes, width]."""
        x = nn.functional.silu(self.first(torch.cat(inputs, dim=1)))
        x = x + nn.functional.silu(self.second(x))
        return survival(self.hazards(x)[:, None] + cast("Tensor", self.of_size))


class TruncateCore(nn.Module):
    """As much of the draft as pays for its verification."""

    def __init__(self, after: After, facts: dict[str, Any], columns: list[int], config: Any) -> None:
        super().__init__()
        trained = facts["block_sizes"]
        self.weight = after.weight
        self.going = Going(facts, columns, config.rate)
        rows = torch.zeros(max(trained) + 1, dtype=torch.int64)
        rows[trained] = torch.arange(len(trained))
        self.register_buffer("bias", after.bias.detach()[rows])  # by block size

    def forward(
        self,
        draft_probability: Tensor,
        draft_entropy: Tensor,
        block_size: Tensor,
        draft_length: Tensor,
        verify_seconds: Tensor,
        typical_step_seconds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns verify_length int64 [batch], gains float32 [batch, 1 + width] in tokens, margin float32 [batch]."""
        width = draft_probability.shape[1]
        p = draft_probability.clamp(1e-6, 1 - 1e-6)
        log_p = p.log()
        own, doubt, so_far = self.weight.unbind()
        bias = cast("Tensor", self.bias)[block_size][:, :width]
        logits = own * (log_p - torch.log1p(-p)) + doubt * draft_entropy + so_far * log_p.cumsum(dim=1) + bias
        rho, _ = self.going(typical_step_seconds)
        tokens = survival(logits).cumsum(dim=1)
        gains = tokens - rho * (verify_seconds[:, 1 : width + 1] - verify_seconds[:, :1])
        gains = torch.where(torch.arange(1, width + 1) <= draft_length[:, None], gains, NEVER)
        scores = torch.cat([torch.zeros_like(gains[:, :1]), gains], dim=1)
        place, margin = best(scores)
        return place, scores, margin


def select_core(module: SelectCore, hidden: int, layers: int) -> Core:
    """With its ports, for a target of that hidden size and a drafter that reads so many of its layers."""
    sizes = len(cast("Tensor", module.sizes))
    return Core(
        "select",
        module,
        inputs=(
            Port("target_features", ("batch", layers * hidden), "float32", "the layers that the drafter reads"),
            Port("anchor_embedding", ("batch", hidden), "float32", "the target's embedding of the anchor"),
            Port("last_hidden", ("batch", hidden), "float32", "final-norm hidden state that predicted the anchor"),
            *cost_ports(sizes),
        ),
        outputs=gain_ports(sizes),
    )


def truncate_core(module: TruncateCore, sizes: int, largest_size: int) -> Core:
    """With its ports, for so many block sizes (1 included) up to the largest."""
    return Core(
        "truncate",
        module,
        inputs=(
            Port("draft_probability", ("batch", "width"), "float32", "the drafter's probability of each drafted token"),
            Port("draft_entropy", ("batch", "width"), "float32", "entropy of its distribution at each, in nats"),
            Port("block_size", ("batch",), "int64", "of the draft"),
            Port("draft_length", ("batch",), "int64", "drafted tokens"),
            Port("verify_seconds", ("batch", largest_size), "float32", VERIFY),
            Port("typical_step_seconds", (sizes,), "float32", TYPICAL),
        ),
        outputs=(
            Port("verify_length", ("batch",), "int64", "drafted tokens to verify"),
            Port("gains", ("batch", "kept"), "float32", "tokens gained by verifying 0, 1, ... of the draft"),
            Port("margin", ("batch",), "float32", "how far the choice is ahead of the next, in tokens"),
        ),
    )
