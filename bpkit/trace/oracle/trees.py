"""What trees of drafted tokens could have had accepted: the best nodes of each step in hindsight.

The target's token after every node is fixed, so that in hindsight the nodes that are worth verifying lie on one path,
that of the output's own tokens. It goes as deep as each of them is among the candidates: that is a draft's *reach*. A
step that verifies the first *l* nodes of it yields *l* + 1 tokens, as one of a chain of which as many stand. So oracles
of chains (`bpkit.trace.oracle.paths`), asked of a prompt `along_paths`, are those of trees: whatever tree a policy
drafts and verifies, no step has more accepted for as many nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bpkit.trace.records import CandidateTable, DraftTable, Ints, PromptTrace
from bpkit.types import SourceSpec


def along_paths(prompt: PromptTrace, sources: Sequence[SourceSpec]) -> PromptTrace:
    """The prompt as if each draft were the one path of its tree that is worth verifying.

    Args:
        sources: of its drafts, some of which may have fewer branches than were traced.
    """
    first, *others = map(_along_paths, prompt.sources, sources)
    return replace(prompt, drafts=first, others=tuple(others))


def _along_paths(drafts: DraftTable, source: SourceSpec) -> DraftTable:
    if drafts.candidates is not None:
        return replace(drafts, num_accepted=reach(drafts.candidates, room(drafts.rows), source.branches))
    if drafts.parents is not None:  # its length is what it costs, which no path of it exceeds
        most = source.draft_size(source.max_block_size) - 1
        return replace(drafts, draft_length=np.minimum(drafts.draft_length, most))
    return drafts


def room(rows: int) -> Ints:
    """Tokens that can be accepted at each position: the output's last one is yielded by a step. int32 [rows]."""
    return np.arange(rows - 1, -1, -1, dtype=np.int32)


def reach(candidates: CandidateTable, most: Ints, branches: int) -> Ints:
    """Leading places of each draft at which the output's own token is among the first candidates: int32 [rows, sizes].

    Args:
        most: of each row, int32 [rows]. branches: candidates that count.
    """
    there = (candidates.ranks >= 0) & (candidates.ranks < min(branches, candidates.branches))
    leading = np.logical_and.accumulate(there, axis=2).sum(axis=2)
    return np.asarray(np.minimum(leading, most[:, None]), np.int32)


def fewest_steps(reached: Ints) -> int:
    """Steps that decide an output, at least, if each may have up to so many tokens accepted.

    Args:
        reached: at each position, int32 [rows], as far as the output goes.
    """
    steps = np.zeros(len(reached) + 1, np.int64)
    for row in range(len(reached) - 1, -1, -1):
        steps[row] = 1 + steps[row + 1 : row + 2 + reached[row]].min()
    return int(steps[0])


def steps_taken(accepted: Ints) -> Ints:
    """Steps that decide an output if they have just so many tokens accepted: int64 [...].

    Args:
        accepted: at each position, int32 [rows, ...], as far as the output goes.
    """
    return sum_taken(accepted, np.ones_like(accepted))


def sum_taken(accepted: Ints, values: Ints) -> Ints:
    """Sum over these steps of values at their positions: int64 [...]. Both arguments [rows, ...]."""
    sums = np.zeros((len(accepted) + 1, *accepted.shape[1:]), np.int64)
    for row in range(len(accepted) - 1, -1, -1):
        after = (row + 1 + accepted[row])[None].astype(np.int64)
        sums[row] = values[row] + np.take_along_axis(sums, after, axis=0)[0]
    return np.asarray(sums[0])
