"""What a policy is asked in a live decoder: contexts and drafts of real prompts, kept one by one, joined to batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bpkit.decode.clock import WallClock
from bpkit.export.core import DECIDES, Method
from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step

Answer = TypeVar("Answer")


@dataclass
class Question:
    """What a policy is asked: how a request began, and a step of it. Of batch 1, or of several requests joined."""

    begin: Context
    context: Context | None = None
    draft: Draft | None = None

    def source(self, method: Method) -> Context | Draft:
        """What the method is handed."""
        source = self.begin if method == "begin" else self.context if method == "select" else self.draft
        assert source is not None
        return source


class Recorder(Policy):
    """Lets a policy decide in the loop, keeps what it was asked, and times it there.

    Args:
        wants: features to keep that the policy itself does not read.

    Attributes:
        begun, steps: of every request its beginning and its steps. seconds: of each call, by method.
    """

    wants = frozenset()

    def __init__(self, policy: Policy, wants: frozenset[Feature] = frozenset()) -> None:
        super().__init__(PolicyConfig())
        self.policy = policy
        self.wants = policy.wants | wants  # type: ignore[misc]
        self.wants_optional = policy.wants_optional  # type: ignore[misc]
        self.begun: list[Question] = []
        self.steps: list[Question] = []
        self.seconds: dict[Method, list[float]] = {method: [] for method in DECIDES}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.policy.bind(decoder, cost)

    def begin(self, context: Context) -> State:
        self.begun.append(Question(replace(context, features=_cloned(context.features))))
        return self._timed("begin", context, lambda: self.policy.begin(context))

    def select(self, state: State, context: Context) -> Tensor:
        self.steps.append(Question(self.begun[-1].begin, replace(context, features=_cloned(context.features))))
        return self._timed("select", context, lambda: self.policy.select(state, context))

    def extend(self, state: State, draft: Draft) -> Tensor:
        return self._timed("extend", draft.context, lambda: self.policy.extend(state, draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        step = self.steps[-1]
        assert step.context is not None
        step.draft = replace(draft, context=step.context, logits=None, features=_cloned(draft.features))
        return self._timed("truncate", draft.context, lambda: self.policy.truncate(state, draft))

    def observe(self, state: State, step: Step) -> None:
        self.policy.observe(state, step)

    def end(self, state: State) -> None:
        self.policy.end(state)

    def of(self, method: Method) -> list[Question]:
        """The rows that a method can be asked about."""
        if method == "begin":
            return self.begun
        if method == "select":
            return [Question(row.begin, row.context) for row in self.steps]
        # Those with the commonest draft length: drafts of other widths make no batch.
        by_width: defaultdict[int, list[Question]] = defaultdict(list)
        for question in self.steps:
            if question.draft is not None:
                by_width[question.draft.tokens.shape[1]].append(question)
        return max(by_width.values(), key=len, default=[])

    def _timed(self, method: Method, context: Context, ask: Callable[[], Answer]) -> Answer:
        now = WallClock(context.position.device, wait=True).now
        started = now()
        answer = ask()
        self.seconds[method].append(now() - started)
        return answer


def batches(rows: Sequence[Question], size: int) -> list[Question]:
    """The rows in batches of `size`; the last, and where there are too few the only one, is filled from the first."""
    count = -(-len(rows) // size) * size
    chosen = [rows[place % len(rows)] for place in range(count)]
    return [joined(chosen[start : start + size]) for start in range(0, count, size)]


def joined(rows: Sequence[Question]) -> Question:
    """One batch of rows of one kind, drafts of one width."""
    begin = _contexts([row.begin for row in rows])
    if rows[0].context is None:
        return Question(begin)
    context = _contexts([row.context for row in rows if row.context is not None])
    if rows[0].draft is None:
        return Question(begin, context)
    drafts = [row.draft for row in rows if row.draft is not None]
    return Question(begin, context, Draft(context, **_together(drafts, "block_size", "draft_length", "tokens")))


def _contexts(contexts: Sequence[Context]) -> Context:
    return replace(contexts[0], **_together(contexts, "position", "remaining", "context_length"))


def _together(rows: Sequence[Context] | Sequence[Draft], *names: str) -> dict[str, Any]:
    """These attributes of all rows, and their features."""
    features = [row.features for row in rows]
    joined = {name: torch.cat([each[name] for each in features]) for name in features[0]}
    return {"features": joined, **{name: torch.cat([getattr(row, name) for row in rows]) for name in names}}


def _cloned(features: Mapping[Feature, Tensor]) -> dict[Feature, Tensor]:
    return {name: value.clone() for name, value in features.items()}
