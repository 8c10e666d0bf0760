"""From logits to tokens: transformers' logits processors, then arg-max with or without noise."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bpkit.decode.noise import GumbelNoise
from bpkit.decode.rollback import PREFIX_FREE, Rollback


class Processors:
    """Applies a `LogitsProcessorList` to several positions, each with the prefix it would have in plain decoding.

    Args:
        ends: end tokens, after which plain decoding calls no processor.
        prompt_length: where the output begins.

    Raises:
        ValueError: a processor keeps state that cannot be rolled back; see `bpkit.decode.rollback`.
    """

    def __init__(
        self, processors: LogitsProcessorList, *, ends: Set[int] = frozenset(), prompt_length: int = 0
    ) -> None:
        self.processors, self.ends, self.prompt_length = processors, ends, prompt_length
        self.prefix_free = all(type(p) in PREFIX_FREE for p in processors)
        self.rollback = Rollback(processors)

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
        scores: list[Tensor] = []
        for i in range(logits.shape[1]):
            ids = torch.cat([prefix, tokens[:, :i]], dim=1)
            if self.rollback.foreign and self._cannot_stand(ids, scores[-1] if scores else None):
                # Plain decoding never asks about this prefix, and a grammar may fail on it.
                scores += logits[:, i:].unbind(dim=1)
                break
            self.rollback.enter(ids.shape[1])
            # Processors may work in place: hand each a copy.
            scores.append(self.processors(ids, logits[:, i].clone()))
            self.rollback.leave(ids.shape[1])
        self.rollback.check()
        return torch.stack(scores, dim=1)

    def _cannot_stand(self, ids: Tensor, scores: Tensor | None) -> bool:
        """Whether output ended before, or the last of `ids` [1, length] was ruled out by its `scores` [1, vocab]."""
        if not self.ends.isdisjoint(ids[0, self.prompt_length :].tolist()):
            return True
        return scores is not None and bool(scores[0, ids[0, -1]] == -torch.inf)


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
