"""Every draft that could have been made while an output was decided: what a tracer is given, and the table it fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bpkit.decode.sampling import Processors, chances
from bpkit.trace.collect.pieces import HeldNoise, Positions, pieces, positions_at_once

TablePart = tuple[slice, slice, slice]
"""Part of a table: rows, columns (block sizes) and places in the draft."""


@dataclass(frozen=True)
class Finished:
    """A finished output and what its drafts are traced with.

    Attributes:
        ids: prompt and output, int64 [1, length].
        prompt_length: tokens of the prompt.
        features: target features of every position but the last, [1, length - 1, layers * hidden], or None if the
            drafter has no `feature_layers`.
        block_sizes: ascending, from 2.
        processors: that drafted tokens are drawn under.
        vocab_size: of the target.
        noise: of the output positions, or None for greedy drafts.
        target_probabilities: the target's processed distribution at each output position, [vocab] each, or None for
            greedy drafts.
        keep_hidden: also keep the drafter's hidden states.
        branches: candidates of each position to keep; 1 keeps none beside the drafted token.
        trees: whether drafts are trees, of which the nodes are kept.
    """

    ids: Tensor
    prompt_length: int
    features: Tensor | None
    block_sizes: tuple[int, ...]
    processors: Processors
    vocab_size: int
    noise: HeldNoise | None = None
    target_probabilities: Positions | None = None
    keep_hidden: bool = False
    branches: int = 1
    trees: bool = False

    @property
    def rows(self) -> int:
        """Positions at which a draft may begin: output positions 1 .. output length - 1."""
        return self.ids.shape[1] - self.prompt_length - 1

    @property
    def width(self) -> int:
        """The longest draft."""
        return max(self.block_sizes) - 1

    def before(self, row: int) -> Tensor:
        """Tokens decided before the draft of a row, anchor included: int64 [1, prompt_length + row + 1]."""
        return self.ids[:, : self.prompt_length + row + 1]


class Drafts:
    """The table that a tracer fills in; places that nobody drafted stay -1 and NaN.

    Attributes:
        tokens: int64 [rows, sizes, width].
        probability: of each token, by the drafter. entropy: of the drafter's distribution, in nats. match_probability:
            the chance that target and drafter agree, for sampled traces. All float32 [rows, sizes, width].
        hidden: float32 [rows, sizes, width, drafter hidden], made when the first is put.
        candidates: of blocks with branches, int64 [rows, sizes, width, branches]; None without branches.
        candidate_chances: their chances and probabilities, as in `CandidateTable`, float32 [2, *the same*].
        parents, chances: of trees, as in `DraftTable`: int64 and float32 [rows, sizes, width]; None of others.
        match_length, match_share: of free sources, as in `DraftTable`: int64 and float64 [rows].
    """

    def __init__(self, finished: Finished) -> None:
        self.finished = finished
        shape = (finished.rows, len(finished.block_sizes), finished.width)
        self.tokens = torch.full(shape, -1)
        self.probability, self.entropy, self.match_probability = torch.full((3, *shape), float("nan"))
        self.hidden: Tensor | None = None
        self.candidates: Tensor | None = None
        self.candidate_chances: Tensor | None = None
        if finished.branches > 1:
            of_all = (*shape, min(finished.branches, finished.vocab_size))
            self.candidates = torch.full(of_all, -1)
            self.candidate_chances = torch.full((2, *of_all), float("nan"))
        self.parents = torch.full(shape, -1) if finished.trees else None
        self.chances = torch.full(shape, float("nan")) if finished.trees else None
        self.match_length: Tensor | None = None
        self.match_share: Tensor | None = None

    @property
    def draft_length(self) -> Tensor:
        """int64 [rows, sizes]"""
        return (self.tokens >= 0).sum(dim=-1)

    def draw(self, where: TablePart, score: Callable[[Tensor], Tensor], values: Tensor, hidden: Tensor | None) -> None:
        """Draw tokens as the live decoder would, the same in all columns of `where`; `hidden` as in `put`.

        `score` makes logits [count, vocab] of some of `values` [rows * places, ...], row after row. Where a processor
        looks at the tokens before, those of earlier places are there, and `where` has one place.
        """
        index, noise, most = self._index(where), self.finished.noise, self.finished.branches
        best: list[tuple[Tensor, ...]] = []

        def drawn(piece: slice) -> tuple[Tensor, Tensor]:
            scores = self._processed(where, piece, score(values[piece]))
            noisy = scores if noise is None else noise.held[index[piece]].add_(scores)
            if most == 1:
                return scores, argmax(noisy)
            tokens = noisy.topk(min(most, noisy.shape[-1]), dim=-1).indices
            of_target = chances(noisy, tokens, [noise is not None] * len(tokens))
            best.append((tokens, of_target, scores.softmax(dim=-1).gather(-1, tokens)))
            return scores, tokens[:, 0]

        self.put(where, drawn, hidden)
        if self.candidates is not None and self.candidate_chances is not None:
            tables = self.candidates, *self.candidate_chances
            for table, values in zip(tables, map(torch.cat, zip(*best, strict=True)), strict=True):
                part = table[where]
                part.copy_(values.view(len(part), 1, -1, values.shape[-1]))

    def put(self, where: TablePart, drawn: Callable[[slice], tuple[Tensor, Tensor]], hidden: Tensor | None) -> None:
        """Enter tokens, the same in all columns of `where`, with what a trace keeps of them.

        Args:
            drawn: processed scores float32 [count, vocab] and tokens int64 [count] of a slice of rows * places, row
                after row.
            hidden: the drafter's hidden states [rows * places, drafter hidden], or None.
        """
        index = self._index(where)
        found = []
        for piece in pieces(len(index), positions_at_once(self.finished.vocab_size)):
            scores, tokens = drawn(piece)
            found.append((tokens, *self._measured(scores, tokens, index[piece])))
        tables = (self.tokens, self.probability, self.entropy, self.match_probability)
        for table, values in zip(tables, map(torch.cat, zip(*found, strict=True)), strict=True):
            part = table[where]
            part.copy_(values.view(len(part), 1, -1))
        if hidden is not None and self.finished.keep_hidden:
            if self.hidden is None:
                self.hidden = torch.full((*self.tokens.shape, hidden.shape[-1]), float("nan"))
            kept = self.hidden[where]
            kept.copy_(hidden.view(len(kept), 1, -1, hidden.shape[-1]))

    def _index(self, where: TablePart) -> Tensor:
        """The output position of each token, int64 [rows * places], row after row."""
        rows, _, places = where
        first = torch.arange(rows.start, rows.stop, device=self.finished.ids.device)[:, None]
        return (first + torch.arange(places.start + 1, places.stop + 1, device=first.device)).flatten()

    def _processed(self, where: TablePart, piece: slice, logits: Tensor) -> Tensor:
        """Scores after the logits processors, float32 [count, vocab]."""
        finished, (rows, columns, places) = self.finished, where
        logits, processors = logits.float(), finished.processors.processors
        if not processors:
            return logits
        if finished.processors.prefix_free:
            # They look at the scores only; any prefix will do.
            scores: Tensor = processors(logits.new_zeros((len(logits), 1), dtype=torch.long), logits)
            return scores
        found = []
        for i, row in enumerate(range(rows.start + piece.start, rows.start + piece.stop)):
            drafted = self.tokens[row, columns.start, : places.start].to(finished.ids.device)
            prefix = torch.cat([finished.before(row), drafted[None]], dim=1)
            found.append(processors(prefix, logits[i : i + 1].clone()))
        return torch.cat(found)

    def _measured(self, scores: Tensor, tokens: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probability, entropy and `match_probability` of tokens, float32 [count] each; NaN for no match."""
        probabilities = scores.softmax(dim=-1)
        # Tokens that a processor ruled out have the score -inf and no share in the entropy.
        below = (scores - scores.amax(dim=-1, keepdim=True)).clamp_(min=-1e30)
        entropy = -probabilities.amax(dim=-1).log() - torch.linalg.vecdot(probabilities, below)
        # Of trees there is none: the target's distribution is known after the tokens that came to be alone.
        target = None if self.finished.trees else self.finished.target_probabilities
        matches = entropy.new_full(entropy.shape, float("nan"))
        if target is not None and bool((inside := index < len(target)).any()):
            matches[inside] = match_probability(target[index[inside]], probabilities[inside])
        return probabilities.gather(-1, tokens[:, None])[:, 0], entropy, matches


def argmax(scores: Tensor) -> Tensor:
    """The first of the largest scores, float32 [count, vocab] -> int64 [count]."""
    if scores.device.type == "cpu":  # numpy finds it ten times as fast as torch
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def num_accepted(drafted: Tensor, output: Tensor) -> Tensor:
    """How much of each draft stands.

    Args:
        drafted: int64 [rows, sizes, width], -1 where nothing was drafted; row r begins at output position r + 1.
        output: int64 [output length].

    Returns:
        int64 [rows, sizes]. The last token of a step is the target's own, so that a draft that reaches the end of the
        output counts one less.
    """
    rows, _, width = drafted.shape
    stands = (drafted == to_come(output, rows, width)[:, None]).cumprod(dim=-1).sum(dim=-1)
    return stands.minimum(room(rows))


def nodes_accepted(drafted: Tensor, parents: Tensor, output: Tensor) -> Tensor:
    """How deep the path goes of each tree that stands; as `num_accepted`.

    Args:
        drafted, parents: int64 [rows, sizes, width], -1 where nothing was drafted.
    """
    rows, _, width = drafted.shape
    right = torch.cat([to_come(output, rows, width), output.new_full((rows, 1), -2)], dim=1)
    # Depth that the path has come to at each node, -1 where it does not stand; of the anchor in the last place.
    reached = torch.full((*drafted.shape[:-1], width + 1), -1)
    reached[..., -1] = 0
    for node in range(width):
        before = reached.gather(-1, parents[..., node, None] % (width + 1))
        stands = (before >= 0) & (drafted[..., node, None] == right.gather(1, before[..., 0].clamp(min=0))[..., None])
        reached[..., node, None] = torch.where(stands, before + 1, -1)
    return reached.amax(dim=-1).minimum(room(rows))


def to_come(output: Tensor, rows: int, width: int) -> Tensor:
    """The output from each row's position on, -2 behind its end: int64 [rows, width]."""
    return torch.cat([output, output.new_full((width,), -2)])[1:].unfold(0, width, 1)[:rows]


def room(rows: int) -> Tensor:
    """Drafted tokens that may stand at most: the last token of the output is the target's own. int64 [rows, 1]."""
    return torch.arange(rows - 1, -1, -1)[:, None]


def ranks(candidates: Tensor, output: Tensor) -> Tensor:
    """Rank of the output's own token among candidates; see `CandidateTable.ranks`.

    Args:
        candidates: int64 [rows, sizes, width, branches], -1 where nothing was drafted. output: int64 [output length].

    Returns:
        int64 [rows, sizes, width].
    """
    rows, _, width, branches = candidates.shape
    same = candidates == to_come(output, rows, width)[:, None, :, None]
    found = torch.where(same.any(dim=-1), same.int().argmax(dim=-1), branches)
    return found.masked_fill(candidates[..., 0] < 0, -1)


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
    ratio = (p / q.clamp(min=1e-30)).float()
    if ratio.device.type == "cpu":  # numpy sorts several times faster than torch
        order = torch.from_numpy(np.argsort(-ratio.numpy(), axis=-1))
    else:
        order = ratio.argsort(dim=-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    above = p.cumsum(dim=-1)  # sum of p over tokens with r_y >= r_x, the token itself included
    below = q.flip(-1).cumsum(dim=-1).flip(-1) - q
    # 1 / (above / p + below / q), written so that a token that one side never draws counts nothing.
    both = p * q / (above * q + below * p).clamp(min=1e-300)
    return both.sum(dim=-1).clamp(max=1.0).float()
