"""From logits to tokens: transformers' logits processors, then arg-max with or without noise."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from bpkit.runtime.noise import GumbelNoise

# Processors that look at one position's scores only, so that all positions of a block can pass in one call. Matched
# by exact type: a subclass may look at the tokens.
_PREFIX_FREE = {
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
}


class Processors:
    """Applies a `LogitsProcessorList` to several positions, each with the prefix it would have in plain decoding."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        self.processors = processors
        self.prefix_free = all(type(p) in _PREFIX_FREE for p in processors)

    def __call__(self, logits: Tensor, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Scores of the positions after `prefix`.

        Args:
            logits: [1, positions, vocab].
            prefix: decided tokens, int64 [1, length].
            tokens: tokens assumed at the positions, int64 [1, positions - 1 or more].

        Returns:
            float32 [1, positions, vocab].
        """
        logits = logits.float()
        if not self.processors:
            return logits
        if self.prefix_free:
            rows: Tensor = self.processors(prefix.expand(logits.shape[1], -1), logits[0])
            return rows[None]
        scores = []
        for i in range(logits.shape[1]):
            ids = torch.cat([prefix, tokens[:, :i]], dim=1)
            # Processors may work in place: hand each a copy.
            scores.append(self.processors(ids, logits[:, i].clone()))
        return torch.stack(scores, dim=1)


def choose(scores: Tensor, noise: GumbelNoise | None, position: int) -> Tensor:
    """Arg-max of the scores plus the noise of output positions `position` onwards: int64 [1, positions]."""
    return noisy(scores, noise, position).argmax(dim=-1)


def noisy(scores: Tensor, noise: GumbelNoise | None, position: int) -> Tensor:
    """Scores plus noise, the quantity whose arg-max decides: float32 [1, positions, vocab]."""
    return scores if noise is None else scores + noise.at(position, scores.shape[1])


class Draw:
    """Draws drafted tokens, the way the target will choose: same processors, noise of the same positions.

    Args:
        position: output index of the first drafted token.
        prefix: decided tokens, int64 [1, length].
    """

    def __init__(self, processors: Processors, noise: GumbelNoise | None, position: int, prefix: Tensor) -> None:
        self.processors, self.noise, self.position, self.prefix = processors, noise, position, prefix
        self.tokens = prefix[:, :0]

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next positions.

        Args:
            logits: [1, count, vocab].

        Returns:
            tokens int64 [1, count] and processed scores float32 [1, count, vocab].
        """
        if self.processors.prefix_free or logits.shape[1] == 1:
            return self._draw(logits)
        parts = [self._draw(logits[:, i : i + 1]) for i in range(logits.shape[1])]
        return torch.cat([t for t, _ in parts], dim=1), torch.cat([s for _, s in parts], dim=1)

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        prefix = self.prefix
        if not self.processors.prefix_free:
            prefix = torch.cat([prefix, self.tokens], dim=1)
        scores = self.processors(logits, prefix, self.tokens[:, :0])
        tokens = choose(scores, self.noise, self.position)
        self.position += tokens.shape[1]
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        return tokens, scores
