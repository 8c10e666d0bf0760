"""What drafts are worth to a row under load, by tokens drafted and verified, and what being at a position is worth.

The plainest worth of a position is the number of its tokens. But a token may be worth more at one place than at
another: where the next draft is right for long, it pays to get there. So a second one asks what is left of the output
for a row by itself. It pays for its own positions and a part of each step that no step of this many rows can undercut:

    share(d, v) = charges of its positions + least over rows n, longest drafts >= d, most verified >= v of
                  (price of the step - charges of all its positions) / n

Rows together never pay less than all their shares. So the seconds that remain to a row under its best choices, found by
going through its output from the end, are also a bound: no policy serves these requests in less time than all rows'
seconds together, at any order and admission, if costs do not fall with the context length. What catching up takes is
left out: it only takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.oracle.allocation import PhasePrice, draft_sizes, phase_price
from bpkit.trace.oracle.paths import match_chances
from bpkit.trace.oracle.plan import Float64, Int64, chances_of
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DraftWork

CONTEXTS = 8
"""Context lengths at which shares are worked out, at most."""


@dataclass(frozen=True)
class Outcomes:
    """What comes of every draft of one prompt, of its first source.

    `rows` is the output length less one, `sizes` counts traced block sizes that may be used, `width` is the longest
    draft.

    Attributes:
        block_sizes: int64 [sizes]. length: drafted tokens, int64 [rows, sizes].
        reach, stop: chance that the first v tokens stand, and that just v do: float64 [rows, sizes, width + 1].
        next: position after v tokens stand, int64 [rows, width + 1].
        most: drafted tokens that may be verified, int64 [rows].
    """

    prompt: PromptTrace
    block_sizes: Int64
    length: Int64
    reach: Float64
    stop: Float64
    next: Int64
    most: Int64

    def worth(self, row: int | slice, of_positions: Float64) -> Float64:
        """Expected worth of where a step leads: float64 [..., sizes, width + 1]; minus infinity where it cannot be.

        Args:
            of_positions: float64 [output length + 1].
        """
        later = of_positions[self.next[row]][..., None, :]
        stopped = self.stop[row] * later
        expected = np.cumsum(stopped, axis=-1) - stopped + self.reach[row] * later
        verified = np.arange(later.shape[-1])
        most = np.minimum(self.length[row], np.asarray(self.most[row])[..., None])[..., None]
        there = (verified <= most) & (self.length[row] > 0)[..., None]
        return np.where(there, expected, -np.inf)

    def worths(self, of_positions: Float64, width: int) -> tuple[Float64, NDArray[np.int64]]:
        """Expected worth of every step by tokens drafted and verified, float64 [rows, width + 1, width + 1], and the
        block size of every draft length, [rows, width + 1]. Of sizes that give drafts of one length, the smallest.
        """
        rows = np.arange(len(self.length))
        found = np.full((len(rows), width + 1, width + 1), -np.inf)
        sizes = np.ones((len(rows), width + 1), np.int64)
        by_size = self.worth(slice(None), of_positions)
        for place in range(len(self.block_sizes) - 1, -1, -1):
            found[rows, self.length[:, place], : by_size.shape[2]] = by_size[:, place]
            sizes[rows, self.length[:, place]] = self.block_sizes[place]
        found[:, 0], sizes[:, 0] = -np.inf, 1
        found[:, 0, 0] = of_positions[self.next[:, 0]]
        return found - of_positions[1:-1, None, None], sizes


def outcomes(prompt: PromptTrace, work: DraftWork, largest: int, *, knows_noise: bool) -> Outcomes:
    """What comes of the drafts of a prompt.

    Args:
        largest: block size that may be used.
        knows_noise: whether what stands is known; otherwise the chances are.

    Raises:
        ValueError: the chances are asked for and not in the trace.
    """
    drafts, position = prompt.drafts, np.arange(1, prompt.output_length)
    room, width = prompt.output_length - 1 - position, int(drafts.draft_length.max(initial=0))
    if knows_noise:
        match = (np.arange(width) < drafts.num_accepted[:, :, None]).astype(np.float64)
    else:
        match = match_chances(prompt, drafts, work, room, width)
    reach, stop = chances_of(match)
    used = drafts.block_sizes <= largest
    return Outcomes(
        prompt,
        drafts.block_sizes[used].astype(np.int64),
        drafts.draft_length[:, used].astype(np.int64),
        reach[:, used],
        stop[:, used],
        position[:, None] + 1 + np.minimum(np.arange(width + 1), room[:, None]),
        prompt.max_new_tokens - position - 1,
    )


@dataclass(frozen=True)
class Shares:
    """Seconds of a row's share of a step by tokens drafted and verified, at some context lengths and longer ones.

    Attributes:
        contexts: rising, int64 [contexts]. seconds: float64 [contexts, width + 1, width + 1].
    """

    contexts: Int64
    seconds: Float64

    def at(self, context_length: int) -> Float64:
        """At the longest of the context lengths that is no longer, [width + 1, width + 1]."""
        return np.asarray(self.seconds[int(np.searchsorted(self.contexts, context_length, side="right")) - 1])


def shares(cost: CostModel, width: int, rows: int, contexts: tuple[int, int], charges: tuple[float, float]) -> Shares:
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
    sizes = np.arange(width + 1)
    own = charges[0] * draft_sizes(sizes)[:, None] + charges[1] * (sizes + 1)
    return Shares(at, np.stack(found) + own)


def _share(cost: CostModel, width: int, rows: int, at: int, charges: tuple[float, float]) -> Float64:
    draft, verify = (
        _least(phase_price(cost, phase, width, at, rows), rows, charge, phase)
        for phase, charge in zip(("draft", "verify"), charges, strict=True)
    )
    asked = cost.seconds("rest", 1, at) if rows == 1 else cost.batch_seconds("rest", 1, at, rows, 0)  # type: ignore[attr-defined]
    return np.asarray((draft[:, None] + verify + asked) / rows, np.float64)


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


def seconds_alone(known: Outcomes, share: Shares) -> Float64:
    """Least expected seconds of shares that remain from each position: float64 [output length + 1]."""
    left = np.zeros(known.prompt.output_length + 1)
    left[0] = np.nan  # before prefill
    for row in range(len(known.length) - 1, -1, -1):
        price = share.at(known.prompt.prompt_length + row + 1)
        plain = price[0, 0] + left[known.next[row, 0]]
        step = price[known.length[row], : known.next.shape[1]] - known.worth(row, -left)
        left[row + 1] = min(plain, step.min(initial=np.inf))
    return left


def charges_of(cost: CostModel, width: int, rows: int, at: int) -> list[tuple[float, float]]:
    """Charges of positions under which to look at shares."""
    draft, verify = (phase_price(cost, phase, width, at, rows) for phase in ("draft", "verify"))
    return [(a, b) for a in draft.charges for b in verify.charges]


def widest(prompts: Sequence[PromptTrace], largest: int) -> int:
    """The longest draft of block sizes that may be used."""
    lengths = [p.drafts.draft_length[:, p.drafts.block_sizes <= largest].max(initial=0) for p in prompts]
    return int(max(lengths))
