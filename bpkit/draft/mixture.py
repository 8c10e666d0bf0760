"""Mixtures of several distributions: how a token is drawn from one, and whose word counts how much in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bpkit.decode.sampling import Draw
from bpkit.decode.text import to_device

STEPS = 10
"""Weights are multiples of one tenth."""
UNLIKELY = 100.0
"""Nats that a token counts at most which a mixture rules out."""


def mixed(members: Tensor, log_weights: Tensor) -> Tensor:
    """Log of the weighted mean of distributions.

    Args:
        members: log-probabilities, [rows, positions, members, vocab]. log_weights: [..., members], -inf for none.

    Returns:
        [rows, positions, vocab].
    """
    return (members + log_weights[..., None]).logsumexp(dim=2)


class MixedDraw(Draw):
    """Draws from the mixture of several models' distributions, each processed as if it drafted alone.

    It is called with logits [rows, count, members, vocab], and the scores that it returns are the log of the mixture.

    Args:
        draw: that nothing was drawn with. weights: of the members, [rows, members], each row's sum 1.
        keep: whether to keep what `MixtureWeights.learn` asks for.
    """

    def __init__(self, draw: Draw, weights: Tensor, *, keep: bool) -> None:
        super().__init__(draw.samplers)
        self.log_weights, self.keep = weights.log()[:, None], keep
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Members' log-probabilities [rows, positions, members, vocab] and the noise [rows, positions, vocab]."""
        members, noise = (torch.cat(parts, dim=1) for parts in zip(*self._kept, strict=True))
        return members, noise

    def _draw(self, logits: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        processed = [self.samplers.scores(own, self.tokens, self.tokens[:, :0], counts) for own in logits.unbind(dim=2)]
        members = torch.stack(processed, dim=2).log_softmax(dim=-1)
        scores = mixed(members, self.log_weights)
        noise = self.samplers.noisy(torch.zeros_like(scores), self.position, counts)
        if self.keep:
            self._kept.append((members, noise))
        tokens = (scores + noise).argmax(dim=-1)
        self.position = [at + logits.shape[1] for at in self.position]
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        return tokens, scores


class Undrawn(Draw):
    """Hands logits back instead of drawing: for a model whose tokens others decide."""

    def __call__(self, logits: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device), logits

    def row(self, place: int) -> Draw:
        return Undrawn(super().row(place).samplers)


class MixtureWeights:
    """The members' weights of each row: the point of a grid whose mixture agreed most often with the target so far.

    What counts are the positions of a draft up to the first wrong token, with the noise that they were drawn with. Of
    points that agreed as often, the one whose mixture gave the target's tokens the highest likelihood is taken: the
    expected value of its negative log is the KL divergence from the target's distribution, up to a constant. Nothing is
    read from the device.

    Attributes:
        now: [rows, members]; equal until something was learned.
    """

    def __init__(self, rows: int, members: int, device: torch.device) -> None:
        self.now = torch.full((rows, members), 1 / members, device=device)
        self.grid = torch.tensor(list(_shares(STEPS, members)), device=device) / STEPS
        self.agreed = torch.zeros(rows, len(self.grid), device=device)
        self.surprise = torch.zeros(rows, len(self.grid), device=device)
        """Sum of -log q of the target's tokens, in nats."""

    def learn(self, draw: MixedDraw, tokens: Tensor, counts: Sequence[int]) -> None:
        """Take in the target's tokens, int64 [rows, width], at the first `counts[i]` positions that were drafted."""
        if max(counts) == 0:
            return
        members, noise = (kept[:, : max(counts)] for kept in draw.kept)
        tokens = tokens[:, : max(counts)]
        count = to_device(counts, tokens.device)[:, None]
        beyond = torch.arange(tokens.shape[1], device=tokens.device) >= count
        for place, weights in enumerate(self.grid.log()):
            scores = mixed(members, weights)
            same = (scores + noise).argmax(dim=-1) == tokens
            surprise = -scores.gather(-1, tokens[..., None])[..., 0].clamp(min=-UNLIKELY)
            self.agreed[:, place] += same.masked_fill(beyond, False).sum(dim=1)
            self.surprise[:, place] += surprise.masked_fill(beyond, 0).sum(dim=1)
        worse = self.agreed < self.agreed.amax(dim=1, keepdim=True)
        best = self.grid[self.surprise.masked_fill(worse, torch.inf).argmin(dim=1)]
        self.now = torch.where(count > 0, best, self.now)

    def keep(self, rows: Sequence[int]) -> None:
        at = to_device(rows, self.now.device)
        self.now, self.agreed, self.surprise = self.now[at], self.agreed[at], self.surprise[at]

    def join(self, other: MixtureWeights) -> None:
        self.now = torch.cat([self.now, other.now])
        self.agreed = torch.cat([self.agreed, other.agreed])
        self.surprise = torch.cat([self.surprise, other.surprise])


class FixedWeights:
    """The same weights for all rows, which learn nothing."""

    def __init__(self, rows: int, weights: Sequence[float], device: torch.device) -> None:
        given = torch.tensor(weights, device=device)
        self.now = (given / given.sum()).repeat(rows, 1)

    def keep(self, rows: Sequence[int]) -> None:
        self.now = self.now[: len(rows)]

    def join(self, other: FixedWeights) -> None:
        self.now = torch.cat([self.now, other.now])


def _shares(total: int, members: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out a total.

    >>> list(_shares(2, 2))
    [(0, 2), (1, 1), (2, 0)]
    """
    if members == 1:
        yield (total,)
        return
    for first in range(total + 1):
        yield from ((first, *rest) for rest in _shares(total - first, members - 1))
