"""Timed steps as columns, which figures are made from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bpkit.decode.reread import commits
from bpkit.decode.result import Generation
from bpkit.trace.cost.statistics import trimmed
from bpkit.trace.cost.table import CostTable
from bpkit.types import Prefill, Seconds, Work

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class TimedPrompts(NamedTuple):
    """A pass of the target that read prompts: their tokens, of all rows together, and its seconds."""

    tokens: int
    seconds: float

    @classmethod
    def of(cls, generations: Iterable[Generation]) -> list[TimedPrompts]:
        """The passes in which the prompts of these were read, where they had one length: others take two passes."""
        read: dict[int, tuple[Prefill, list[int]]] = {}
        for generation in generations:
            record, _ = generation.records[0]
            assert isinstance(record, Prefill)
            length = generation.sequences.shape[1] - generation.tokens.shape[1]
            read.setdefault(id(record), (record, []))[1].append(length)
        return [
            cls(sum(lengths), record.seconds.verify)
            for record, lengths in read.values()
            if len(lengths) == len(record.row_ids) and len(set(lengths)) == 1
        ]


@dataclass(frozen=True)
class TimedSteps:
    """Timed steps as columns, each [steps]; see `Work` and `Seconds` for what they are.

    `width` holds the tokens that are read again, too; `draft_positions` and `verify_positions` are without padding.
    """

    draft_size: Ints
    waiting: Ints
    width: Ints
    context_length: Ints
    features: Mask
    rows: Ints
    draft_positions: Ints
    verify_positions: Ints
    draft: Floats
    verify: Floats
    policy: Floats
    rest: Floats

    @classmethod
    def of(cls, timed: Sequence[tuple[Work, Seconds]]) -> TimedSteps:
        """Columns of a list of steps, without those of two target passes. Tokens that are read again widen a pass."""
        timed = [(w, s) for w, s in timed if not commits(w.reread, w.verify_width)]
        done = [
            (
                w.draft_size,
                w.waiting,
                w.verify_width + w.reread,
                w.context_length,
                w.features,
                w.rows,
                w.drafted,
                w.verified + w.rows * w.reread,
            )
            for w, _ in timed
        ]
        spent = [(s.draft, s.verify, s.policy, s.rest) for _, s in timed]
        draft_size, waiting, width, context_length, features, rows, drafted, verified = (
            np.array(done, np.int64).reshape(-1, 8).T
        )
        seconds = np.array(spent, np.float64).reshape(-1, 4).T
        return cls(draft_size, waiting, width, context_length, features > 0, rows, drafted, verified, *seconds)

    def __len__(self) -> int:
        return len(self.width)

    def part(self, chosen: Mask) -> TimedSteps:
        """Some of the steps."""
        return TimedSteps(*(getattr(self, column.name)[chosen] for column in fields(self)))

    def of_rows(self, rows: int) -> TimedSteps:
        """The steps in which so many rows ran."""
        return self.part(self.rows == rows)

    @property
    def drafted(self) -> Mask:
        return self.draft_size > 0

    @property
    def draft_padding(self) -> Ints:
        """Positions of drafts that only fill up rows."""
        return self.rows * self.draft_size - self.draft_positions

    @property
    def verify_padding(self) -> Ints:
        """Positions of the target's pass that only fill up rows."""
        return self.rows * self.width - self.verify_positions

    @property
    def measured(self) -> Floats:
        """Seconds of each step that a cost model answers for: all but the policy's."""
        return self.draft + self.verify + self.rest

    @cached_property
    def rest_of_plain(self) -> Floats:
        """What plain steps took beside the target's pass. Where there was none, steps that verified one position."""
        plain = (self.width == 1) & ~self.drafted
        found: Floats = self.rest[plain if plain.any() else self.width == 1]
        return found

    @cached_property
    def verified(self) -> Floats:
        """Seconds of the target's pass, and of what the rest of a step took longer than in plain steps.

        Sampling and checking go by the verified positions, as the pass does; a table has but one figure for the rest.
        """
        return self.verify + self.rest - trimmed(self.rest_of_plain)[0]

    def modelled(self, cost: CostTable) -> Floats:
        """What a table says of `measured`."""
        drafts = cost.array("draft", self.draft_size, 0, self.rows, self.draft_positions)
        drafts += cost.array("catch_up", self.waiting, 0, self.rows)
        verify = cost.array("verify", self.width, self.context_length, self.rows, self.verify_positions)
        return np.where(self.drafted, drafts, 0.0) + verify + cost.array("rest", 1, 0, self.rows)
