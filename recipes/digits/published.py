"""Speculative Jacobi decoding as it was published, to compare with: drafts are drawn, and rejected by their chances.

Teng et al. 2024 (2410.01699) draw every draft anew from what the last pass gave; So et al. 2025 (2510.24211), in its
Gumbel variant, draw it with noise that a position keeps. Both accept a drafted token x with probability min(1, p(x) /
q(x)), p of this pass and q of the pass that it was drawn from, and else draw from max(p - q, 0). Written from the
papers, without a cache: it counts passes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

Output = tuple[list[int], int]
"""Tokens, and the passes that made them, the one over the prompt among them."""


@dataclass(frozen=True)
class Published:
    """How drafts are made.

    Attributes:
        window: drafted tokens. repeat: a new position repeats the token so many before it, as in `last-pass`.
        coupled: keep the noise of a position from pass to pass.
    """

    window: int
    repeat: int
    coupled: bool


@torch.inference_mode()
def outputs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], way: Published, *, count: int, seed: int
) -> list[Output]:
    """Outputs of `count` tokens; each has passes and randomness of its own."""
    vocab = model.config.vocab_size
    making = [
        _making(list(prompt), way, count, vocab, torch.Generator().manual_seed(seed * 10_000 + place))
        for place, prompt in enumerate(prompts)
    ]
    asked = {place: next(one) for place, one in enumerate(making)}
    made: dict[int, Output] = {}
    while asked:
        ids = [torch.tensor(tokens) for tokens in asked.values()]
        logits = model(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), use_cache=False).logits
        for own, (place, tokens) in zip(logits, list(asked.items()), strict=True):
            try:
                asked[place] = making[place].send(own[: len(tokens)])
            except StopIteration as end:
                made[place] = end.value
                del asked[place]
    return [made[place] for place in range(len(making))]


def _making(
    ids: list[int], way: Published, count: int, vocab: int, random: torch.Generator
) -> Generator[list[int], Tensor, Output]:
    """Yields what is to be read, is sent the logits [length, vocab], and returns the output."""
    kept = _gumbel(count + way.window, vocab, random)
    start, passes = len(ids), 0
    drafted: list[int] = []
    chances = torch.zeros(0, vocab)
    while len(ids) - start < count:
        most = min(way.window, count - (len(ids) - start) - 1) if passes else 0
        drafted, chances = _filled(ids, drafted[:most], chances[:most], most, way.repeat)
        logits = yield [*ids, *drafted]
        target, passes = logits[len(ids) - 1 :].softmax(dim=-1), passes + 1
        stands = _standing(target, chances, drafted, random)
        rest = target[stands] if stands == most else (target[stands] - chances[stands]).clamp(min=0)
        last = int(torch.multinomial(rest, 1, generator=random))
        ids += [*drafted[:stands], last]
        # The rest of the pass is what the next drafts are drawn from.
        chances, at = target[stands + 1 :], len(ids) - start
        noise = kept[at : at + len(chances)] if way.coupled else _gumbel(len(chances), vocab, random)
        drafted = (chances.log() + noise).argmax(dim=-1).tolist()
    return ids[start:], passes


def _standing(target: Tensor, chances: Tensor, drafted: list[int], random: torch.Generator) -> int:
    """How many drafted tokens are accepted."""
    if not drafted:
        return 0
    at = torch.tensor(drafted)[:, None]
    p, q = target[:-1].gather(1, at)[:, 0], chances.gather(1, at)[:, 0]
    stands = torch.rand(len(drafted), generator=random) * q < p
    return int(stands.cumprod(dim=0).sum())


def _filled(ids: list[int], drafted: list[int], chances: Tensor, most: int, repeat: int) -> tuple[list[int], Tensor]:
    """Drafts of `most` positions, with what they were drawn from: new ones are certain."""
    tokens, back, new = [*ids, *drafted], repeat if repeat <= len(ids) else 1, most - len(drafted)
    for _ in range(new):
        tokens.append(tokens[-back])
    certain = torch.nn.functional.one_hot(torch.tensor(tokens[len(tokens) - new :], dtype=torch.long), chances.shape[1])
    return tokens[len(ids) :], torch.cat([chances, certain.float()])


def _gumbel(count: int, vocab: int, random: torch.Generator) -> Tensor:
    return -torch.log(torch.empty(count, vocab).exponential_(generator=random))
