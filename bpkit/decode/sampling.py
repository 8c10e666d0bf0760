"""From logits to tokens: transformers' logits processors, then arg-max with or without noise."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bpkit.decode.noise import GumbelNoise
from bpkit.decode.rollback import PREFIX_FREE, Rollback
from bpkit.decode.text import RowText
from bpkit.decode.trees import Tree

SOFTENING = 1.25
"""Divides scores and noise before chances are taken of them. On validation prompts the nodes of the largest chances
accepted more with 1.25 than with 1, 1% to 3% on both models that bpkit has drafters for, and as much as with 1.5."""


class Processors:
    """Applies a `LogitsProcessorList` to several positions, each with the prefix it would have in plain decoding.

    Args:
        ends: end tokens, after which plain decoding calls no processor.
        prompt_length: where the output begins.

    Attributes:
        failure: what a processor raised; the row goes on with raw scores until it is taken out.

    Raises:
        ValueError: a processor keeps state that cannot be rolled back; see `bpkit.decode.rollback`.
    """

    def __init__(
        self, processors: LogitsProcessorList, *, ends: Set[int] = frozenset(), prompt_length: int = 0
    ) -> None:
        self.processors, self.ends, self.prompt_length = processors, ends, prompt_length
        self.prefix_free = all(type(p) in PREFIX_FREE for p in processors)
        self.rollback = Rollback(processors)
        self.failure: Exception | None = None

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


class Sampler:
    """How one row gets from logits to tokens: its processors and its noise.

    Attributes:
        noise: None for greedy decoding.
    """

    def __init__(self, text: RowText, processors: Processors, noise: GumbelNoise | None) -> None:
        self.text, self.processors, self.noise = text, processors, noise

    def scores(self, logits: Tensor, drawn: Tensor, tokens: Tensor) -> Tensor:
        """Processed scores of the positions after the text and `drawn` tokens: as of `Processors`, of one row."""
        if self.processors.failure is None:
            try:
                if self.processors.prefix_free:
                    return self.processors(logits, self.text.prompt, tokens)
                return self.processors(logits, torch.cat([self.text.ids, drawn], dim=1), tokens)
            except Exception as error:
                self.processors.failure = error
        return logits.float()


class Samplers:
    """The samplers of rows that run together. Rows whose processors are alike and look at scores only share a call."""

    def __init__(self, rows: Sequence[Sampler]) -> None:
        self.rows = list(rows)
        first = self.rows[0].processors
        self.alike = first.prefix_free and all(
            row.processors is first or alike(row.processors, first) for row in self.rows[1:]
        )
        self.greedy = all(row.noise is None for row in self.rows)

    def scores(self, logits: Tensor, drawn: Tensor, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Processed scores of several positions of each row.

        Args:
            logits: [rows, positions, vocab].
            drawn: tokens assumed between the text and the first position, int64 [rows, count].
            tokens: tokens assumed at the positions, int64 [rows, positions - 1 or more].
            counts: positions of each row that count; scores of the others mean nothing.

        Returns:
            float32 [rows, positions, vocab].
        """
        if len(self.rows) == 1:
            return self.rows[0].scores(logits, drawn, tokens)
        if self.alike:
            flat = self.rows[0].scores(logits.flatten(0, 1)[None], drawn[:1], tokens[:1])
            if self.rows[0].processors.failure is None:
                return flat.view(logits.shape)
            self.rows[0].processors.failure = None  # which row is at fault, each says by itself
        scores = logits.float() if logits.dtype != torch.float32 else logits.clone()
        for place, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            if count:
                own = slice(place, place + 1)
                scores[place, :count] = row.scores(logits[own, :count], drawn[own], tokens[own])[0]
        return scores

    @property
    def position(self) -> list[int]:
        """Output index of each row's next token."""
        return [row.text.position for row in self.rows]

    def forget_before(self, position: Sequence[int]) -> None:
        """Free the noise of positions that are decided."""
        for row, at in zip(self.rows, position, strict=True):
            if row.noise is not None:
                row.noise.forget_before(at)

    def noisy(self, scores: Tensor, position: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Scores plus noise, the quantity whose arg-max decides: float32 [rows, positions, vocab].

        Args:
            position: output index of the first position of each row.
        """
        if self.greedy:
            return scores
        if len(self.rows) == 1:
            return noisy(scores, self.rows[0].noise, position[0])
        scores = scores.clone()
        for place, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            if row.noise is not None and count:
                scores[place, :count] += row.noise.at(position[place], count)
        return scores

    def noisy_at(self, scores: Tensor, position: Sequence[int], tree: Tree) -> Tensor:
        """The same for columns of trees, each with the noise of its depth after output index `position`."""
        if self.greedy:
            return scores
        scores = scores.clone()
        for place, row in enumerate(self.rows):
            if row.noise is not None:
                scores[place] += row.noise.at(position[place], tree.deepest + 1)[tree.depth[place]]
        return scores


def alike(one: Processors, other: Processors) -> bool:
    """Whether two lists of processors that look at scores only do the same."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    return (
        other.prefix_free
        and len(one.processors) == len(other.processors)
        and all(
            type(a) is type(b)
            and vars(a).keys() == vars(b).keys()
            and all(same(vars(a)[n], vars(b)[n]) for n in vars(a))
            for a, b in zip(one.processors, other.processors, strict=True)
        )
    )


def noisy(scores: Tensor, noise: GumbelNoise | None, position: int) -> Tensor:
    """Scores of one row plus its noise from output position `position` on: float32 [1, positions, vocab]."""
    return scores if noise is None else scores + noise.at(position, scores.shape[1])


def chances(noisy: Tensor, tokens: Tensor, sampled: Sequence[bool]) -> Tensor:
    """Chances that candidates are the target's choice, as the drafter can tell: their shares of exp(score + noise).

    The target has the same noise and other scores, so that where there is noise both are divided by `SOFTENING`.

    Args:
        noisy: scores plus noise, float32 [rows, ..., vocab]. tokens: candidates, int64 [rows, ..., count].
        sampled: rows that have noise.

    Returns:
        float32 [rows, ..., count].
    """
    if any(sampled):
        by = torch.tensor([SOFTENING if noise else 1.0 for noise in sampled])
        noisy = noisy / by.to(noisy.device, non_blocking=True).view(-1, *[1] * (noisy.ndim - 1))
    return noisy.softmax(dim=-1).gather(-1, tokens)


class Draw:
    """Draws drafted tokens, the way the target will choose: same processors, noise of the same positions.

    Each row's first call is about the output position after its anchor.
    """

    def __init__(self, samplers: Samplers) -> None:
        self.samplers = samplers
        self.position = samplers.position
        self.tokens = samplers.rows[0].text.prompt.new_empty((len(samplers.rows), 0))
        """Drawn so far, int64 [rows, count]."""

    def __call__(self, logits: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Draw the next positions.

        Args:
            logits: [rows, count, vocab].
            counts: positions of each row that count, by default all; what is drawn for the others means nothing.

        Returns:
            tokens int64 [rows, count] and processed scores float32 [rows, count, vocab].
        """
        width = logits.shape[1]
        counts = [width] * logits.shape[0] if counts is None else counts
        if width == 1 or all(row.processors.prefix_free for row in self.samplers.rows):
            return self._draw(logits, counts)
        parts = [self._draw(logits[:, i : i + 1], [int(count > i) for count in counts]) for i in range(width)]
        return torch.cat([t for t, _ in parts], dim=1), torch.cat([s for _, s in parts], dim=1)

    def candidates(self, logits: Tensor, counts: Sequence[int], most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best tokens of the next positions; each position as if those before had their best.

        Args:
            most: tokens of each position. logits, counts: as of a call.

        Returns:
            tokens int64 [rows, count, most], the best first, which is what a call draws; their `chances`, float32
            [rows, count, most]; and processed scores float32 [rows, count, vocab].
        """
        width = logits.shape[1]
        if width <= 1 or all(row.processors.prefix_free for row in self.samplers.rows):
            return self._best(logits, counts, most)
        each = [self._best(logits[:, i : i + 1], [int(count > i) for count in counts], most) for i in range(width)]
        tokens, chances, scores = (torch.cat(parts, dim=1) for parts in zip(*each, strict=True))
        return tokens, chances, scores

    def row(self, place: int) -> Draw:
        """That of one row, which has drawn nothing yet."""
        return Draw(Samplers([self.samplers.rows[place]]))

    def _draw(self, logits: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        scores, noisy = self._scored(logits, counts)
        tokens = noisy.argmax(dim=-1)
        self._go_on(tokens)
        return tokens, scores

    def _best(self, logits: Tensor, counts: Sequence[int], most: int) -> tuple[Tensor, Tensor, Tensor]:
        scores, noisy = self._scored(logits, counts)
        tokens = noisy.topk(min(most, noisy.shape[-1]), dim=-1).indices
        self._go_on(tokens[..., 0])
        return tokens, chances(noisy, tokens, [row.noise is not None for row in self.samplers.rows]), scores

    def _scored(self, logits: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        scores = self.samplers.scores(logits, self.tokens, self.tokens[:, :0], counts)
        return scores, self.samplers.noisy(scores, self.position, counts)

    def _go_on(self, tokens: Tensor) -> None:
        self.position = [at + tokens.shape[1] for at in self.position]
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
