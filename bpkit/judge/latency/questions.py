"""What a policy is asked in a live decoder: contexts and drafts of real prompts, kept one by one, joined to batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bpkit.decode.clock import WallClock
from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Seconds, Step

Answer = TypeVar("Answer")
Timed = Literal["begin", "select", "extend", "truncate", "observe", "step"]
"""Methods of a policy, and all that a step asks of it: `select`, `extend` for each token, `truncate`, `observe`."""
TIMED: tuple[Timed, ...] = get_args(Timed)


@dataclass
class Question:
    """What a policy is asked: how a request began, and a step of it. Of batch 1, or of several requests joined."""

    begin: Context
    context: Context | None = None
    draft: Draft | None = None
    step: Step | None = None

    def source(self, method: Timed) -> Context | Draft | Step:
        """What the method is handed."""
        source = {"begin": self.begin, "select": self.context, "observe": self.step}.get(method, self.draft)
        assert source is not None
        return source


class Recorder(Policy):
    """Lets a policy decide in the loop, keeps what it was asked, and times it there.

    Args:
        wants: features to keep that the policy itself does not read.

    Attributes:
        begun, steps: of every request its beginning and its steps. seconds: of each call, by method, and of the calls
            of each step together.
    """

    wants = frozenset()

    def __init__(self, policy: Policy, wants: frozenset[Feature] = frozenset()) -> None:
        super().__init__(PolicyConfig())
        self.policy = policy
        self.wants = policy.wants | wants  # type: ignore[misc]
        self.wants_optional = policy.wants_optional  # type: ignore[misc]
        self.begun: list[Question] = []
        self.steps: list[Question] = []
        self.seconds: dict[Timed, list[float]] = {method: [] for method in TIMED}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.policy.bind(decoder, cost)

    def begin(self, context: Context) -> State:
        self.begun.append(Question(replace(context, features=_cloned(context.features))))
        return self._timed("begin", context, lambda: self.policy.begin(context))

    def select(self, state: State, context: Context) -> Tensor:
        self.steps.append(Question(self.begun[-1].begin, replace(context, features=_cloned(context.features))))
        self.seconds["step"].append(0.0)
        return self._timed("select", context, lambda: self.policy.select(state, context))

    def extend(self, state: State, draft: Draft) -> Tensor:
        return self._timed("extend", draft.context, lambda: self.policy.extend(state, draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        step = self.steps[-1]
        assert step.context is not None
        step.draft = replace(draft, context=step.context, logits=None, features=_cloned(draft.features))
        return self._timed("truncate", draft.context, lambda: self.policy.truncate(state, draft))

    def observe(self, state: State, step: Step) -> None:
        self.steps[-1].step = step
        self._timed("observe", self.steps[-1].begin, lambda: self.policy.observe(state, step))

    def end(self, state: State) -> None:
        self.policy.end(state)

    def of(self, method: Timed) -> list[Question]:
        """The rows that a method can be asked about."""
        if method == "begin":
            return self.begun
        if method == "select":
            return [Question(row.begin, row.context) for row in self.steps]
        if method in ("extend", "truncate"):
            return [row for row in self.steps if row.draft is not None]
        return [row for row in self.steps if row.step is not None]

    def _timed(self, method: Timed, context: Context, ask: Callable[[], Answer]) -> Answer:
        now = WallClock(context.position.device, wait=True).now
        started = now()
        answer = ask()
        spent = now() - started
        self.seconds[method].append(spent)
        if method != "begin":
            self.seconds["step"][-1] += spent
        return answer


def mixed(rows: Sequence[Question]) -> list[Question]:
    """The rows in an order at random, always the same: rows that run together are of unlike requests."""
    return Random(0).sample(rows, len(rows))


def batches(rows: Sequence[Question], size: int) -> list[Question]:
    """The rows in batches of `size`; the last, and where there are too few the only one, is filled from the first."""
    count = -(-len(rows) // size) * size
    chosen = [rows[place % len(rows)] for place in range(count)]
    return [joined(chosen[start : start + size]) for start in range(0, count, size)]


def joined(rows: Sequence[Question]) -> Question:
    """One batch of rows of one kind; drafts and the tokens of steps are padded to the longest."""
    begin = _contexts([row.begin for row in rows])
    contexts = [row.context for row in rows if row.context is not None]
    if not contexts:
        return Question(begin)
    context = _contexts(contexts)
    steps = [row.step for row in rows if row.step is not None]
    return Question(begin, context, _drafts(context, [row.draft for row in rows]), _steps(steps) if steps else None)


def _contexts(contexts: Sequence[Context]) -> Context:
    counts = _together(contexts, "position", "remaining", "context_length")
    names = contexts[0].features
    features = {name: torch.cat([each.features[name] for each in contexts]) for name in names}
    return replace(contexts[0], **counts, features=features, running=len(contexts))


def _drafts(context: Context, drafts: Sequence[Draft | None]) -> Draft | None:
    """Those of all rows, of which some may have none; None if nobody drafted."""
    like = next((draft for draft in drafts if draft is not None), None)
    if like is None:
        return None
    nothing = replace(like.first(0), block_size=torch.ones_like(like.block_size))
    each = [draft or nothing for draft in drafts]
    features = {name: _padded([draft.features[name] for draft in each]) for name in like.features}
    tokens = _padded([draft.tokens for draft in each])
    return Draft(context, **_together(each, "block_size", "draft_length"), tokens=tokens, features=features)


def _steps(steps: Sequence[Step]) -> Step:
    """One step of all rows: the time is theirs together."""
    counts = _together(steps, "block_size", "draft_length", "verify_length", "num_accepted", "position")
    seconds = sum((step.seconds for step in steps), Seconds())
    ties = tuple(count for step in steps for count in step.near_ties)
    return replace(steps[0], **counts, tokens=_padded([s.tokens for s in steps]), seconds=seconds, near_ties=ties)


def _together(rows: Sequence[Any], *names: str) -> dict[str, Any]:
    """These attributes of all rows."""
    return {name: torch.cat([getattr(row, name) for row in rows]) for name in names}


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """[1, width, ...] each, as one, with zeros up to the widest."""
    widest = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, 0) * (row.ndim - 2) + (0, widest - row.shape[1])) for row in rows])


def _cloned(features: Mapping[Feature, Tensor]) -> dict[Feature, Tensor]:
    return {name: value.clone() for name, value in features.items()}
