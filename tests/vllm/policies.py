"""Policies that the engine's tests decide with: unruly sizes, ragged cuts, and such as fail."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bpkit import Policy
from bpkit.policy import State
from bpkit.types import Context, DecoderSpec, Draft, Step


class Unruly(Policy):
    """Sizes and cuts at random, other ones for each row and step, 1 and 0 among them; counts its rows' steps."""

    wants = frozenset()

    def bind(self, decoder: DecoderSpec, cost: Any = None) -> None:
        self.most = decoder.max_block_size
        self.random = torch.Generator().manual_seed(0)
        self.begun = self.ended = 0
        self.seen: set[int] = set()

    def begin(self, context: Context) -> State:
        self.begun += context.batch_size
        return {"steps": torch.zeros(context.batch_size, dtype=torch.long)}

    def select(self, state: State, context: Context) -> Tensor:
        return torch.randint(1, self.most + 1, (context.batch_size,), generator=self.random)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return (torch.rand(len(draft.draft_length), generator=self.random) * (draft.draft_length + 1)).long()

    def observe(self, state: State, step: Step) -> None:
        state["steps"] += 1
        self.seen.update(step.verify_length.tolist())

    def end(self, state: State) -> None:
        self.ended += len(state["steps"])


class Raises(Unruly):
    """Fails in every place, half of the time."""

    def begin(self, context: Context) -> State:
        self.fail()
        return super().begin(context)

    def select(self, state: State, context: Context) -> Tensor:
        self.fail()
        return super().select(state, context)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        self.fail()
        return super().truncate(state, draft)

    def observe(self, state: State, step: Step) -> None:
        self.fail()

    def end(self, state: State) -> None:
        self.fail()

    def fail(self) -> None:
        if torch.rand(1, generator=self.random) < 0.5:
            raise ArithmeticError("no idea")


class Nonsense(Unruly):
    """Sizes below 1 and far above the most, cuts below 0 and beyond the draft, in turn; then no sizes at all."""

    turn = 0

    def select(self, state: State, context: Context) -> Tensor:
        self.turn += 1
        answers = (context.full(-3), context.full(999), context.full(2)[:0], context.full(4) * float("nan"))
        return answers[self.turn % 4]

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return draft.draft_length + (99 if self.turn % 2 else -99)


class Slow(Unruly):
    """Takes its time for each decision; counts those that it was asked for."""

    asked = 0

    def select(self, state: State, context: Context) -> Tensor:
        self.asked += 1
        time.sleep(0.11)
        return super().select(state, context)
