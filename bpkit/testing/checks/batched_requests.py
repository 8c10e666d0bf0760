"""Recordings of single requests, laid side by side as an engine would hand them over together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bpkit.decode.guard import kind_of
from bpkit.policy import State
from bpkit.testing.checks.recorder import Recording
from bpkit.testing.checks.records import Asked, asked_anew, joined, same
from bpkit.testing.checks.setup import Case
from bpkit.types import Context, Draft, Seconds, Step


@dataclass
class RecordedStep:
    """One step of one request; draft and step only where the policy was asked or told."""

    context: Context
    draft: Draft | None = None
    step: Step | None = None

    def cut(self, length: int) -> Draft | None:
        """Its draft with no more than so many tokens.

        A block of a block-diffusion drafter is then a smaller one, as `select` may ask for in another row. Others
        propose fewer tokens than the block has room for.
        """
        if self.draft is None or self.draft.tokens.shape[1] <= length:
            return self.draft
        draft = self.draft.first(length)
        if draft.context.spec.work.passes == "one":
            draft = dataclasses.replace(draft, block_size=draft.draft_length + 1)
        return draft


@dataclass(eq=False)
class BatchedRequest:
    """One request, decoded by itself, in a batch: steps `done` there, and its state had it been `alone`."""

    case: Case
    begin: Context
    steps: list[RecordedStep] = field(default_factory=list)
    done: int = 0
    alone: State = field(default_factory=dict)

    @property
    def step(self) -> RecordedStep:
        """The one at hand."""
        return self.steps[self.done]


def batched(recording: Recording) -> BatchedRequest:
    """The steps of a recording, which begins with `begin`."""
    first, *calls = recording.calls
    assert isinstance(first.given, Context)
    made = BatchedRequest(recording.case, first.given)
    for call in calls:
        if isinstance(call.given, Context):
            made.steps.append(RecordedStep(call.given))
        elif isinstance(call.given, Draft):
            made.steps[-1].draft = call.given
        elif isinstance(call.given, Step):
            made.steps[-1].step = call.given
    return made


def side_by_side(given: Sequence[Asked], seed: int) -> Asked:
    """One record of several requests, with a generator of its own."""
    return asked_anew(joined(given), seed)


def drafts_of(contexts: Sequence[Context], drafts: Sequence[Draft | None], seed: int) -> Draft | None:
    """One draft of several requests, padded to the longest; None if nobody drafted."""
    like = next((draft for draft in drafts if draft is not None), None)
    if like is None:
        return None
    nothing = dataclasses.replace(like.first(0), block_size=torch.ones_like(like.block_size))
    pairs = zip(contexts, drafts, strict=True)
    return side_by_side([dataclasses.replace(draft or nothing, context=context) for context, draft in pairs], seed)


def steps_of(steps: Sequence[Step], seconds: Seconds) -> Step:
    """One step of several requests that took so long together."""
    return dataclasses.replace(joined(steps), seconds=seconds, fallbacks=0, near_ties=())


def state_rows(state: State, places: Sequence[int]) -> State:
    """Some rows of a state, in this order, as an engine takes them."""
    return {name: value[list(places)].clone() for name, value in state.items()}


def bad_state(state: object, rows: int) -> str | None:
    """What keeps a state from being moved row by row."""
    if not isinstance(state, dict):
        return f"the state is {kind_of(state)}, not a dict of tensors"
    for name, value in state.items():
        if not isinstance(value, Tensor):
            return f"state[{name!r}] is {kind_of(value)}, not a tensor: the runtime cannot move rows of it"
        if value.ndim == 0 or value.shape[0] != rows:
            return f"state[{name!r}] has shape {list(value.shape)} for {rows} requests: the batch axis comes first"
    return None


def unlike(one: State, other: State) -> str | None:
    """The name of a tensor that differs by more than rounding, if there is one in both."""
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.shape == b.shape and a.is_floating_point() and b.is_floating_point():
            if not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
                return name
        elif not same(a, b):
            return name
    return None
