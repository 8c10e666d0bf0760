"""Where a policy's time goes that the best choices would not have taken, step by step and exactly.

Let V be the least seconds from a state (position and waiting) to the end of the output, as the oracle's plan has them,
and Q(b, v) the seconds of drafting at size *b* and verifying *v* drafted tokens there, plus V of where that leads. A
step's regret Q(b, v) - V is never negative, and sums over the steps of any policy to their seconds less V of the first
state (the performance difference lemma; Kakade & Langford 2002). It has two parts, of which neither is negative:

    Q(b, v) - V  =  (Q(b, v) - min over v' of Q(b, v'))  +  (min over v' of Q(b, v') - V)
                     verified too much or too little          drafted too small or too large
"""

from __future__ import annotations

import numpy as np

from bpkit.trace.oracle.paths import Hindsight
from bpkit.trace.oracle.plan import Float64, Int64, Solution, array_cost
from bpkit.trace.records import Ints, PromptTrace, Taken
from bpkit.types import CostModel, DraftWork

KINDS = ("drafted_too_small", "drafted_too_large", "verified_too_much", "verified_too_little")
"""Of regret. No draft is the smallest draft."""
ROUNDING = 1e-9
"""Negative regret of less than this part of V is rounding."""
NO_DRAFT = -1


class NotTraced(ValueError):
    """A step drafted at a size that is not in the trace, so that its value is not known."""


def step_regret(prompt: PromptTrace, work: DraftWork, known: Hindsight, taken: Taken) -> Float64:
    """Seconds of regret of each step by `KINDS`, float64 [steps, 4].

    They sum to what the cost model says of the steps, without features, less `known.seconds`.

    Args:
        known: `oracle_step_truncate` of the same prompt and drafter under the cost model in question.

    Raises:
        NotTraced: autoregressive drafts that a policy ended at a length that is no traced block size less one.
    """
    plan, table, row = known.plan, known.plan.table, taken.position - 1
    column = _columns(prompt, work, taken)
    state = _states(prompt, work, taken, column)
    least = plan.seconds[row, state]
    draft, verify, width = np.zeros(len(row)), np.zeros(len(row)), np.zeros(len(row), np.int64)

    plain = column == NO_DRAFT
    later = state[plain] + (state[plain] > 0)
    draft[plain] = table.no_draft[row[plain]] + plan.seconds[row[plain] + 1, later] - least[plain]

    drafted = ~plain
    if drafted.any():
        value = _values(prompt, plan, row[drafted], column[drafted])  # [drafted steps, width + 1]
        best, chosen = value.min(axis=1), np.take_along_axis(value, taken.verify_length[drafted][:, None], 1)[:, 0]
        verify[drafted], width[drafted] = chosen - best, value.argmin(axis=1)
        draft[drafted] = best + table.catch_up[row[drafted], state[drafted]] - least[drafted]

    size = np.where(plain, 1, table.block_sizes[column])
    best_size = np.where(plan.drafts[row, state], plan.block_size[row], 1)
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


def _columns(prompt: PromptTrace, work: DraftWork, taken: Taken) -> Int64:
    """Of the tables that each step drafted from, `NO_DRAFT` where nothing was drafted: int64 [steps]."""
    drafts = prompt.drafts

    def column(row: int, block_size: int, length: int) -> int:
        if block_size == 1 or length == 0:
            return NO_DRAFT
        asked = drafts.column(block_size)
        if not work.may_end_early or drafts.draft_length[row, asked] == length:
            return asked
        try:  # ended early, it is the draft of a smaller size
            return drafts.column(length + 1)
        except KeyError:
            raise NotTraced(
                f"drafts were ended after {length} tokens, and block size {length + 1} is not traced"
            ) from None

    steps = np.stack([taken.position - 1, taken.block_size, taken.draft_length], axis=1).tolist()
    return np.array([column(*step) for step in steps], np.int64)


def _states(prompt: PromptTrace, work: DraftWork, taken: Taken, column: Int64) -> Int64:
    """Column of `Solution.seconds` before each step: 0 before the first draft, then what waits. int64 [steps]."""
    accepted = np.minimum(prompt.drafts.num_accepted[taken.position - 1, column], taken.verify_length).tolist()
    state, found = 0, []
    for at, length, stands in zip(column.tolist(), taken.draft_length.tolist(), accepted, strict=True):
        found.append(state)
        if at != NO_DRAFT:
            state = work.after_draft(length, stands)
        elif state:
            state = work.after_no_draft(state)
    return np.array(found, np.int64)


def _values(prompt: PromptTrace, plan: Solution, row: Ints, column: Int64) -> Float64:
    """Q, without catching up, by tokens verified; infinite where so many are not there: [steps, width + 1]."""
    table, row, column = plan.table, row[:, None], column[:, None]
    accepted = np.minimum(np.arange(table.draft.shape[2]), prompt.drafts.num_accepted[row, column])
    later: Float64 = plan.seconds.ravel()[table.target[row, column, accepted]]
    return later + table.draft[row[:, 0], column[:, 0]]
