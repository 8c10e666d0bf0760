"""Where a policy's time goes that the best choices would not have taken, step by step and exactly.

Let V(s) be the least seconds from a state *s* (position and waiting) to the end of the output, as the oracle's plan has
them, and Q(s, b, v) the seconds of drafting at size *b* and verifying *v* drafted tokens there, plus V of where that
leads. Over the steps of any policy

    sum over steps of Q(s, b, v) - V(s)  =  seconds of all steps - V(first state),

since each step's end is the next one's beginning: the performance difference lemma (Kakade & Langford 2002,
"Approximately optimal approximate reinforcement learning"). No term is negative, and each is the sum of two that are
not:

    Q(b, v) - V  =  (Q(b, v) - min over v' of Q(b, v'))  +  (min over v' of Q(b, v') - V)
                     verified too much or too little          drafted too small or too large

Too much, too little, too small and too large are said against what the oracle would have done in the same state; it
takes the smaller of equals. A draft that was too large only because too much of it was verified counts as verified too
much: with the right width it might have cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.oracle.paths import Hindsight, Path
from bpkit.trace.oracle.steps import Float64, array_cost
from bpkit.trace.records import DraftTable, Ints, PromptTrace
from bpkit.types import CostModel, DraftWork

if TYPE_CHECKING:
    from bpkit.trace.replay import Replayed

KINDS = ("drafted_too_small", "drafted_too_large", "verified_too_much", "verified_too_little")
"""Of regret. No draft is the smallest draft."""
ROUNDING = 1e-9
"""Negative regret of less than this part of V is rounding."""
NO_DRAFT = -1


class NotTraced(ValueError):
    """A step drafted at a size that is not in the trace, so that its value is not known."""


@dataclass(frozen=True)
class Taken:
    """The steps that somebody took over one prompt.

    Attributes:
        position, block_size, draft_length, verify_length: of each step, int32 [steps].
        features: whether features of the drafter's distributions were wanted.
    """

    position: Ints
    block_size: Ints
    draft_length: Ints
    verify_length: Ints
    features: bool = False

    @classmethod
    def by_policy(cls, replayed: Replayed) -> Taken:
        """The steps of a replayed policy."""
        fields = (replayed.position, replayed.block_size, replayed.draft_length, replayed.verify_length)
        return cls(*fields, features=any(work.features for work in replayed.work))

    @classmethod
    def by_path(cls, prompt: PromptTrace, path: Path) -> Taken:
        """The steps of a fixed size or an oracle."""
        drafts = prompt.drafts
        column = np.searchsorted(drafts.block_sizes, path.block_size)
        length = np.where(path.block_size > 1, drafts.draft_length[path.position - 1, column], 0)
        return cls(path.position, path.block_size, length.astype(np.int32), path.verify_length)


def step_regret(prompt: PromptTrace, work: DraftWork, known: Hindsight, taken: Taken) -> Float64:
    """Seconds of regret of each step by `KINDS`, float64 [steps, 4].

    They sum to what the cost model says of the steps, without features, less `known.path.seconds`.

    Args:
        work: of the drafter.
        known: `hindsight` of the same prompt and drafter, with `truncate`, under the cost model in question.

    Raises:
        NotTraced: autoregressive drafts that a policy ended at a length that is no traced block size less one.
    """
    row, column = taken.position - 1, _columns(prompt, work, taken)
    state = _states(prompt, work, taken, column, known.table.waits)
    least = known.plan.seconds[row, state]
    draft, verify, width = np.zeros(len(row)), np.zeros(len(row)), np.zeros(len(row), np.int64)

    plain = column == NO_DRAFT
    later = state[plain] + (known.table.waits & (state[plain] > 0))
    draft[plain] = known.table.no_draft[row[plain]] + known.plan.seconds[row[plain] + 1, later] - least[plain]

    drafted = ~plain
    if drafted.any():
        value = _values(prompt, known, row[drafted], column[drafted])  # [drafted steps, width + 1]
        best, chosen = value.min(axis=1), np.take_along_axis(value, taken.verify_length[drafted][:, None], 1)[:, 0]
        verify[drafted], width[drafted] = chosen - best, value.argmin(axis=1)
        draft[drafted] = best + known.table.catch_up[row[drafted], state[drafted]] - least[drafted]

    size = np.where(plain, 1, prompt.drafts.block_sizes[column])
    best_size = np.where(known.plan.drafts[row, state], known.plan.block_size[row], 1)
    small, much = size < best_size, taken.verify_length > width
    draft[(draft < 0) & (draft > -ROUNDING * least)] = 0.0
    return np.stack([draft * small, draft * ~small, verify * much, verify * ~much], axis=1)


def features_seconds(prompt: PromptTrace, cost: CostModel, taken: Taken) -> float:
    """What the features that the steps wanted cost: oracles go without."""
    if not taken.features:
        return 0.0
    drafted = taken.draft_length > 0
    at = prompt.prompt_length + taken.position[drafted]
    return float(array_cost(cost).array("features", taken.draft_length[drafted] + 1, at).sum())


def _columns(prompt: PromptTrace, work: DraftWork, taken: Taken) -> NDArray[np.int64]:
    """Of the tables that each step drafted from, `NO_DRAFT` where nothing was drafted: int64 [steps]."""
    steps = zip(taken.position.tolist(), taken.block_size.tolist(), taken.draft_length.tolist(), strict=True)
    return np.array([_column(prompt.drafts, work, *step) for step in steps], np.int64)


def _column(drafts: DraftTable, work: DraftWork, position: int, block_size: int, draft_length: int) -> int:
    if block_size == 1 or draft_length == 0:
        return NO_DRAFT
    column = drafts.column(block_size)
    if not work.may_end_early or drafts.draft_length[position - 1, column] == draft_length:
        return column
    try:  # ended early, it is the draft of a smaller size
        return drafts.column(draft_length + 1)
    except KeyError:
        said = f"drafts were ended after {draft_length} tokens, and block size {draft_length + 1} is not traced"
        raise NotTraced(said) from None


def _states(
    prompt: PromptTrace, work: DraftWork, taken: Taken, column: NDArray[np.int64], waits: bool
) -> NDArray[np.int64]:
    """Column of `Plan.seconds` before each step: 0 before the first draft, then what waits. int64 [steps]."""
    if not waits:
        return np.zeros(len(column), np.int64)
    accepted = np.minimum(prompt.drafts.num_accepted[taken.position - 1, column], taken.verify_length).tolist()
    state, found = 0, []
    for at, length, stands in zip(column.tolist(), taken.draft_length.tolist(), accepted, strict=True):
        found.append(state)
        if at != NO_DRAFT:
            state = work.after_draft(length, stands)
        elif state:
            state = work.after_no_draft(state)
    return np.array(found, np.int64)


def _values(prompt: PromptTrace, known: Hindsight, row: Ints, column: NDArray[np.int64]) -> Float64:
    """Q, without catching up, by tokens verified; infinite where so many are not there: [steps, width + 1]."""
    count = np.arange(known.table.draft.shape[2])
    accepted = np.minimum(count, prompt.drafts.num_accepted[row, column][:, None])
    later = known.plan.seconds.ravel()[known.table.target[row[:, None], column[:, None], accepted]]
    value: Float64 = later + known.table.draft[row, column]
    return value
