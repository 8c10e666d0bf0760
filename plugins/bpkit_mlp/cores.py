"""The perceptrons as networks that decide by themselves, for export."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bpkit.export.core import Core, Port
from bpkit.export.graph import best, count
from bpkit_mlp.networks import ResidualMLP, Standard

MARGIN = Port("margin", ("batch",), "float32", "how far the decision is from the next, in units of the scores")


class ChoiceCore(nn.Module):
    """The block size with the largest score."""

    def __init__(self, normalisation: nn.Module, mlp: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.normalisation, self.mlp = normalisation, mlp
        self.register_buffer("sizes", torch.tensor(sizes))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs: float32 [batch, inputs]. Returns block_size int64 [batch], scores [batch, sizes], margin [batch]."""
        scores = self.mlp(self.normalisation(inputs))
        place, margin = best(scores)
        return cast("Tensor", self.sizes)[place], scores, margin


class LengthCore(nn.Module):
    """The block size that drafts what the network forecasts to be accepted.

    Args:
        block_sizes: by draft length, int64 [largest + 1].
    """

    def __init__(self, standard: nn.Module | None, mlp: ResidualMLP, block_sizes: Tensor) -> None:
        super().__init__()
        self.standard, self.mlp = standard, mlp
        self.largest = len(block_sizes) - 1
        self.register_buffer("block_sizes", block_sizes)

    def forward(self, anchor_embedding: Tensor, last_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns block_size and forecast, int64 [batch]; length before rounding and margin, float32 [batch]."""
        inputs = torch.cat([anchor_embedding, last_hidden], dim=1)
        if self.standard is not None:
            inputs = self.standard(inputs)
        length = self.mlp(inputs)[:, 0]
        forecast = count(length.round()[:, None] > torch.arange(self.largest))  # rounded, and kept within 0 .. largest
        return cast("Tensor", self.block_sizes)[forecast], forecast, length, _to_the_next_half(length, self.largest)


class WholeCore(LengthCore):
    """As `LengthCore`, but drafts one size throughout; the forecast is for later."""

    def __init__(self, standard: nn.Module | None, mlp: ResidualMLP, block_sizes: Tensor, whole: int) -> None:
        super().__init__(standard, mlp, block_sizes)
        self.whole = whole

    def forward(self, anchor_embedding: Tensor, last_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, forecast, length, margin = super().forward(anchor_embedding, last_hidden)
        return torch.full_like(forecast, self.whole), forecast, length, margin


class TrustCore(nn.Module):
    """How much of a draft to verify: as far as its probabilities hold, or the forecast."""

    def __init__(self, threshold: float, *, longer: bool) -> None:
        super().__init__()
        self.threshold, self.longer = threshold, longer

    def forward(self, draft_probability: Tensor, draft_length: Tensor, forecast: Tensor) -> tuple[Tensor, ...]:
        """Returns verify_length int64 [batch], trust float32 [batch, width], margin float32 [batch]."""
        trust = running_product(draft_probability)
        place = torch.arange(1, trust.shape[1] + 1)
        # Probabilities only fall along a draft, so that what is trusted is its beginning.
        trusted = torch.minimum(count(trust >= self.threshold), draft_length)
        chosen = torch.minimum(torch.maximum(trusted, forecast), draft_length) if self.longer else None
        length = chosen if chosen is not None else torch.minimum(trusted, forecast)
        inside = place <= draft_length[:, None]
        margin = torch.where(inside, (trust - self.threshold).abs(), 1.0).amin(dim=1)
        return length, trust, margin


def running_product(probability: Tensor) -> Tensor:
    """Product of a row up to each place, float32 [batch, width]; ONNX has sums only."""
    return probability.clamp(min=1e-30).log().cumsum(dim=1).exp()


def _to_the_next_half(length: Tensor, largest: int) -> Tensor:
    """Distance to where rounding and clipping would give another length: float32 [batch]."""
    # Beyond the ends nothing changes any more.
    edges = torch.arange(largest) + 0.5
    return (length[:, None] - edges).abs().amin(dim=1)


def choice_core(policy: ChoiceCore, feature: str, inputs: int) -> Core:
    """Of a choice after prefill."""
    what = "raw target logits after" if feature == "prefill_logits" else "final-norm hidden state of"
    sizes = len(cast("Tensor", policy.sizes))
    return Core(
        "begin",
        policy,
        inputs=(Port(feature, ("batch", inputs), "float32", f"{what} the last prompt token"),),
        outputs=(
            Port("block_size", ("batch",), "int64", "positions to draft at every step, anchor included"),
            Port("scores", ("batch", sizes), "float32", "of each block size"),
            MARGIN,
        ),
    )


def length_core(core: LengthCore, hidden: int) -> Core:
    """Of a forecast before each draft."""
    return Core(
        "select",
        core,
        inputs=(
            Port("anchor_embedding", ("batch", hidden), "float32", "the target's embedding of the anchor"),
            Port("last_hidden", ("batch", hidden), "float32", "final-norm hidden state that predicted the anchor"),
        ),
        outputs=(
            Port("block_size", ("batch",), "int64", "positions to draft, anchor included; 1 means no draft"),
            Port("forecast", ("batch",), "int64", "drafted tokens that are expected to be accepted"),
            Port("length", ("batch",), "float32", "the same before rounding and clipping"),
            MARGIN,
        ),
    )


def trust_core(core: TrustCore) -> Core:
    """Of what is verified after each draft."""
    return Core(
        "truncate",
        core,
        inputs=(
            Port("draft_probability", ("batch", "width"), "float32", "the drafter's probability of each drafted token"),
            Port("draft_length", ("batch",), "int64", "drafted tokens"),
            Port("forecast", ("batch",), "int64", "of the last call of select.onnx"),
        ),
        outputs=(
            Port("verify_length", ("batch",), "int64", "drafted tokens to verify"),
            Port("trust", ("batch", "width"), "float32", "product of the probabilities so far"),
            MARGIN,
        ),
    )


def standard_of(networks: dict[str, nn.Module]) -> Standard | None:
    """The normalisation, if the policy has one."""
    found = networks.get("standard")
    assert isinstance(found, Standard | None)
    return found
