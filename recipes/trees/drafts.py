"""What is kept of traced drafts with candidates: enough to say how many tokens of any tree would be accepted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.oracle import budgets
from bpkit.trace.oracle.trees import room, sum_taken
from bpkit.trace.records import CandidateTable, Ints, PromptTrace

Floats = NDArray[np.float64]

MOST = 64
"""Nodes of the largest trees."""
THRESHOLDS = np.geomspace(1.0, 1e-7, 240)
"""Chances of standing above which nodes are verified, where the number of nodes is one on average."""


@dataclass(frozen=True)
class KeptDrafts:
    """Of one prompt.

    Attributes:
        tokens: that its steps yield.
        sizes: traced block sizes. room: tokens that can be accepted at each position, int32 [rows].
        ranks: of the output's own tokens, as in `CandidateTable`, int32 [rows, sizes, width].
        best_first: `budgets.of_best_first` of each size, int32 [rows, sizes, width]; of the largest size up to `MOST`
            nodes, of others as many as the block has tokens.
        chains: steps, and tokens verified in them, of chains of each size that are cut by `THRESHOLDS`, int64
            [2, sizes, thresholds]. trees: the same of nodes, of drafts of the largest size, int64 [2, thresholds].
    """

    domain: str
    tokens: int
    sizes: Sequence[int]
    room: Ints
    ranks: Ints
    best_first: Ints
    chains: NDArray[np.int64]
    trees: NDArray[np.int64]

    def column(self, size: int) -> int:
        """Of a traced size."""
        return list(self.sizes).index(size)


def kept(prompts: Iterable[PromptTrace], branches: int) -> Iterable[KeptDrafts]:
    """What is kept of prompts that have steps, one after the other.

    Raises:
        ValueError: their drafts were traced without candidates.
    """
    for prompt in prompts:
        candidates = prompt.drafts.candidates
        if candidates is None:
            raise ValueError("trees are replayed from traces of --drafter block-diffusion:branches=16 or the like")
        if prompt.decided_by_steps:
            yield _kept(prompt, candidates, branches)


def _kept(prompt: PromptTrace, candidates: CandidateTable, branches: int) -> KeptDrafts:
    sizes, most = prompt.drafts.block_sizes.tolist(), room(prompt.drafts.rows)
    nodes = [*(size - 1 for size in sizes[:-1]), MOST]
    trees = [budgets.of_best_first(candidates, column, count, branches) for column, count in enumerate(nodes)]
    return KeptDrafts(
        prompt.domain,
        prompt.decided_by_steps,
        sizes,
        most,
        candidates.ranks,
        np.stack([places for places, _ in trees], axis=1),
        np.stack([_cut_chains(candidates, column, most) for column in range(len(sizes))], axis=1),
        _cut_trees(*trees[-1], most),
    )


def _cut_chains(candidates: CandidateTable, column: int, most: Ints) -> NDArray[np.int64]:
    chances: Floats = np.nan_to_num(candidates.chances[:, column, :, 0].astype(np.float64))
    reached: Floats = np.asarray(np.cumprod(chances, axis=1), np.float64)
    stands = np.logical_and.accumulate(candidates.ranks[:, column] == 0, axis=1)
    return _totals(reached, reached * stands, most)


def _cut_trees(places: Ints, reached: Floats, most: Ints) -> NDArray[np.int64]:
    """Of the best `MOST` nodes those above each threshold, which are a tree."""
    standing = np.take_along_axis(reached, np.minimum(places, MOST - 1).astype(np.int64), axis=1)
    return _totals(reached, np.where(places < MOST, standing, 0.0), most)


def _totals(reached: Floats, standing: Floats, most: Ints) -> NDArray[np.int64]:
    """Steps and nodes by threshold, int64 [2, thresholds].

    Args:
        reached: chances of nodes, float64 [rows, nodes]. standing: of those on the output's path, by depth.
    """
    verified = np.stack([(reached > least).sum(axis=1) for least in THRESHOLDS], axis=1)
    found = np.stack([(standing > least).sum(axis=1) for least in THRESHOLDS], axis=1)
    accepted = np.minimum(found, most[:, None])
    return np.stack([sum_taken(accepted, np.ones_like(verified)), sum_taken(accepted, verified)])
