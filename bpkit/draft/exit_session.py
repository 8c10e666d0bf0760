"""Drafting with the target's own keys and values of its first layers, which are computed once for both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bpkit.decode.slot_target import SlotTarget
from bpkit.decode.text import RunningText, padded
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession
from bpkit.draft.newcomers import LONG, newcomers, take_in


class SharedExitSession(AutoregressiveSession):
    """Feeds anchor and drafted tokens through the target's first layers, in the target's slots behind what it holds.

    What these write there is nobody's until the target reads the same tokens. The exit has slots of its own and reads
    hidden states: of decided positions those that the target's passes gave (`advance`), of anchor and drafted tokens
    those that the first layers just gave.

    Args:
        target: the session of the target for the same rows.
        alone: the exit with the target's norm and head, which reads hidden states.
        below: the first layers, which give them.
    """

    reader: SlotTarget

    def __init__(
        self,
        drafter: AutoregressiveDrafter,
        text: RunningText,
        target: SlotTarget,
        alone: PreTrainedModel,
        below: PreTrainedModel,
    ) -> None:
        self.drafter, self.text, self.target = drafter, text, target
        self.alone, self.below = alone, below
        self.reader = self._new_reader(len(text.rows), text.slots)
        self.held = [0] * len(text.rows)
        self.states: list[list[Tensor]] = [[] for _ in text.rows]
        """Hidden states of decided positions that the exit has not read, [count, hidden] each."""

    def advance(self, features: Sequence[Tensor] | None) -> None:
        super().advance(features)
        assert features is not None
        for waiting, more, held, length in zip(self.states, features, self.held, self.text.length, strict=True):
            # The target holds all but the anchor; these are the last of it.
            lacks = length - 1 - held - sum(map(len, waiting))
            waiting.append(more[len(more) - lacks :])

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self.states = [self.states[row] for row in rows]

    def join(self, other: AutoregressiveSession) -> None:
        assert isinstance(other, SharedExitSession)
        super().join(other)
        self.states += other.states

    def _new_reader(self, rows: int, slots: int) -> SlotTarget:
        return SlotTarget(
            self.alone, rows=rows, slots=slots, capacity=self.capacity, feature_layers=(), keep_hidden=True
        )

    def _read_text(self) -> tuple[Tensor, Tensor]:
        rows, anchors = range(len(self.held)), [int(bool(unread)) for unread in self._unread()]
        lacks = [sum(map(len, waiting)) for waiting in self.states]
        apart = newcomers(self.held, lacks)
        if apart:
            reader = self._new_reader(len(apart), len(apart))
            self._catch_up(reader, apart)
            take_in(self.reader, len(lacks), reader, apart)
            lacks = [0 if row in apart else count for row, count in enumerate(lacks)]
        if max(lacks) > LONG:  # logits of all are not wanted
            self._catch_up(self.reader, rows)
        below = self._below(self.text.anchor, anchors, [length - 1 for length in self.text.length])
        states = [torch.cat([*self.states[row], below[row, : anchors[row]]]) for row in rows]
        self.states = [[] for _ in rows]
        counts = [len(row) for row in states]
        logits, hidden = self._note(self.reader.verify(_side_by_side(states), counts), counts)
        last = torch.tensor(counts, device=logits.device).sub(1).clamp(min=0)
        at = torch.arange(len(counts), device=logits.device)
        return logits[at, last][:, None], hidden[at, last][:, None]

    def _catch_up(self, reader: SlotTarget, rows: Sequence[int]) -> None:
        """Let a reader, which holds these rows, read what waits of them."""
        nothing = next(states for waiting in self.states for states in waiting)[:0]
        states = [torch.cat([nothing, *self.states[row]]) for row in rows]
        counts = [len(row) for row in states]
        reader.prefill(_side_by_side(states), counts, last=False)
        for row, count in zip(rows, counts, strict=True):
            self.held[row] += count
            self.states[row] = []

    def _read(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._note(self.reader.verify(self._below(tokens, counts, self.held), counts), counts)

    def _below(self, tokens: Tensor, counts: Sequence[int], held: Sequence[int]) -> Tensor:
        """Hidden states of tokens int64 [rows, width] after the target's first layers, [rows, width, hidden].

        Args:
            held: tokens of each row that come before these.
        """
        return self.target.read_below(self.below, tokens, counts, held)


def _side_by_side(states: Sequence[Tensor]) -> Tensor:
    """[rows, most, hidden] of rows [count, hidden]."""
    return padded([row[None] for row in states])
