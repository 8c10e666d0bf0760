"""What a runtime hands to an exported network, by name: features, counts and cost curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from bpkit.export.core import COUNTS, FEATURES, JOINT_COSTS
from bpkit.export.curves import TYPICAL_CONTEXT, Curves
from bpkit.policy import State
from bpkit.types import Context, CostModel, Draft, DraftWork, Step

Given = dict[str, Tensor]


class CurveRows:
    """One of the cost curves at the context length of each row.

    Args:
        curves: at a context length, one object for many lengths. pick: the curve of these.
    """

    def __init__(self, curves: Callable[[int], Curves], pick: Callable[[Curves], list[float]]) -> None:
        self.curves, self.pick = curves, pick
        self._places: dict[int, tuple[int, Curves]] = {}  # the curves are held, so that ids stay theirs
        self._table = torch.empty(0, 0)

    def __call__(self, context_length: Tensor) -> Tensor:
        """float32 [batch, values], from int64 [batch]."""
        places = [self._place(length) for length in context_length.tolist()]
        return self._table[places[0]][None] if len(places) == 1 else self._table[places]

    def _place(self, context_length: int) -> int:
        curves = self.curves(context_length)
        if id(curves) not in self._places:
            row = torch.tensor(self.pick(curves))[None]
            self._table = torch.cat([self._table, row]) if self._places else row
            self._places[id(curves)] = len(self._places), curves
        return self._places[id(curves)][0]


class JointInputs:
    """The costs of all rows together, and the positions that wait for the drafter, which they depend on.

    Args:
        cost: None for `slope`. block_sizes: from 2 on, ascending. features: whether features of drafts are computed.
    """

    USUAL, NEVER, WAITING = 3, 1e9, "waiting"
    """Positions that wait where few do; seconds of what does not fit; and in the state, positions of each row."""

    def __init__(
        self, cost: CostModel | None, block_sizes: Sequence[int], work: DraftWork, *, features: bool, slope: float
    ) -> None:
        from bpkit.export.position_costs import KeptCosts, PositionCosts

        self.work = work
        self.costs = KeptCosts(PositionCosts, cost, block_sizes, features=features, slope=slope)

    def __call__(self, name: str, context: Context, state: State) -> Tensor:
        """One of `JOINT_COSTS`, float32."""
        costs = self.costs.of(context.batch_size, int(context.context_length.max()))
        if name == "catch_up_seconds":
            waiting = int(state[self.WAITING].max())
            return torch.tensor([costs.catch_up(waiting), costs.catch_up(min(waiting, self.USUAL))])
        seconds = costs.drafting if name == "joint_draft_seconds" else costs.verify
        return torch.from_numpy(seconds).clamp(max=self.NEVER).float()

    def begin(self, context: Context) -> State:
        """Positions that wait in each row that begins, for its state."""
        first = [self.work.first(length - 1) for length in context.context_length.tolist()]
        return {self.WAITING: context.position.new_tensor(first)}

    def observe(self, state: State, step: Step) -> None:
        """Count a step; rows that do not draft are read along by those that do."""
        waiting = state[self.WAITING]
        if step.draft_length.any():
            waiting.copy_(step.num_accepted + 1 if self.work.reads == "features" else int(self.work.waits))
        elif self.work.waits:
            waiting += 1


class Inputs:
    """Makes the inputs of a network from a context, a draft or a step.

    Args:
        names: of the inputs. curves: cost curves at a context length. joint: costs of all rows together.
    """

    def __init__(self, names: Iterable[str], curves: Callable[[int], Curves], joint: JointInputs | None = None) -> None:
        self.names, self.joint = tuple(names), joint
        self.typical = torch.tensor(curves(TYPICAL_CONTEXT).steps)  # float32 [1 + sizes]
        self.seconds = {
            "step_seconds": CurveRows(curves, attrgetter("steps")),
            "verify_seconds": CurveRows(curves, attrgetter("verify")),
            "draft_seconds": CurveRows(curves, attrgetter("draft")),
        }

    def __call__(self, source: Context | Draft | Step, state: State) -> Given:
        """Each input, batch axis first; what is neither a feature, a count nor a cost is looked up in the state."""
        if isinstance(source, Step):
            return {name: getattr(source, name) if name in COUNTS else state[name] for name in self.names}
        context = source.context if isinstance(source, Draft) else source
        return {name: self._one(name, source, context, state) for name in self.names}

    def _one(self, name: str, source: Context | Draft, context: Context, state: State) -> Tensor:
        if name in FEATURES:
            value = (source.predictions or {}).get(name)
            value = source[name] if value is None else value
            if isinstance(source, Draft):
                value = without_padding(value, source.draft_length)
            return value.float() if value.is_floating_point() else value
        if name in ("context_length", "position"):
            of_rows: Tensor = getattr(context, name)
            return of_rows
        if name in ("block_size", "draft_length") and isinstance(source, Draft):
            counts: Tensor = getattr(source, name)
            return counts
        if name == "typical_step_seconds":
            return self.typical
        if name in self.seconds:
            return self.seconds[name](context.context_length)
        if self.joint is not None and name in JOINT_COSTS:
            return self.joint(name, context, state)
        given: Tensor = state[name]
        return given


def without_padding(value: Tensor, draft_length: Tensor) -> Tensor:
    """A feature of drafts, [batch, width, ...], with 0 beyond each row's length, where there may be anything."""
    if len(draft_length) == 1:
        return value
    inside = torch.arange(value.shape[1]) < draft_length[:, None]
    if inside.all():
        return value
    outside = ~inside.to(value.device)
    return value.masked_fill(outside[(...,) + (None,) * (value.ndim - 2)], 0)
