"""`bpkit.learn.gains.Gains` as a graph, for export: the size that gains most at the going speed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bpkit.export.core import Port
from bpkit.export.graph import best, largest

CURVE = "seconds of a step without a draft, then of each block size, at this row's context length"
TYPICAL = "the same at a typical context length; it sets what a second is worth"
NEVER = -1e9
"""Score of what must not be chosen; finite, because a score that is not would be taken for a fault."""


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


class GainsCore(nn.Module):
    """Base of cores that decide from forecast tokens and cost curves; the best fixed size where choosing does not pay.

    A subclass calls `weigh` at the end of its `__init__`; its `forward` asks `going` first and returns `decide`.
    """

    def weigh(self, facts: dict[str, Any], columns: list[int], config: Any) -> None:
        """Take what decides beside forecasts.

        Args:
            facts: as in `bpkit.learn.gains.Gains`. columns: places of the usable block sizes among those of training.
            config: with `rate`, `margin` and `decision`.
        """
        sizes = torch.tensor([facts["block_sizes"][column] for column in columns])
        self.going = Going(facts, columns, config.rate)
        self.margin, self.decision = config.margin, config.decision
        self.register_buffer("outlook", torch.tensor(facts["outlook"])[:, columns])
        self.register_buffer("sizes", torch.cat([torch.ones(1, dtype=torch.int64), sizes]))

    def decide(self, gains: Tensor, typical: Tensor, rho: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decision of each row.

        Args:
            gains: of `over_plain`, float32 [batch, 1 + sizes].
            typical: seconds of steps at a typical context length, float32 [1 + sizes].
            rho, floor: what `going` says of them.

        Returns:
            block_size int64 [batch], gains float32 [batch, 1 + sizes] in tokens, margin float32 [batch].
        """
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


def over_plain(tokens: Tensor, seconds: Tensor, rho: Tensor) -> Tensor:
    """Gain over a step without a draft: tokens [rows, sizes] expected to stand, seconds [rows, 1 + sizes]."""
    gains = tokens - rho * (seconds[:, 1:] - seconds[:, :1])
    return torch.cat([torch.zeros_like(gains[:, :1]), gains], dim=1)


def cost_ports(sizes: int) -> tuple[Port, Port]:
    """The inputs `step_seconds` and `typical_step_seconds`, for so many block sizes, 1 included."""
    return (
        Port("step_seconds", ("batch", sizes), "float32", CURVE),
        Port("typical_step_seconds", (sizes,), "float32", TYPICAL),
    )


def gain_ports(sizes: int) -> tuple[Port, Port, Port]:
    """What `GainsCore.decide` returns."""
    return (
        Port("block_size", ("batch",), "int64", "positions to draft, anchor included; 1 means no draft"),
        Port("gains", ("batch", sizes), "float32", "tokens that each block size gains over no draft; 1 first"),
        Port("margin", ("batch",), "float32", "how far the choice is ahead of the next, in tokens"),
    )
