"""The verify rules: which drafted tokens stand, and what comes after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bpkit.decode.noise import ACCEPT_SALT, DRAFT_SALT, GumbelNoise, hashed, uniform
from bpkit.decode.sampling import Draw, Sampler, Samplers, noisy
from bpkit.decode.text import padded, to_device
from bpkit.decode.trees import Tree
from bpkit.types import Draft

NEAR_TIE = 1e-4
"""A top-2 gap below this may flip between verify widths, because float32 sums in another order."""
ROUNDINGS = 4
"""The same for narrower types, in units of their rounding at the size of the scores: hidden states are rounded in every
layer, and a pass of another width rounds otherwise."""


class Verdict(NamedTuple):
    """What a rule made of a pass, on the device.

    Attributes:
        tokens: int64 [rows, positions]; the first `num_accepted + 1` of a row are decided. Those after them are what
            the target would say after a wrong token, and may be drafted next.
        num_accepted: before stopping is considered, int64 [rows].
        near_tie: whether the top-2 gap was below tolerance, bool [rows, positions].
        path: of trees the column of the pass that each position is of, int64 [rows, positions]; the first is the
            anchor's, 0. None where position and column are one.
    """

    tokens: Tensor
    num_accepted: Tensor
    near_tie: Tensor
    path: Tensor | None = None

    @property
    def last_column(self) -> Tensor:
        """Of the pass, that of the last decided token, int64 [rows]."""
        if self.path is None:
            return self.num_accepted
        return self.path.gather(1, self.num_accepted[:, None])[:, 0]


class VerifyRule(Protocol):
    """Decides what follows the running text from the target's logits, without a read of the device."""

    def draw(self, block_size: Sequence[int]) -> Draw:
        """What the drafter draws its tokens with; rows of block size 1 draw none."""
        ...

    def verify(self, logits: Tensor, draft: Draft, width: Sequence[int]) -> Verdict:
        """Judge the first `width[i]` drafted tokens of row *i*.

        Args:
            logits: of the target at anchor and drafted tokens, [rows, largest width + 1, vocab].
            draft: of a tree that was cut to the nodes that are verified, which `draft.nodes` says.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        ...

    def join(self, other: Any) -> None:
        """Take in the rows of another rule of the same class after one's own."""
        ...


def near_ties(scores: Tensor, tolerance: float | Tensor) -> Tensor:
    """Whether the two best are close: scores [..., vocab], tolerance a number or [...]; bool [...]."""
    best, second = scores.topk(2, dim=-1).values.unbind(dim=-1)
    return best - second < tolerance


def tie_tolerance(logits: Tensor, scores: Tensor) -> float | Tensor:
    """Gaps below this may be closed by rounding: a number for float32, else by the size of the largest score.

    Args:
        logits: as the target gave them, [..., vocab]; their dtype is the one that it computes in.
        scores: the same after logits processors, such as a temperature, that may have scaled them.

    Returns:
        0.0001 for float32, else float32 [...].
    """
    if logits.dtype in (torch.float32, torch.float64):
        return NEAR_TIE
    size = torch.maximum(logits.float().amax(dim=-1).abs(), scores.amax(dim=-1).abs())
    return (size * (ROUNDINGS * torch.finfo(logits.dtype).eps)).clamp(min=NEAR_TIE)


class Coupled:
    """A drafted token stands iff it is the token that plain decoding would choose.

    Drafter and target use the same Gumbel noise at the same output position (Daliri, Musco & Suresh 2024, "Coupling
    without communication and drafter-invariant speculative decoding"), so the text depends on neither drafter nor
    policy. Without noise this is greedy decoding.
    """

    def __init__(self, samplers: Samplers) -> None:
        self.samplers = samplers

    def draw(self, block_size: Sequence[int]) -> Draw:
        return Draw(self.samplers)

    def verify(self, logits: Tensor, draft: Draft, width: Sequence[int]) -> Verdict:
        if draft.nodes is not None and draft.nodes.tree is not None:
            return self._verify_trees(logits, draft.tokens, draft.nodes.tree)
        drafted, position = draft.tokens[:, : max(width)], self.samplers.position
        self.samplers.forget_before(position)
        counts = [row + 1 for row in width]
        scores = self.samplers.scores(logits, drafted[:, :0], drafted, counts)
        tolerance = tie_tolerance(logits, scores)
        scores = self.samplers.noisy(scores, position, counts)
        chosen = scores.argmax(dim=-1)
        same = chosen[:, : drafted.shape[1]] == drafted
        if min(width) < drafted.shape[1]:
            same &= _within(width, drafted)
        return Verdict(chosen, same.cumprod(dim=1).sum(dim=1), near_ties(scores, tolerance))

    def _verify_trees(self, logits: Tensor, drafted: Tensor, tree: Tree) -> Verdict:
        """Walk down from the anchor, each time to the child that is the token after its parent.

        That token goes by the noise of its output position, which nodes of one depth share.
        """
        position = self.samplers.position
        self.samplers.forget_before(position)
        scores, asked = scores_of_trees(self.samplers, logits, drafted, tree)
        tolerance = tie_tolerance(logits, scores)
        scores = self.samplers.noisy_at(scores, position, tree)
        chosen = scores.argmax(dim=-1)
        if asked is not None:
            chosen = chosen.where(asked, -1)
        depth = tree.depth[:, 1:]
        wrong = (chosen.gather(1, tree.parent) != drafted) | (depth == 0)  # padding has no depth
        stands = ~(tree.above[:, 1:, 1:] & wrong[:, None]).any(dim=2) & ~wrong
        reached = depth * stands
        accepted, last = reached.amax(dim=1), reached.argmax(dim=1) + 1
        last = last.where(accepted > 0, 0)
        rows, columns = torch.arange(len(last), device=last.device), torch.arange(chosen.shape[1], device=last.device)
        path = columns.where(tree.above[rows, last], chosen.shape[1]).sort(dim=1).values
        path = path.clamp_(max=chosen.shape[1] - 1)  # behind the last decided token anything
        return Verdict(chosen.gather(1, path), accepted, near_ties(scores, tolerance).gather(1, path), path)

    def keep(self, rows: Sequence[int]) -> None:
        self.samplers = Samplers([self.samplers.rows[row] for row in rows])

    def join(self, other: Coupled) -> None:
        self.samplers = Samplers([*self.samplers.rows, *other.samplers.rows])


def scores_of_trees(samplers: Samplers, logits: Tensor, drafted: Tensor, tree: Tree) -> tuple[Tensor, Tensor | None]:
    """Processed scores of the nodes of trees, each after its own path: float32 [rows, columns, vocab].

    Processors that look at tokens are only asked about the path that stands, token after token, which is read from
    the device: like plain decoding, and in its order.

    Returns:
        The scores, and which of them were asked for, bool [rows, columns]; None where all were.
    """
    if all(row.processors.prefix_free for row in samplers.rows):
        return samplers.scores(logits, drafted[:, :0], drafted, tree.counts), None
    scores, tokens = logits.float().clone(), drafted.tolist()
    asked = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    for place, row in enumerate(samplers.rows):
        own = slice(place, place + 1)
        if row.processors.prefix_free:
            scores[own] = row.scores(logits[own], drafted[own, :0], drafted[own, :0])
            continue
        asked[place], path = False, list[int]()
        columns = [0]
        for column in columns:
            at = slice(column, column + 1)
            drawn = to_device([path], drafted.device).long()
            scores[own, at] = row.scores(logits[own, at], drawn, drafted[own, :0])
            asked[own, at] = True
            token = int(noisy(scores[own, at], row.noise, row.text.position + len(path)).argmax())
            path.append(token)
            children = enumerate(zip(tree.parents[place], tokens[place], strict=False), 1)
            columns += [child for child, found in children if found == (column, token)][:1]
    return scores, asked


def _within(width: Sequence[int], drafted: Tensor) -> Tensor:
    """Which drafted tokens are to be verified: bool [rows, largest width]."""
    most = to_device(width, drafted.device)
    return torch.arange(drafted.shape[1], device=drafted.device) < most[:, None]


class Rejection(Coupled):
    """Speculative sampling: accept token x with probability min(1, p(x)/q(x)), else draw from max(p - q, 0).

    Leviathan et al. 2023 (2211.17192) and Chen et al. 2023 (2302.01318). The output has the target's distribution,
    but the text depends on drafter and policy. Rows without noise are greedy.
    """

    def __init__(self, samplers: Samplers) -> None:
        super().__init__(samplers)
        self.drafts = [0] * len(samplers.rows)

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self.drafts = [self.drafts[row] for row in rows]

    def join(self, other: Coupled) -> None:
        assert isinstance(other, Rejection)
        super().join(other)
        self.drafts += other.drafts

    def draw(self, block_size: Sequence[int]) -> Draw:
        # Fresh noise for every draft: with that of the position alone, a token that was drafted but not verified would
        # come again, and a policy that remembers what it saw of it could pick and choose.
        self.drafts = [count + (size > 1) for count, size in zip(self.drafts, block_size, strict=True)]
        fresh = [self._fresh(row, count) for row, count in zip(self.samplers.rows, self.drafts, strict=True)]
        return Draw(Samplers(fresh))

    @staticmethod
    def _fresh(row: Sampler, drafts: int) -> Sampler:
        n = row.noise
        if n is None:
            return row
        noise = GumbelNoise(hashed(n.seed, n.stream, drafts, DRAFT_SALT), n.stream, n.width, n.device)
        return Sampler(row.text, row.processors, noise)

    def verify(self, logits: Tensor, draft: Draft, width: Sequence[int]) -> Verdict:
        verdicts = [self._row(place, logits, draft, count) for place, count in enumerate(width)]
        if len(verdicts) == 1:
            return verdicts[0]
        tokens, accepted, ties, _ = zip(*verdicts, strict=True)
        return Verdict(padded(tokens), torch.cat(accepted), padded(ties))

    def _row(self, place: int, logits: Tensor, draft: Draft, width: int) -> Verdict:
        own = slice(place, place + 1)
        row, drafted, logits = self.samplers.rows[place], draft.tokens[own, :width], logits[own, : width + 1]
        if row.noise is None:
            return Coupled(Samplers([row])).verify(logits, replace(draft, tokens=drafted), [width])
        n, position = row.noise, row.text.position
        n.forget_before(position)
        target = row.scores(logits, drafted[:, :0], drafted).softmax(dim=-1)
        proposal = torch.zeros_like(target)
        if width:
            scores = None if draft.logits is None else draft.logits[own, :width]
            proposal[:, :width] = self._proposal(drafted, scores, target.shape[-1])
        p, q = (d[:, :width].gather(-1, drafted[..., None])[..., 0] for d in (target, proposal))
        u = uniform(n.seed, n.stream, position, max(width, 1), 1, n.device, ACCEPT_SALT)[:width, 0]
        stands = (u * q < p).cumprod(dim=1).sum(dim=1)
        last = noisy(self._left_over(target, proposal, stands), n, position).argmax(dim=-1)
        at = torch.arange(width + 1, device=last.device)
        # Of the positions after it the most likely, not drawn: a draft must not know the noise of an open position.
        tokens = torch.where(at == stands, last, target.argmax(dim=-1))
        tokens = torch.where(at < stands, torch.nn.functional.pad(drafted, (0, 1)), tokens)
        return Verdict(tokens, stands, torch.zeros_like(tokens, dtype=torch.bool))

    @staticmethod
    def _left_over(target: Tensor, proposal: Tensor, stands: Tensor) -> Tensor:
        """Log of what the token after the accepted ones is drawn from, at its position: [1, positions, vocab]."""
        rest = (target - proposal).clamp(min=0).index_select(1, stands)
        # p == q leaves nothing over but is never rejected in exact arithmetic; rounding may still land here.
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, target.index_select(1, stands))
        return rest.log().expand(-1, target.shape[1], -1)

    @staticmethod
    def _proposal(drafted: Tensor, scores: Tensor | None, vocab: int) -> Tensor:
        if scores is not None:
            return scores.to(drafted.device).softmax(dim=-1)  # from the drafter's, where that is another
        return torch.nn.functional.one_hot(drafted, vocab).float()


RULES = {"coupled": Coupled, "rejection": Rejection}
