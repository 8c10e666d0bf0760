"""The perceptron that both methods use, what may stand before it, and what is decided by it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.graph import best, clearance, count, running_product
from bpkit.learn.networks import Standard


class ResidualMLP(nn.Module):
    """Input -> width, then width -> width with a residual connection, then a linear output.

    Each layer is linear, ReLU, dropout; what entered a layer is added after them, from the second layer on.

    Args:
        depth: layers before the output: 2 in BlockPilot, 3 in AdaEAGLE's LDLP.
    """

    def __init__(self, inputs: int, width: int, outputs: int, *, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = [inputs] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.output = nn.Linear(width, outputs)
        self.dropout = dropout
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs] -> [batch, outputs]."""
        for place, layer in enumerate(self.layers):
            passed = F.dropout(F.relu(layer(x)), self.dropout, self.training)
            x = passed + x if place > 0 else passed
        scores: Tensor = self.output(x)
        return scores


def normalisation(kind: str, size: int) -> nn.Module:
    """What stands before the perceptron; `none` and `standard` are affine, so that they fold into a linear head."""
    if kind == "standard":
        return Standard(size)
    if kind == "layer":
        return nn.LayerNorm(size, elementwise_affine=False)
    return nn.Softmax(dim=-1) if kind == "softmax" else nn.Identity()


class Choice(nn.Module):
    """The block size with the largest score.

    Args:
        network: float32 [batch, inputs] -> [batch, sizes].
    """

    def __init__(self, network: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("sizes", torch.tensor(sizes))

    def size_at(self, place: Tensor) -> Tensor:
        """The block sizes at these places: int64 [batch]."""
        return cast("Tensor", self.sizes)[place]

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs: float32 [batch, inputs]. Returns block_size int64 [batch], scores [batch, sizes], margin [batch]."""
        scores = self.network(inputs)
        place, margin = best(scores)
        return self.size_at(place), scores, margin


class Length(nn.Module):
    """The block size that drafts what the network forecasts to be accepted.

    Args:
        network: float32 [batch, inputs] -> [batch, 1].
        block_sizes: by draft length, int64 [largest + 1].
        whole: block size of every draft, where the forecast is for later.
    """

    def __init__(self, network: nn.Module, block_sizes: Tensor, whole: int | None = None) -> None:
        super().__init__()
        self.network, self.whole = network, whole
        self.largest = len(block_sizes) - 1
        self.register_buffer("block_sizes", block_sizes)

    def forecast(self, length: Tensor) -> Tensor:
        """Rounded, and kept within 0 .. largest: int64 [batch]."""
        return count(length.round()[:, None] > torch.arange(self.largest))

    def size_for(self, forecast: Tensor) -> Tensor:
        """The smallest usable block size that drafts so many tokens, if there is a choice: int64 [batch]."""
        if self.whole is not None:
            return torch.full_like(forecast, self.whole)
        return cast("Tensor", self.block_sizes)[forecast]

    def forward(self, anchor_embedding: Tensor, last_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns block_size and forecast, int64 [batch]; length before rounding and margin, float32 [batch]."""
        length = self.network(torch.cat([anchor_embedding, last_hidden], dim=1))[:, 0]
        forecast = self.forecast(length)
        # Another length begins at each half; beyond the ends nothing changes any more.
        margin = (length[:, None] - (torch.arange(self.largest) + 0.5)).abs().amin(dim=1)
        return self.size_for(forecast), forecast, length, margin


class Trust(nn.Module):
    """How much of a draft to verify: as far as its probabilities hold, or the forecast, whichever is longer or not."""

    def __init__(self, threshold: float, *, longer: bool) -> None:
        super().__init__()
        self.threshold, self.longer = threshold, longer

    def trust(self, draft_probability: Tensor) -> Tensor:
        """Product of the probabilities so far: float32 [batch, width]."""
        return running_product(draft_probability.clamp(min=1e-30).log())

    def verify_length(self, trust: Tensor, draft_length: Tensor, forecast: Tensor) -> Tensor:
        """int64 [batch]."""
        # Products only fall along a draft, so that what is trusted is its beginning.
        trusted = torch.minimum(count(trust >= self.threshold), draft_length)
        if self.longer:
            return torch.minimum(torch.maximum(trusted, forecast), draft_length)
        return torch.minimum(trusted, forecast)

    def forward(self, draft_probability: Tensor, draft_length: Tensor, forecast: Tensor) -> tuple[Tensor, ...]:
        """Returns verify_length int64 [batch], trust float32 [batch, width], margin float32 [batch]."""
        trust = self.trust(draft_probability)
        margin = clearance((trust - self.threshold).abs(), draft_length)
        return self.verify_length(trust, draft_length, forecast), trust, margin
