"""From the drafter's logits at many positions at once to drafted tokens and what a trace keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bpkit.decode.sampling import Processors
from bpkit.trace.collect.pieces import Positions, pieces, positions_at_once


@dataclass(frozen=True)
class Drafted:
    """Of each row: the drafted token int64 [rows], its probability, the entropy of the drafter's distribution in nats
    and, for sampled traces, the chance that target and drafter agree: float32 [rows].
    """

    tokens: Tensor
    probability: Tensor
    entropy: Tensor
    match_probability: Tensor | None

    def rearranged(self, places: int) -> Drafted:
        """From all drafts' first place, then their second, ... to draft after draft."""

        def turned(values: Tensor) -> Tensor:
            return values.view(places, -1).T.flatten()

        match = self.match_probability
        return Drafted(
            turned(self.tokens),
            turned(self.probability),
            turned(self.entropy),
            None if match is None else turned(match),
        )

    @classmethod
    def joined(cls, parts: list[Drafted]) -> Drafted:
        """Rows after rows."""
        matches = [p.match_probability for p in parts if p.match_probability is not None]
        return cls(
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.probability for p in parts]),
            torch.cat([p.entropy for p in parts]),
            torch.cat(matches) if matches else None,
        )


@dataclass(frozen=True)
class DraftReader:
    """Draws drafted tokens as the live decoder would, and measures the distributions they come from.

    Attributes:
        vocab_size: of the target.
        noise: Gumbel noise of output positions 0, 1, ...: float32 [positions, vocab], or None for greedy drafts.
        target_probabilities: the target's processed distribution at each output position of the finished output,
            float32 [output length, vocab], or None for greedy drafts.
    """

    processors: Processors
    vocab_size: int
    noise: Tensor | Positions | None
    target_probabilities: Tensor | Positions | None

    def read(self, logits: Callable[[slice], Tensor], index: Tensor, prefix: Callable[[int], Tensor]) -> Drafted:
        """Draw one token for each row.

        Args:
            logits: of some of the rows, [rows, vocab].
            index: output position that each row stands for, int64 [rows].
            prefix: of row i, the tokens before the one to draw, int64 [1, length]; asked for only where a processor
                looks at them.
        """
        parts = [self._read(logits(piece), index[piece], piece.start, prefix) for piece in self.pieces(len(index))]
        return Drafted.joined(parts)

    def pieces(self, count: int) -> Iterator[slice]:
        """Slices of `count` rows, of as many as may be held at the same time."""
        return pieces(count, positions_at_once(self.vocab_size))

    def _read(self, logits: Tensor, index: Tensor, first: int, prefix: Callable[[int], Tensor]) -> Drafted:
        scores = self._processed(logits, first, prefix)
        tokens = (scores if self.noise is None else scores + self.noise[index]).argmax(dim=-1)
        return self.measure(scores, tokens, index)

    def measure(self, scores: Tensor, tokens: Tensor, index: Tensor) -> Drafted:
        """What a trace keeps of tokens that were drawn already.

        Args:
            scores: that they were drawn from, after the logits processors, float32 [rows, vocab].
            tokens, index: the tokens and the output positions that they stand for, int64 [rows].
        """
        log_p = scores.log_softmax(dim=-1)
        probabilities = log_p.exp()
        # Tokens that a processor ruled out have log p = -inf and no share in the entropy.
        entropy = -(probabilities * log_p.clamp(min=-1e30)).sum(dim=-1)
        match = None
        if self.target_probabilities is not None:
            match = self._matches(probabilities, index)
        return Drafted(tokens, probabilities.gather(-1, tokens[:, None])[:, 0], entropy, match)

    def _processed(self, logits: Tensor, first: int, prefix: Callable[[int], Tensor]) -> Tensor:
        """Scores after the logits processors, float32 [rows, vocab]."""
        logits, processors = logits.float(), self.processors.processors
        if not processors:
            return logits
        if self.processors.prefix_free:
            # They look at the scores only; any prefix will do.
            scores: Tensor = processors(logits.new_zeros((len(logits), 1), dtype=torch.long), logits)
            return scores
        rows = [processors(prefix(first + i), logits[i : i + 1].clone()) for i in range(len(logits))]
        return torch.cat(rows)

    def _matches(self, proposal: Tensor, index: Tensor) -> Tensor:
        """`match_probability` of each row against the target's distribution; NaN beyond the output."""
        assert self.target_probabilities is not None
        inside = index < len(self.target_probabilities)
        found = proposal.new_full((len(proposal),), float("nan"))
        if not bool(inside.any()):
            return found
        found[inside] = match_probability(self.target_probabilities[index[inside]], proposal[inside])
        return found


def match_probability(p: Tensor, q: Tensor) -> Tensor:
    """Chance that two Gumbel-max draws with the same noise, one from p and one from q, are the same token.

    Both are token x with probability 1 / sum_y max(p_y / p_x, q_y / q_x) (Daliri, Musco & Suresh 2024, "Coupling
    without communication and drafter-invariant speculative decoding"). With tokens sorted by r = p / q the maximum is
    the first term where r_y >= r_x and the second where not, so that sums from either end give all of them at once.

    Args:
        p, q: distributions, [rows, vocab].

    Returns:
        float32 [rows].

    >>> match_probability(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]]))
    tensor([1.])
    """
    p, q = p.double(), q.double()
    order = _falling((p / q.clamp(min=1e-30)).float())
    p, q = p.gather(-1, order), q.gather(-1, order)
    above = p.cumsum(dim=-1)  # sum of p over tokens with r_y >= r_x, the token itself included
    below = q.flip(-1).cumsum(dim=-1).flip(-1) - q
    # 1 / (above / p + below / q), written so that a token that one side never draws counts nothing.
    both = p * q / (above * q + below * p).clamp(min=1e-300)
    return both.sum(dim=-1).clamp(max=1.0).float()


def _falling(values: Tensor) -> Tensor:
    """Indices that sort each row in falling order. On a CPU numpy sorts several times faster than torch."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(-values.numpy(), axis=-1))
    return values.argsort(dim=-1, descending=True)
