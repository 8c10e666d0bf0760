"""What a policy is asked in a live decoder: contexts and drafts of real prompts, kept row by row, joined to batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from bpkit.export.core import Method
from bpkit.judge.wall_clock.decoders import wall_clock
from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step

Answer = TypeVar("Answer")


@dataclass
class Row:
    """One row of a batch: how its request began, and a step of it.

    Attributes:
        begin, context, draft: of batch 1. In a `Row` of several rows, of their batch.
    """

    begin: Context
    context: Context | None = None
    draft: Draft | None = None


class Recorder(Policy):
    """Lets a policy decide in the loop, keeps what it was asked, and times it there.

    Args:
        wants: features to keep that the policy itself does not read.

    Attributes:
        rows: of every request its beginning and its steps. seconds: of each call, by method.
    """

    wants = frozenset()

    def __init__(self, policy: Policy, wants: frozenset[Feature] = frozenset()) -> None:
        super().__init__(PolicyConfig())
        self.policy = policy
        self.wants = policy.wants | wants  # type: ignore[misc]
        self.wants_optional = policy.wants_optional  # type: ignore[misc]
        self.begun: list[Row] = []
        self.steps: list[Row] = []
        self.seconds: dict[Method, list[float]] = {"begin": [], "select": [], "extend": [], "truncate": []}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.policy.bind(decoder, cost)

    def begin(self, context: Context) -> State:
        self.begun.append(Row(_kept(context)))
        return self._timed("begin", context, lambda: self.policy.begin(context))

    def select(self, state: State, context: Context) -> Tensor:
        self.steps.append(Row(self.begun[-1].begin, _kept(context)))
        return self._timed("select", context, lambda: self.policy.select(state, context))

    def extend(self, state: State, draft: Draft) -> Tensor:
        return self._timed("extend", draft.context, lambda: self.policy.extend(state, draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        row = self.steps[-1]
        assert row.context is not None
        row.draft = replace(draft, context=row.context, logits=None, features=_cloned(draft.features))
        return self._timed("truncate", draft.context, lambda: self.policy.truncate(state, draft))

    def observe(self, state: State, step: Step) -> None:
        self.policy.observe(state, step)

    def end(self, state: State) -> None:
        self.policy.end(state)

    def of(self, method: Method) -> list[Row]:
        """The rows that a method can be asked about."""
        if method == "begin":
            return self.begun
        if method == "select":
            return [Row(row.begin, row.context) for row in self.steps]
        return _of_one_width([row for row in self.steps if row.draft is not None])

    def _timed(self, method: Method, context: Context, ask: Callable[[], Answer]) -> Answer:
        device = context.position.device
        started = wall_clock(device)
        answer = ask()
        self.seconds[method].append(wall_clock(device) - started)
        return answer


def batches(rows: Sequence[Row], size: int) -> list[Row]:
    """The rows in batches of `size`; the last, and where there are too few the only one, is filled from the first."""
    count = -(-len(rows) // size) * size
    chosen = [rows[place % len(rows)] for place in range(count)]
    return [joined(chosen[start : start + size]) for start in range(0, count, size)]


def joined(rows: Sequence[Row]) -> Row:
    """One batch of rows of one kind, drafts of one width."""
    begin = _contexts([row.begin for row in rows])
    if rows[0].context is None:
        return Row(begin)
    context = _contexts([row.context for row in rows if row.context is not None])
    if rows[0].draft is None:
        return Row(begin, context)
    drafts = [row.draft for row in rows if row.draft is not None]
    draft = Draft(
        context=context,
        block_size=torch.cat([d.block_size for d in drafts]),
        draft_length=torch.cat([d.draft_length for d in drafts]),
        tokens=torch.cat([d.tokens for d in drafts]),
        features=_stacked([d.features for d in drafts]),
    )
    return Row(begin, context, draft)


def _contexts(contexts: Sequence[Context]) -> Context:
    first = contexts[0]
    return replace(
        first,
        position=torch.cat([c.position for c in contexts]),
        remaining=torch.cat([c.remaining for c in contexts]),
        context_length=torch.cat([c.context_length for c in contexts]),
        features=_stacked([c.features for c in contexts]),
    )


def _stacked(features: Sequence[Mapping[Feature, Tensor]]) -> dict[Feature, Tensor]:
    return {name: torch.cat([each[name] for each in features]) for name in features[0]}


def _kept(context: Context) -> Context:
    return replace(context, features=_cloned(context.features))


def _cloned(features: Mapping[Feature, Tensor]) -> dict[Feature, Tensor]:
    return {name: value.clone() for name, value in features.items()}


def _of_one_width(rows: list[Row]) -> list[Row]:
    """Those with the commonest draft length: rows of other widths make no batch."""
    widths = Counter(row.draft.tokens.shape[1] for row in rows if row.draft is not None)
    if not widths:
        return []
    width = widths.most_common(1)[0][0]
    return [row for row in rows if row.draft is not None and row.draft.tokens.shape[1] == width]
