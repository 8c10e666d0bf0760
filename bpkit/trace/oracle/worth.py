"""What being at a position is worth to a row under load, in seconds that remain, and what its drafts are worth by that.

A token is not worth the same everywhere. Where a draft is right for long, what is not taken now can be had in the next
step, whose width other rows pay for anyway; where the next draft is right for long, it pays to get there. So a position
is worth what the steps from there to the end of the output take less. That is worked out for each row by itself, going
through its output from the end, as if all rows did as it does: in steps of so many rows that draft and verify up to a
cap, of which it pays one part,

    share(d, v) = charges of its own positions + (price of a step at the cap - charges of all its positions) / rows

under the cap that takes the least time. That is a policy for all rows, with a value that one step can be improved by.

`lower_shares` are those that rows together never pay less than, whatever they do and however many run:

    share(d, v) = charges of its own positions + least over rows n, longest drafts >= d, most verified >= v of
                  (price of the step - charges of all its positions) / n

So the seconds that remain to a row under them are a bound: no policy serves these requests in less time than all rows'
seconds together, in any order, if costs do not fall with the context length. Catching up is left out: it takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.decode.clock import asked
from bpkit.trace.oracle.allocation import PhasePrice, draft_sizes, phase_price
from bpkit.trace.oracle.paths import match_chances
from bpkit.trace.oracle.plan import Float64, Int64, chances_of
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DraftWork

CONTEXTS = 8
"""Context lengths at which shares are worked out, at most."""


@dataclass(frozen=True)
class Outcomes:
    """What comes of every draft of one prompt, of its first source, by tokens drafted and verified.

    `rows` is the output length less one, `width` the longest draft of any prompt.

    Attributes:
        block_sizes: by tokens drafted, int64 [rows, width + 1]; of sizes that give drafts of one length, the smallest.
        there: whether so many can be drafted and verified, bool [rows, width + 1, width + 1].
        reach, stop: chance that the first v tokens stand, and that just v do, float64 of the same shape.
        next: position after v tokens stand, int64 [rows, width + 1].
    """

    prompt: PromptTrace
    block_sizes: Int64
    there: NDArray[np.bool_]
    reach: Float64
    stop: Float64
    next: Int64


def outcomes(prompt: PromptTrace, work: DraftWork, largest: int, width: int, *, knows_noise: bool) -> Outcomes:
    """What comes of the drafts of a prompt.

    Args:
        largest: block size that may be used. width: the longest draft.
        knows_noise: whether what stands is known; otherwise the chances are.

    Raises:
        ValueError: the chances are asked for and not in the trace.
    """
    drafts, position = prompt.drafts, np.arange(1, prompt.output_length)
    rows, room, own = (
        np.arange(len(position)),
        prompt.output_length - 1 - position,
        int(drafts.draft_length.max(initial=0)),
    )
    if knows_noise:
        match = (np.arange(own) < drafts.num_accepted[:, :, None]).astype(np.float64)
    else:
        match = match_chances(prompt, drafts, work, room, own)
    chances, shape = chances_of(match), (len(rows), width + 1, width + 1)
    sizes, traced, (reach, stop) = np.ones(shape[:2], np.int64), np.zeros(shape[:2], np.bool_), np.zeros((2, *shape))
    kept = min(own, width) + 1
    for place in np.flatnonzero(drafts.block_sizes <= largest)[::-1].tolist():
        length = drafts.draft_length[:, place]
        sizes[rows, length], traced[rows, length] = drafts.block_sizes[place], length > 0
        for values, given in zip((reach, stop), chances, strict=True):
            values[rows, length, :kept] = given[:, place, :kept]
    sizes[:, 0], traced[:, 0], reach[:, 0, 0], stop[:, 0] = 1, True, 1.0, 0.0
    verified = np.arange(width + 1)
    most = np.minimum(verified, np.maximum(prompt.max_new_tokens - position - 1, 0)[:, None])
    there = traced[:, :, None] & (verified <= most[:, :, None])
    after = position[:, None] + 1 + np.minimum(verified, room[:, None])
    return Outcomes(prompt, sizes, there, reach, stop, after)


def expected(later: Float64, reach: Float64, stop: Float64, axis: int) -> Float64:
    """Expected value of where steps lead.

    Args:
        later: value by tokens that stand. reach, stop: as in `Outcomes`. All broadcast to one shape.
        axis: of tokens that stand, or are verified.
    """
    stopped = stop * later
    found = np.cumsum(stopped, axis=axis)
    found -= stopped
    found += reach * later
    return found


@dataclass(frozen=True)
class Shares:
    """Seconds of a row's share of a step by tokens drafted and verified, at some context lengths and longer ones.

    Attributes:
        contexts: rising, int64 [contexts]. seconds: float64 [contexts, width + 1, width + 1].
    """

    contexts: Int64
    seconds: Float64

    def at(self, context_length: int) -> Float64:
        """At the longest of the context lengths that is no longer, [width + 1, width + 1, 1]."""
        return np.asarray(self.seconds[int(np.searchsorted(self.contexts, context_length, side="right")) - 1])[
            :, :, None
        ]


def lower_shares(
    cost: CostModel, width: int, rows: int, contexts: tuple[int, int], charges: tuple[float, float]
) -> Shares:
    """What no step of up to so many rows can undercut.

    Args:
        contexts: the shortest and the longest context length.
        charges: seconds for each position of drafts and of the target.
    """
    at = np.unique(np.linspace(*contexts, CONTEXTS).astype(np.int64))
    found = [
        np.min([_share(cost, width, count, context, charges) for count in range(1, rows + 1)], axis=0)
        for context in at.tolist()
    ]
    return Shares(at, np.stack(found) + _own(width, charges))


def capped_shares(cost: CostModel, width: int, rows: int, at: int) -> Float64:
    """Shares of steps of so many rows: float64 [charges, caps, width + 1, width + 1], infinite beyond a cap.

    The charges that bound best are those under which the best cap takes longest. Longest drafts are as long as what is
    verified, or as long as they can be.
    """
    draft, verify = (phase_price(cost, phase, width, at, rows) for phase in ("draft", "verify"))
    rest, sizes = asked(cost, rows)("rest", 1, at, 0), np.arange(width + 1)
    if rows == 1:  # which pays for itself alone
        return np.asarray(draft.base[:, None] + verify.base + rest)[None, None]
    caps = [
        (a, b)
        for b, most in enumerate(verify.sizes)
        for a, longest in enumerate(draft.sizes)
        if longest == most or (longest == width and most)
    ]
    found = []
    for charges in charges_of(draft, verify):
        parts = draft.least(charges[0]), verify.least(charges[1])
        of_caps = []
        for a, b in caps:
            within = (sizes <= draft.sizes[a])[:, None] & (sizes <= verify.sizes[b])
            price = (parts[0][a] + parts[1][b] + rest) / rows
            of_caps.append(np.where(within, price + _own(width, charges), np.inf))
        found.append(of_caps)
    return np.array(found)


def _own(width: int, charges: tuple[float, float]) -> Float64:
    """Charges of a row's own positions, [width + 1, width + 1]."""
    sizes = np.arange(width + 1)
    return np.asarray(charges[0] * draft_sizes(sizes)[:, None] + charges[1] * (sizes + 1))


def _share(cost: CostModel, width: int, rows: int, at: int, charges: tuple[float, float]) -> Float64:
    draft, verify = (
        _least(phase_price(cost, phase, width, at, rows), rows, charge, phase)
        for phase, charge in zip(("draft", "verify"), charges, strict=True)
    )
    return np.asarray((draft[:, None] + verify + asked(cost, rows)("rest", 1, at, 0)) / rows, np.float64)


def _least(phase: PhasePrice, rows: int, charge: float, name: str) -> Float64:
    """Least seconds without the charges for a size or a larger one: float64 [width + 1]."""
    sizes = np.arange(len(phase.of))
    if phase.table is not None:
        left = (phase.table - charge * np.arange(phase.table.shape[1])).min(axis=1)[phase.of]
    else:
        few = draft_sizes(sizes) if name == "draft" else sizes + rows
        many = draft_sizes(sizes) * rows if name == "draft" else (sizes + 1) * rows
        left = phase.base[phase.of] + np.minimum((phase.slope - charge) * few, (phase.slope - charge) * many)
    return np.asarray(np.minimum.accumulate(left[::-1])[::-1], np.float64)


def seconds_left(known: Outcomes, share: Callable[[int], Float64]) -> Float64:
    """Least expected seconds of shares that remain from each position: float64 [output length + 1, kinds].

    Args:
        share: of a context length, float64 [width + 1, width + 1, kinds].
    """
    first = known.prompt.prompt_length + 1
    left = np.zeros((known.prompt.output_length + 1, share(first).shape[2]))
    left[0] = np.nan  # before prefill
    for row in range(len(known.next) - 1, -1, -1):
        lengths = np.flatnonzero(known.there[row, :, 0])
        later = left[known.next[row]]
        reach, stop = known.reach[row, lengths, :, None], known.stop[row, lengths, :, None]
        step = expected(later, reach, stop, axis=1)
        step += share(first + row)[lengths]
        step[~known.there[row, lengths]] = np.inf
        left[row + 1] = step.min(axis=(0, 1))
    return left


def charges_of(draft: PhasePrice, verify: PhasePrice) -> list[tuple[float, float]]:
    """Charges of positions under which to look at shares."""
    return [(a, b) for a in draft.charges for b in verify.charges]


def widest(prompts: Sequence[PromptTrace], largest: int) -> int:
    """The longest draft of block sizes that may be used."""
    lengths = [p.drafts.draft_length[:, p.drafts.block_sizes <= largest].max(initial=0) for p in prompts]
    return int(max(lengths))
