"""One pass over all prompts of a trace: what every fixed block size takes, and what prompts look like before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.evaluation.play import Array, Runs
from bpkit.judge.progress import Progress
from bpkit.trace.cost import CostTable
from bpkit.trace.oracle import fixed_path
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Survey:
    """Of all prompts whose output has at least two tokens: in the others nothing is left to decide.

    Attributes:
        places: of the prompts in the trace, int64 [prompts].
        sizes: 1 and every traced block size.
        tokens: that steps yield, float64 [prompts].
        steps, seconds: of each fixed size, float64 [prompts, sizes]; seconds by cost model.
        features: `prefill_hidden` and `prefill_entropy`, float64 [prompts, dims].
        near_ties: output positions that another verify width might decide otherwise, int64 [prompts].
        left_out: prompts with shorter outputs.
        sampled: whether the trace knows the chance of a match.
    """

    places: Indices
    ids: list[str]
    domains: list[str]
    sizes: tuple[int, ...]
    tokens: Array
    steps: Array
    seconds: dict[str, Array]
    features: Array
    near_ties: Indices
    left_out: int
    sampled: bool

    def fixed(self, cost: str, size: int, prompts: Sequence[int] | Indices) -> Runs:
        """A fixed size on some prompts."""
        rows, column = np.asarray(prompts, np.int64), self.sizes.index(size)
        return Runs(self.tokens[rows], self.steps[rows, column], self.seconds[cost][rows, column])

    def best_fixed(self, cost: str, prompts: Sequence[int] | Indices) -> int:
        """The size with the most tokens per second on these prompts; the smaller of equals."""
        total = self.seconds[cost][np.asarray(prompts, np.int64)].sum(axis=0)
        return self.sizes[int(total.argmin())]

    def best_of_each(self, cost: str, prompts: Sequence[int] | Indices) -> Runs:
        """Each prompt at the size that was fastest on it: the oracle over prompts."""
        rows = np.asarray(prompts, np.int64)
        best = self.seconds[cost][rows].argmin(axis=1)
        return Runs(self.tokens[rows], self.steps[rows, best], self.seconds[cost][rows, best])


def take_survey(
    prompts: Sequence[PromptTrace], kind: str, costs: Mapping[str, CostTable], progress: Progress
) -> Survey:
    """Read every prompt once; none is kept.

    Args:
        kind: of the drafter.

    Raises:
        ValueError: no prompt has an output of two tokens, or prompts were traced at different sizes.
        CostError: a cost model lacks a traced size.
    """
    rows: list[_Row] = []
    left_out, sampled = 0, True
    progress.start("fixed sizes", len(prompts))
    for place, prompt in enumerate(prompts):
        if prompt.decided_by_steps:
            rows.append(_row(place, prompt, kind, costs))
            sampled = sampled and prompt.drafts.match_probability is not None
        else:
            left_out += 1
        progress.tick()
    if not rows:
        raise ValueError("no output of this trace has a second token: there is nothing to decide; trace longer outputs")
    if len({row.sizes for row in rows}) > 1:
        raise ValueError("the prompts were traced at different block sizes: no one size can be compared over them")
    return Survey(
        places=np.array([row.place for row in rows]),
        ids=[row.id for row in rows],
        domains=[row.domain for row in rows],
        sizes=rows[0].sizes,
        tokens=np.array([row.tokens for row in rows], np.float64),
        steps=np.array([row.steps for row in rows], np.float64),
        seconds={name: np.array([row.seconds[name] for row in rows]) for name in costs},
        features=np.stack([row.features for row in rows]),
        near_ties=np.array([row.near_ties for row in rows]),
        left_out=left_out,
        sampled=sampled,
    )


@dataclass(frozen=True)
class _Row:
    """One prompt of a survey."""

    place: int
    id: str
    domain: str
    sizes: tuple[int, ...]
    tokens: int
    steps: list[int]
    seconds: dict[str, list[float]]
    features: Array
    near_ties: int


def _row(place: int, prompt: PromptTrace, kind: str, costs: Mapping[str, CostTable]) -> _Row:
    sizes = (1, *prompt.drafts.block_sizes.tolist())
    paths = {name: [fixed_path(prompt, kind, cost, size) for size in sizes] for name, cost in costs.items()}
    hidden = prompt.features.get(Feature.PREFILL_HIDDEN, np.zeros(0, np.float32))
    return _Row(
        place=place,
        id=prompt.id,
        domain=prompt.domain,
        sizes=sizes,
        tokens=prompt.decided_by_steps,
        steps=[path.steps for path in next(iter(paths.values()))],
        seconds={name: [path.seconds for path in found] for name, found in paths.items()},
        features=np.append(hidden.astype(np.float64), prompt.prefill_entropy),
        near_ties=len(prompt.near_ties),
    )
