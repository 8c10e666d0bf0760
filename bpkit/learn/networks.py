"""The network of a `bpkit.learn.LearnedPolicy`, what is done to its inputs and outputs, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.graph import best, survival
from bpkit.learn.config import LearnedConfig
from bpkit.learn.gains import NEVER, always, candidates, gain_of_choosing, going_rate, over_plain, prices
from bpkit.policy import PolicyError


class Standard(nn.Module):
    """(x - mean) / scale with the figures of the training examples, which are saved with the weights."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def fit(self, x: Tensor) -> None:
        """Take mean and standard deviation of each column of x, [rows, size]."""
        self.mean.copy_(x.mean(dim=0))
        # A column that never moves says nothing, and dividing by its rounding error would make it shout.
        deviation = x.std(dim=0, correction=0)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class Forecaster(nn.Module):
    """How much of a draft will stand, by block size.

    The author's network gives a score for each block size. The tokens that this size drafts beyond the next smaller one
    stand, if all before them do, with the chance that is the score's logistic. The scores are added to those of the
    training positions' shares, so that a network begins at what is usual.

    Args:
        network: float32 [batch, inputs] -> [batch, sizes].
        inputs: their number. sizes: block sizes, ascending, without 1.
    """

    base: Tensor
    step: Tensor
    inside: Tensor

    def __init__(self, network: nn.Module, inputs: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.standard, self.network = Standard(inputs), network
        self.dropout = 0.0
        """Share of the inputs that are left out in training."""
        lengths = torch.tensor([size - 1 for size in sizes])
        tokens = torch.arange(int(lengths[-1]))
        self.register_buffer("base", torch.zeros(len(sizes)))
        # Which score each drafted token goes by, int64 [width], and the tokens of each size, [width, sizes].
        self.register_buffer("step", torch.searchsorted(lengths, tokens, right=True), persistent=False)
        self.register_buffer("inside", (tokens[:, None] < lengths).float(), persistent=False)

    def hazards(self, x: Tensor) -> Tensor:
        """Log-odds that each drafted token stands if all before it do: float32 [batch, inputs] -> [batch, width]."""
        x = self.standard(x)
        if self.training:
            x = F.dropout(x, self.dropout)
        return cast("Tensor", (self.network(x) + self.base)[:, self.step])

    def forward(self, x: Tensor) -> Tensor:
        """Tokens expected to stand: float32 [batch, inputs] -> [batch, sizes]."""
        return survival(self.hazards(x)) @ self.inside

    def fit(self, x: Tensor, stands: Tensor, counts: Tensor) -> None:
        """Take mean and deviation of the inputs, [rows, inputs], and how often tokens stand.

        Args:
            stands, counts: by token, [width]: how often it stood, and how often that was known, all before it standing.
        """
        self.standard.fit(x)
        zeros = torch.zeros(len(self.base))
        stood = zeros.index_add(0, self.step, stands) + 0.5  # a token that never fell has no log-odds
        fell = zeros.index_add(0, self.step, counts - stands) + 0.5
        self.base.copy_((stood / fell).log())


class WorthOfASecond(nn.Module):
    """What a second is worth in tokens, and the place of the best fixed size, from what steps cost.

    Args:
        facts: with `yields`. columns: places of the usable block sizes among those of training.
        rate: as in `bpkit.learn.LearnedConfig`.
    """

    def __init__(self, facts: dict[str, Any], columns: Sequence[int], rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("yields", torch.tensor([1.0, *(facts["yields"][column] for column in columns)]))

    def forward(self, typical_step_seconds: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [1 + sizes] -> rho, one number, and int64 [1]."""
        rho, floor = going_rate(self.yields, typical_step_seconds, self.rate)
        return rho, floor


class BestSize(nn.Module):
    """A forecaster and `bpkit.learn.gains.Gains` as one network: features and costs in, a block size out.

    Args:
        forecaster: float32 [batch, inputs] -> tokens expected to stand, [batch, sizes of training].
        facts, columns, config: as in `Gains`.
    """

    def __init__(
        self, forecaster: nn.Module, facts: dict[str, Any], columns: Sequence[int], config: LearnedConfig
    ) -> None:
        super().__init__()
        self.forecaster, self.margin, self.decision = forecaster, config.margin, config.decision
        self.worth = WorthOfASecond(facts, columns, config.rate)
        self.register_buffer("columns", torch.tensor(columns))
        self.register_buffer("outlook", torch.tensor(facts["outlook"])[:, columns])
        self.register_buffer("sizes", torch.tensor([1, *(facts["block_sizes"][column] for column in columns)]))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, `step_seconds` [batch, 1 + sizes] and `typical_step_seconds` [1 + sizes].

        Returns:
            block_size int64 [batch], gains float32 [batch, 1 + sizes] in tokens, margin float32 [batch].
        """
        *features, step, typical = inputs
        tokens = self.forecaster(joined(features))[:, cast("Tensor", self.columns)]
        rho, floor = self.worth(typical)
        free = always(torch, len(typical) - 1, floor)
        scores = candidates(torch, over_plain(torch, tokens, prices(step, rho)), floor, free, self.margin)
        expected = gain_of_choosing(torch, over_plain(torch, self.outlook, prices(typical[None], rho)), floor)
        fixed = torch.where(torch.arange(len(typical)) == floor, 1.0, NEVER)
        scores = torch.where(expected > rho * self.decision, scores, fixed.expand_as(scores))
        chosen, margin = best(scores)
        return cast("Tensor", self.sizes)[chosen], scores, margin


def joined(features: Sequence[Tensor]) -> Tensor:
    """One float32 [batch, inputs] of features [batch, ...]."""
    flat = [value[:, None] if value.ndim == 1 else value.flatten(1) for value in features]
    return torch.cat([value.float() for value in flat], dim=1)


def checked_network(make: Callable[[int, int], nn.Module], inputs: int, outputs: int, owner: str) -> nn.Module:
    """The network that an author's method makes, after a try.

    Raises:
        PolicyError: it is no module, has no weights, does not run, or gives another shape.
    """
    where = f"{owner}.network({inputs}, {outputs})"
    try:
        network = make(inputs, outputs)
    except Exception as error:  # the author's code may fail in any way
        raise PolicyError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise PolicyError(f"{where} must return a torch.nn.Module, not a {type(network).__name__}")
    training = network.training
    try:
        with torch.no_grad():
            given = network.eval().float()(torch.zeros(2, inputs))
    except Exception as error:
        raise PolicyError(f"{where} cannot take float32 [2, {inputs}]: {type(error).__name__}: {error}") from error
    network.train(training)
    shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if shape != [2, outputs]:
        raise PolicyError(
            f"{where} gave {shape} for [2, {inputs}]: it must give [batch, {outputs}], a score for each block size"
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise PolicyError(f"{where} has no weights to train: use layers with parameters, such as nn.Linear")
    return network
