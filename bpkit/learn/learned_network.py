"""The author's network of a `bpkit.learn.learned.LearnedPolicy`, with what is done to its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.graph import survival
from bpkit.learn.standard import Standard
from bpkit.policy import PolicyError


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
