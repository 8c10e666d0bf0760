"""Where a policy's time goes that the best choices would not have taken, step by step and exactly.

Let V be the least seconds from a state (position and waiting) to the end of the output, as the oracle's plan has them,
and Q(b, v) the seconds of drafting at size *b* and verifying *v* drafted tokens there, plus V of where that leads. A
step's regret Q(b, v) - V is never negative, and sums over the steps of any policy to their seconds less V of the first
state (the performance difference lemma; Kakade & Langford 2002). It has two parts, of which neither is negative:

    Q(b, v) - V  =  (Q(b, v) - min over v' of Q(b, v'))  +  (min over v' of Q(b, v') - V)
                     verified too much or too little          drafted too small or too large

Where there are several sources, *b* is a size of one of them, and the second part is by another name if the oracle
drafts from another source there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bpkit.trace.oracle.paths import Hindsight
from bpkit.trace.oracle.plan import Float64, Int64, Solution, Works, array_cost, waited_on, works_of
from bpkit.trace.records import Ints, PromptTrace, Taken
from bpkit.types import CostModel, of_source

KINDS = ("drafted_too_small", "drafted_too_large", "verified_too_much", "verified_too_little")
"""Of regret. No draft is the smallest draft."""
OTHER_SOURCE = "other_source"
"""Of regret, too, where there are several sources: drafted from another source than the oracle."""
ROUNDING = 1e-9
"""Negative regret of less than this part of V is rounding."""
NO_DRAFT = -1


def kinds(sources: int) -> tuple[str, ...]:
    """The kinds of regret where there are so many sources of drafts."""
    return KINDS if sources == 1 else (*KINDS, OTHER_SOURCE)


class NotTraced(ValueError):
    """A step drafted at a size that is not in the trace, so that its value is not known."""


def step_regret(prompt: PromptTrace, work: Works, known: Hindsight, taken: Taken) -> Float64:
    """Seconds of regret of each step by `kinds`, float64 [steps, kinds].

    They sum to what the cost model says of the steps, without features, less `known.seconds`.

    Args:
        known: `oracle_step_truncate` of the same prompt and drafters under the cost model in question.

    Raises:
        NotTraced: autoregressive drafts that a policy ended at a length that is no traced block size less one.
    """
    plan, table, row = known.plan, known.plan.table, taken.position - 1
    column = _columns(prompt, work, taken)
    state = _states(work, taken, column, table.waiting)
    least, size = plan.seconds[row, state], np.ones(len(row), np.int64)
    draft, verify, width = np.zeros(len(row)), np.zeros(len(row)), np.zeros(len(row), np.int64)

    plain = column == NO_DRAFT
    later = waited_on(table.columns, 1)[state[plain]]
    draft[plain] = table.no_draft[row[plain]] + plan.seconds[row[plain] + 1, later] - least[plain]

    for source, steps in enumerate(table.sources):
        drafted = ~plain & (taken.source == source)
        if not drafted.any():
            continue
        value = _values(prompt, plan, source, row[drafted], column[drafted], state[drafted])  # [steps, width + 1]
        best, chosen = value.min(axis=1), np.take_along_axis(value, taken.verify_length[drafted][:, None], 1)[:, 0]
        verify[drafted], width[drafted] = chosen - best, value.argmin(axis=1)
        waited = state[drafted] if steps.catch_up.shape[1] > 1 else 0
        draft[drafted] = best + steps.catch_up[row[drafted], waited] - least[drafted]
        size[drafted] = steps.block_sizes[column[drafted]]

    best_size = plan.block_size[row, state]
    other = (size > 1) & (best_size > 1) & (plan.source[row, state] != taken.source)
    small, much = size < best_size, taken.verify_length > width
    draft[(draft < 0) & (draft > -ROUNDING * least)] = 0.0
    parts = [draft * small * ~other, draft * ~small * ~other, verify * much, verify * ~much, draft * other]
    return np.stack(parts[: len(kinds(len(table.sources)))], axis=1)


def tree_regret(prompt: PromptTrace, work: Works, cost: CostModel, known: Hindsight, taken: Taken) -> Float64:
    """The same of steps that verified nodes of trees.

    What a step takes longer than verifying the path that it found, and no other node, was verified too much. Beyond
    that its value is that of a chain of as many tokens.

    Args:
        prompt: `along_paths`. known: its `oracle_step_truncate`.
    """
    size, length = np.maximum(taken.draft_size, 1), np.maximum(taken.draft_size - 1, 0)
    for source, drafts in enumerate(prompt.sources):
        if drafts.parents is not None:  # of each size its own tree was traced
            drafted = np.flatnonzero((taken.draft_length > 0) & (taken.source == source))
            size[drafted] = taken.block_size[drafted]
            columns = [drafts.column(asked) for asked in size[drafted].tolist()]
            length[drafted] = drafts.draft_length[taken.position[drafted] - 1, columns]
    path = replace(taken, block_size=size, draft_length=length, verify_length=taken.num_accepted)
    found = step_regret(prompt, work, known, path)
    prices, at = array_cost(cost), prompt.prompt_length + taken.position
    aside = prices.array("verify", taken.verify_length + 1, at) - prices.array("verify", taken.num_accepted + 1, at)
    found[:, KINDS.index("verified_too_much")] += aside
    return found


def features_seconds(prompt: PromptTrace, cost: CostModel, taken: Taken) -> float:
    """What the features that the steps wanted cost: oracles go without."""
    if not taken.features:
        return 0.0
    spent = 0.0
    for source in np.unique(taken.source[taken.draft_length > 0]).tolist():
        drafted = (taken.draft_length > 0) & (taken.source == source)
        at = prompt.prompt_length + taken.position[drafted]
        own = array_cost(of_source(cost, source))
        spent += float(own.array("features", taken.draft_size[drafted], at).sum())
    return spent


def _columns(prompt: PromptTrace, work: Works, taken: Taken) -> Int64:
    """Of the tables that each step drafted from, `NO_DRAFT` where nothing was drafted: int64 [steps]."""
    works = works_of(work)

    def column(row: int, block_size: int, length: int, source: int) -> int:
        if block_size == 1 or length == 0:
            return NO_DRAFT
        drafts = prompt.sources[source]
        asked = drafts.column(block_size)
        if not works[source].may_end_early or drafts.draft_length[row, asked] == length:
            return asked
        try:  # ended early, it is the draft of a smaller size
            return drafts.column(length + 1)
        except KeyError:
            raise NotTraced(
                f"drafts were ended after {length} tokens, and block size {length + 1} is not traced"
            ) from None

    steps = np.stack([taken.position - 1, taken.block_size, taken.draft_length, taken.source], axis=1).tolist()
    return np.array([column(*step) for step in steps], np.int64)


def _states(work: Works, taken: Taken, column: Int64, waiting: int | None) -> Int64:
    """Column of `Solution.seconds` before each step: 0 before the first draft of the source that waits, then what
    waits for it. int64 [steps].
    """
    state, found, works = 0, [], works_of(work)
    steps = (column, taken.source, taken.draft_length, taken.num_accepted)
    for at, source, length, accepted in zip(*(values.tolist() for values in steps), strict=True):
        found.append(state)
        if at != NO_DRAFT and source == waiting:
            state = works[source].after_draft(length, accepted)
        elif state:
            state += accepted + 1
    return np.array(found, np.int64)


def _values(prompt: PromptTrace, plan: Solution, source: int, row: Ints, column: Int64, state: Int64) -> Float64:
    """Q, without catching up, by tokens verified; infinite where so many are not there: [steps, width + 1]."""
    steps, drafts, values = plan.table.sources[source], prompt.sources[source], plan.seconds
    verified = np.arange(steps.draft.shape[2])
    stands = np.minimum(verified, drafts.num_accepted[row, column][:, None])
    later = [steps.later(int(at), values) for at in row]
    ahead = np.stack(
        [
            each[size if len(each) > 1 else 0, accepted, before if each.shape[2] > 1 else 0]
            for each, size, accepted, before in zip(later, column.tolist(), stands, state.tolist(), strict=True)
        ]
    )
    return ahead + steps.draft[row, column]
