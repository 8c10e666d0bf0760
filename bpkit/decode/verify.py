"""The verify rules: which drafted tokens stand, and what comes after them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bpkit.decode.noise import ACCEPT_SALT, DRAFT_SALT, GumbelNoise, hashed, uniform
from bpkit.decode.sampling import Draw, Processors, noisy
from bpkit.decode.text import RunningText
from bpkit.types import Draft

NEAR_TIE = 1e-4
"""A top-2 gap below this may flip between verify widths, because float32 sums in another order."""
ROUNDINGS = 4
"""The same for narrower types, in units of their rounding at the size of the scores: hidden states are rounded in every
layer, and a pass of another width rounds otherwise."""


class Verdict(NamedTuple):
    """What a rule made of a pass, on the device.

    Attributes:
        tokens: int64 [1, positions]; only the first `num_accepted + 1` mean anything.
        num_accepted: before stopping is considered, int64 [1].
        near_tie: whether the top-2 gap was below tolerance, bool [1, positions].
    """

    tokens: Tensor
    num_accepted: Tensor
    near_tie: Tensor


class VerifyRule(Protocol):
    """Decides what follows the running text from the target's logits, without a read of the device."""

    def draw(self) -> Draw:
        """What the drafter draws its tokens with."""
        ...

    def verify(self, logits: Tensor, draft: Draft, width: int) -> Verdict:
        """Judge the first `width` drafted tokens.

        Args:
            logits: of the target at anchor and drafted tokens, [1, width + 1, vocab].
        """
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

    def __init__(self, text: RunningText, processors: Processors, noise: GumbelNoise | None) -> None:
        self.text, self.processors, self.noise = text, processors, noise

    def draw(self) -> Draw:
        return Draw(self.processors, self.noise, self.text.position[0], self.text.ids)

    def verify(self, logits: Tensor, draft: Draft, width: int) -> Verdict:
        drafted, (position,) = draft.tokens[:, :width], self.text.position
        if self.noise is not None:
            self.noise.forget_before(position)
        scores = self.processors(logits, self.text.ids, drafted)
        tolerance = tie_tolerance(logits, scores)
        scores = noisy(scores, self.noise, position)
        chosen = scores.argmax(dim=-1)
        stands = (chosen[:, :width] == drafted).cumprod(dim=1).sum(dim=1)
        return Verdict(chosen, stands, near_ties(scores, tolerance))


class Rejection:
    """Speculative sampling: accept token x with probability min(1, p(x)/q(x)), else draw from max(p - q, 0).

    Leviathan et al. 2023 (2211.17192) and Chen et al. 2023 (2302.01318). The output has the target's distribution,
    but the text depends on drafter and policy.
    """

    def __init__(self, text: RunningText, processors: Processors, noise: GumbelNoise) -> None:
        self.text, self.processors, self.noise = text, processors, noise
        self.drafts = 0

    def draw(self) -> Draw:
        # Fresh noise for every draft: with that of the position alone, a token that was drafted but not verified would
        # come again, and a policy that remembers what it saw of it could pick and choose.
        self.drafts += 1
        n = self.noise
        noise = GumbelNoise(hashed(n.seed, n.stream, self.drafts, DRAFT_SALT), n.stream, n.width, n.device)
        return Draw(self.processors, noise, self.text.position[0], self.text.ids)

    def verify(self, logits: Tensor, draft: Draft, width: int) -> Verdict:
        drafted, (position,) = draft.tokens[:, :width], self.text.position
        n = self.noise
        n.forget_before(position)
        target = self.processors(logits, self.text.ids, drafted).softmax(dim=-1)
        proposal = torch.zeros_like(target)
        if width:
            proposal[:, :width] = self._proposal(draft, width, target.shape[-1])
        p, q = (d[:, :width].gather(-1, drafted[..., None])[..., 0] for d in (target, proposal))
        u = uniform(n.seed, n.stream, position, max(width, 1), 1, n.device, ACCEPT_SALT)[:width, 0]
        stands = (u * q < p).cumprod(dim=1).sum(dim=1)
        last = noisy(self._left_over(target, proposal, stands), n, position).argmax(dim=-1)
        place = torch.arange(width + 1, device=last.device)
        tokens = torch.where(place < stands, torch.nn.functional.pad(drafted, (0, 1)), last)
        return Verdict(tokens, stands, torch.zeros_like(tokens, dtype=torch.bool))

    @staticmethod
    def _left_over(target: Tensor, proposal: Tensor, stands: Tensor) -> Tensor:
        """Log of what the token after the accepted ones is drawn from, at its position: [1, positions, vocab]."""
        rest = (target - proposal).clamp(min=0).index_select(1, stands)
        # p == q leaves nothing over but is never rejected in exact arithmetic; rounding may still land here.
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, target.index_select(1, stands))
        return rest.log().expand(-1, target.shape[1], -1)

    @staticmethod
    def _proposal(draft: Draft, width: int, vocab: int) -> Tensor:
        if draft.logits is not None:
            return draft.logits[:, :width].softmax(dim=-1)
        return torch.nn.functional.one_hot(draft.tokens[:, :width], vocab).float()


RULES = ("coupled", "rejection")


def make_rule(name: str, text: RunningText, processors: Processors, noise: GumbelNoise | None) -> VerifyRule:
    """The rule of that name; without noise both are greedy decoding."""
    if name == "rejection" and noise is not None:
        return Rejection(text, processors, noise)
    return Coupled(text, processors, noise)
