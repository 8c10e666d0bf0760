"""`forecast` as networks that decide by themselves, for export: what `Plan` does in Python, as a graph."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bpkit.export.core import Core, Port
from bpkit.export.graph import best, largest
from bpkit_forecast.networks import After, Before

CURVE = "seconds of a step without a draft, then of each block size, at this row's context length"
NEVER = -1e9
"""Score of what must not be chosen; finite, because a score that is not would be taken for a fault."""
VERIFY = "seconds of a target pass over 1, 2, ... positions, at this row's context length"
TYPICAL = "the same at a typical context length; it sets what a second is worth"


class Going(nn.Module):
    """What a second is worth: a share of the speed of the best fixed size, and where that size stands."""

    def __init__(self, facts: dict[str, Any], columns: list[int], rate: float) -> None:
        super().__init__()
        self.register_buffer("yields", torch.tensor([1.0, *(facts["yields"][column] for column in columns)]))
        self.rate = rate

    def forward(self, typical: Tensor) -> tuple[Tensor, Tensor]:
        """typical: float32 [1 + sizes]. Returns rho in tokens per second, and the place of the best fixed size."""
        speeds = cast("Tensor", self.yields) / typical
        return self.rate * largest(speeds), speeds[1:].argmax(dim=0, keepdim=True) + 1


class SelectCore(nn.Module):
    """The size that gains most at the going speed; the best fixed size where choosing does not pay."""

    def __init__(self, before: Before, facts: dict[str, Any], columns: list[int], config: Any) -> None:
        super().__init__()
        trained = facts["block_sizes"]
        sizes = torch.tensor([trained[column] for column in columns])
        self.first, self.second, self.hazards = before.first, before.second, before.hazards
        self.going = Going(facts, columns, config.rate)
        self.margin, self.decision = config.margin, config.decision
        self.register_buffer("of_size", before.of_size.detach()[columns])
        self.register_buffer("inside", (torch.arange(1, max(trained)) < sizes[:, None]).float())
        self.register_buffer("outlook", torch.tensor(facts["outlook"])[:, columns])
        self.register_buffer("sizes", torch.cat([torch.ones(1, dtype=torch.int64), sizes]))

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
        return self._decide(over_plain(tokens, step_seconds, rho), typical_step_seconds, rho, floor)

    def _stands(self, *inputs: Tensor) -> Tensor:
        """Chances that tokens 1 .. k stand, [batch, sizes, width]."""
        x = nn.functional.silu(self.first(torch.cat(inputs, dim=1)))
        x = x + nn.functional.silu(self.second(x))
        return survival(self.hazards(x)[:, None] + cast("Tensor", self.of_size))

    def _decide(self, gains: Tensor, typical: Tensor, rho: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        asks = self._gain_of_choosing(typical, rho, floor) > rho * self.decision
        place = torch.arange(gains.shape[1])
        ahead = gains > gains.index_select(1, floor) + self.margin
        scores = torch.where(ahead | (place == floor) | (place == 0), gains, NEVER)
        scores = torch.where(asks, scores, torch.where(place == floor, 1.0, NEVER).expand_as(scores))
        chosen, margin = best(scores)
        return cast("Tensor", self.sizes)[chosen], scores, margin

    def _gain_of_choosing(self, typical: Tensor, rho: Tensor, floor: Tensor) -> Tensor:
        gains = over_plain(cast("Tensor", self.outlook), typical[None], rho)
        return (largest(gains) - gains.index_select(1, floor)[:, 0]).mean(dim=0, keepdim=True)


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


def survival(logits: Tensor) -> Tensor:
    """Chance that a token and all before it stand, from logits of hazards [..., width]."""
    # A sum of logarithms: ONNX has no running product.
    return nn.functional.logsigmoid(logits).cumsum(dim=-1).exp()


def over_plain(tokens: Tensor, seconds: Tensor, rho: Tensor) -> Tensor:
    """Gain over a step without a draft: tokens [rows, sizes] expected to stand, seconds [rows, 1 + sizes]."""
    gains = tokens - rho * (seconds[:, 1:] - seconds[:, :1])
    return torch.cat([torch.zeros_like(gains[:, :1]), gains], dim=1)


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
            Port("step_seconds", ("batch", sizes), "float32", CURVE),
            Port("typical_step_seconds", (sizes,), "float32", TYPICAL),
        ),
        outputs=(
            Port("block_size", ("batch",), "int64", "positions to draft, anchor included; 1 means no draft"),
            Port("gains", ("batch", sizes), "float32", "tokens that each block size gains over no draft; 1 first"),
            Port("margin", ("batch",), "float32", "how far the choice is ahead of the next, in tokens"),
        ),
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
