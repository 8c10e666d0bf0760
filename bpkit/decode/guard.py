"""A policy can only cost speed: its faults are mended here, warned of once, and counted.

With `strict=True` (tests, `bpkit check`) the same faults raise.
"""

from __future__ import annotations

import math
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bpkit.decode.host import to_host
from bpkit.decode.trees import TreeShape, closed
from bpkit.policy import Policy, PolicyError, State, overrides
from bpkit.types import Context, DecoderSpec, Draft, Feature, Plan, SourceSpec, Step


class PolicyFault(PolicyError):
    """A policy raised, or returned something that is no decision.

    Args:
        method: that is at fault, where the loop raises it; what it did is then the cause.
    """

    def __init__(self, message: str, method: str = "") -> None:
        super().__init__(message)
        self.method = method


class OutOfRange(PolicyFault):
    """A decision that cannot be followed. `sizes` are block sizes of which only some are too large."""

    def __init__(self, message: str, sizes: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.sizes = sizes


class PolicyFaultWarning(UserWarning):
    """A policy was overruled; the text is not affected, the speed may be."""


class Selected(NamedTuple):
    """What is drafted next, of each row.

    Attributes:
        block_size: 1 .. its source's limit. source: that drafts; 0 at block size 1.
        shapes: trees to draft, of `block_size - 1` nodes, None of rows whose drafter chooses; None if all are.
    """

    block_size: list[int]
    source: list[int]
    shapes: list[TreeShape | None] | None = None


class GuardedPolicy:
    """The policy as the loop sees it: decisions are always valid.

    Args:
        stepwise: ask `truncate` token by token, each time with the draft up to that token only. Under the rejection
            rule a token may not be dropped for what came after it, because what an autoregressive drafter knows of
            later positions depends on that token, and the output would be biased.

    Attributes:
        fallbacks: faults mended so far.
        rows: that run.
        state: of all rows, in their order.
    """

    def __init__(self, policy: Policy, spec: DecoderSpec, *, strict: bool = False, stepwise: bool = False) -> None:
        self.policy, self.spec, self.strict, self.stepwise = policy, spec, strict, stepwise
        self.fallbacks = self.rows = 0
        self.state: State = {}
        self._warned: set[str] = set()
        self._reported = 0
        self.truncates, self.extends = overrides(policy, "truncate"), overrides(policy, "extend")
        self.observes, self.predicts = overrides(policy, "observe"), overrides(policy, "predict")

    def begin(self, context: Context) -> None:
        """Make the state of rows that begin, which are the last from here on."""
        rows = context.batch_size
        before = self.rows
        self.rows += rows
        try:
            state = self.policy.begin(context)
            if not isinstance(state, dict):
                raise PolicyFault(f"it returned {kind_of(state)}, not a dict of tensors")
            self._join(state, before, rows)
        except Exception as error:
            self._mend("begin", error, "an empty state")
            self.state = {}

    def _join(self, state: State, before: int, rows: int) -> None:
        """Take in a state of so many rows, after those that there were. Raises PolicyFault."""
        if before == 0:
            self.state = state
            return
        _refuse_immovable(state, rows)
        _refuse_immovable(self.state, before)
        # A name that only one of the two has would be wrong for some row.
        self.state = {name: torch.cat([self.state[name], state[name]]) for name in self.state if name in state}

    # For engines that plan steps in which not all rows take part

    def resume(self, state: State, rows: int = 1) -> None:
        """Rows go on that had been let go of, with the state that `rows_of` gave; they are the last from here on."""
        before = self.rows
        self.rows += rows
        try:
            self._join(state, before, rows)
        except PolicyFault as error:
            self._mend("begin", error, "an empty state")
            self.state = {}

    def rows_of(self, places: Sequence[int]) -> State:
        """The state of some rows, in this order."""
        return self._of(places)

    @contextmanager
    def only(self, places: Sequence[int]) -> Iterator[None]:
        """Within this there are no other rows; what is done to their state is then done to that of all."""
        whole, rows = self.state, self.rows
        first = list(places) == list(range(len(places)))
        self.state = {name: value[: len(places)] for name, value in whole.items()} if first else self._of(places)
        part, self.rows = dict(self.state), len(places)
        yield
        changed, self.state, self.rows = self.state, whole, rows
        try:
            for name, value in changed.items():
                if first and value is part.get(name):
                    continue  # a view: what was written to it is there
                if name not in whole:
                    raise PolicyFault(f"state[{name!r}] is not of those that it returned")
                if first:
                    whole[name] = torch.cat([value, whole[name][len(places) :]])
                else:
                    whole[name] = whole[name].clone()
                    whole[name][list(places)] = value
        except Exception as error:
            self._mend("begin", error, "an empty state")
            self.state = {}

    # Rows leave

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        self.state = self._of(rows)
        self.rows = len(rows)

    def _of(self, rows: Sequence[int]) -> State:
        """The state of some rows, in this order."""
        if list(rows) == list(range(self.rows)):
            return self.state
        if not rows:
            return {}
        try:
            _refuse_immovable(self.state, self.rows)
        except PolicyFault as error:
            self._mend("begin", error, "an empty state")
            return {}
        places = torch.tensor(rows)  # once: indexing by a list makes it for every value
        return {name: value[places] for name, value in self.state.items()}

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor] | None:
        """What the policy's networks make of features, on the device; None where it has none, or nothing to look at."""
        if not self.predicts or not features:
            return None
        try:
            predictions = self.policy.predict(features)
            if not (isinstance(predictions, dict) and all(isinstance(p, Tensor) for p in predictions.values())):
                raise PolicyFault(f"it returned {kind_of(predictions)}, not a dict of tensors")
            return predictions
        except Exception as error:
            self._mend("predict", error, "no predictions")
            return None

    def select(self, context: Context) -> Selected:
        """What the policy wants drafted."""
        default, rows = self.spec.trained_block_size, context.batch_size
        sources, most = [0] * rows, [self.spec.max_block_size] * rows
        plan: Plan | None = None
        try:
            answer = self.policy.select(self.state, context)
            if isinstance(answer, Plan):
                plan, sources = answer, decision("source", answer.source, [len(self.spec.sources)] * rows)
                most = [self.spec.sources[source].max_block_size for source in sources]
                answer = plan.block_size
            sizes = decision("select", answer, most)
        except OutOfRange as error:
            too_large = [*map(min, error.sizes, most)]
            self._mend("select", error, str(max(too_large)) if too_large else f"the trained block size {default}")
            sizes = too_large or [default] * rows
            sources, plan = sources if too_large else [0] * rows, None
        except Exception as error:
            self._mend("select", error, f"the trained block size {default}")
            sizes, sources, plan = [default] * rows, [0] * rows, None
        if any(sources):
            sources = [source if size > 1 else 0 for size, source in zip(sizes, sources, strict=True)]
        return Selected(sizes, sources, None if plan is None else self._shapes(plan, sizes, sources))

    def _shapes(self, plan: Plan, sizes: Sequence[int], sources: Sequence[int]) -> list[TreeShape | None] | None:
        """The trees that a plan wants drafted."""
        try:
            return shapes_of(plan, sizes, [self.spec.sources[source] for source in sources])
        except Exception as error:
            self._mend("select", error, "the trees that the drafter chooses")
            return None

    def truncate(self, draft: Draft) -> list[int]:
        """Drafted tokens to verify of each row, 0 .. draft_length."""
        lengths: list[int] = draft.draft_length.tolist()
        if not self.truncates or not any(lengths):
            return lengths
        if not self.stepwise:
            return self._truncate(draft, lengths)
        kept = [0] * len(lengths)
        for count in range(1, max(lengths) + 1):
            asked = [
                min(length, count) if keeps == count - 1 else 0 for length, keeps in zip(lengths, kept, strict=True)
            ]
            if not any(asked):
                break
            answers = self._truncate(draft.first(count), [min(length, count) for length in lengths])
            kept = [
                count if ask == count and answer == count else keeps
                for ask, answer, keeps in zip(asked, answers, kept, strict=True)
            ]
        return kept

    def keep_nodes(self, draft: Draft) -> list[list[int]]:
        """Tokens of trees to verify, of each row, ascending, none without its parent."""
        lengths: list[int] = draft.draft_length.tolist()
        if not self.truncates or not any(lengths):
            return [list(range(length)) for length in lengths]
        assert draft.parents is not None
        parents = draft.parents.tolist()
        first, mask = self._asked(draft, lengths)
        return [list(range(keeps)) for keeps in first] if mask is None else self._closed(mask, parents)

    def _truncate(self, draft: Draft, lengths: list[int]) -> list[int]:
        first, mask = self._asked(draft, lengths)
        if mask is None:
            return first
        return [len(nodes) for nodes in self._closed(mask, [range(-1, length - 1) for length in lengths])]

    def _asked(self, draft: Draft, lengths: list[int]) -> tuple[list[int], list[list[bool]] | None]:
        """What `truncate` answers: how many of the first tokens of each row it keeps; or, by a mask, which."""
        length, mask = draft.draft_length, None
        draft.draft_length = length.clone()  # the policy may write to what it is handed
        try:
            answer = self.policy.truncate(self.state, draft)
            if isinstance(answer, Tensor) and answer.ndim == 2:
                mask, first = kept_tokens(answer, lengths, draft.tokens.shape[1]), lengths
            else:
                first = decision("truncate", answer, lengths)
        except Exception as error:
            self._mend("truncate", error, "the whole draft")
            first = lengths
        draft.draft_length = length
        return first, mask

    def _closed(self, mask: Sequence[Sequence[bool]], parents: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of the tokens that a mask keeps those of whose ancestors it keeps all."""
        found = [closed(*row) for row in zip(mask, parents, strict=True)]
        if any(sum(kept) > len(nodes) for kept, nodes in zip(mask, found, strict=True)):
            fault = OutOfRange("it keeps tokens without those before them on their paths")
            self._mend("truncate", fault, "those whose ancestors are all kept")
        return found

    def extend(self, draft: Draft) -> list[bool]:
        """Which rows an autoregressive drafter goes on with."""
        rows = draft.draft_length.shape[0]
        try:
            return [bool(answer) for answer in decision("extend", self.policy.extend(self.state, draft), [1] * rows)]
        except Exception as error:
            self._mend("extend", error, "drafting on")
            return [True] * rows

    def observe(self, step: Step) -> None:
        """Feed the step back: a copy, because the record is the output's."""
        if not self.observes:
            return
        try:
            self.policy.observe(self.state, step.clone())
        except Exception as error:
            self._mend("observe", error, "no feedback")

    def end(self, rows: Sequence[int]) -> None:
        """These rows ended."""
        try:
            self.policy.end(self._of(rows))
        except Exception as error:
            self._mend("end", error, "nothing")

    def new_fallbacks(self) -> int:
        """Faults since the last time this was asked."""
        new, self._reported = self.fallbacks - self._reported, self.fallbacks
        return new

    def _mend(self, method: str, error: Exception, instead: str) -> None:
        name = type(self.policy).__name__
        message = f"policy {name}.{method}: {explained(error, self.policy)}"
        if self.strict:
            raise PolicyFault(message, method) from error
        self.fallbacks += 1
        if method not in self._warned:
            self._warned.add(method)
            warnings.warn(f"{message}; using {instead} instead (said once)", PolicyFaultWarning, stacklevel=3)


def _refuse_immovable(state: State, rows: int) -> None:
    """Raise PolicyFault for a state whose rows cannot be moved."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise PolicyFault(f"state[{name!r}] is {kind_of(value)}, not a tensor: its rows cannot join others")
        if value.ndim == 0 or value.shape[0] != rows:
            raise PolicyFault(
                f"state[{name!r}] has shape {list(value.shape)} for {rows} rows: the batch axis comes first"
            )


def explained(error: Exception, policy: Policy) -> str:
    """What went wrong, with the line of the policy's own file if it raised."""
    if isinstance(error, PolicyFault):
        return str(error)
    file = getattr(sys.modules.get(type(policy).__module__), "__file__", None)
    lines = [number for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    where = f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
    return f"{type(error).__name__}: {error}{where}"


def kind_of(value: object) -> str:
    """The type with its article.

    >>> kind_of(3), kind_of([]), kind_of(None)
    ('an int', 'a list', 'None')
    """
    if value is None:
        return "None"
    name = type(value).__name__
    return f"a{'n' if name[0].lower() in 'aeiou' else ''} {name}"


def kept_tokens(answer: Tensor, lengths: Sequence[int], width: int) -> list[list[bool]]:
    """Whether each drafted token is kept, by a mask [batch, width], of each row without its padding.

    Raises:
        PolicyFault: it is no such mask.
    """
    if answer.dtype != torch.bool or answer.shape != (len(lengths), width):
        raise PolicyFault(
            f"it returned {answer.dtype} {list(answer.shape)}, neither int64 [{len(lengths)}] nor a mask, bool "
            f"[{len(lengths)}, {width}]"
        )
    mask: list[list[bool]] = to_host([answer])[0].tolist()
    return [row[:length] for row, length in zip(mask, lengths, strict=True)]


def decision(method: str, answer: Any, most: Sequence[int]) -> list[int]:
    """The numbers of a decision, a tensor [batch].

    Args:
        most: of each row, the largest block size, the draft length, or the number of sources.

    Raises:
        PolicyFault: it is no decision: no such tensor, or not of numbers. OutOfRange: it cannot be followed.

    One copy out of the tensor and checks in Python: tensor operations on single numbers would cost several times more.
    """
    what = "a bool tensor [batch]" if method == "extend" else "int64 [batch], as context.full(8) is"
    if method == "source":
        what += ", for the source of its Plan"
    if not isinstance(answer, Tensor):
        got = "None" if answer is None else f"{kind_of(answer)} ({answer!r})"
        raise PolicyFault(f"it returned {got}, not {what}")
    if answer.shape != (len(most),):
        raise PolicyFault(f"it returned shape {list(answer.shape)} for a batch of {len(most)}, not {what}")
    if method != "extend" and (answer.dtype == torch.bool or answer.is_complex()):
        raise PolicyFault(f"it returned dtype {answer.dtype}, not {what}")
    numbers = to_host([answer])[0].tolist()  # one that was decided on the device costs a read of its own
    if method == "extend":
        return [int(bool(number)) for number in numbers]
    if not all(map(math.isfinite, numbers)):
        raise PolicyFault(f"it returned {numbers}, which is no number of positions")
    whole = [int(number) for number in numbers]
    if whole != numbers:
        raise OutOfRange(f"it returned {numbers}, which are not whole numbers")
    if method == "truncate":
        if any(not 0 <= length <= drafted for length, drafted in zip(whole, most, strict=True)):
            raise OutOfRange(f"it returned {numbers} where {list(most)} tokens were drafted")
    elif method == "source":
        if min(whole) < 0 or max(whole) >= most[0]:
            raise OutOfRange(f"it returned {numbers} for sources, of which there are {most[0]}, numbered from 0")
    elif min(whole) < 1:
        raise OutOfRange(f"it returned {numbers}: no draft is block size 1")
    elif any(size > limit for size, limit in zip(whole, most, strict=True)):
        above = most[0] if len(set(most)) == 1 else list(most)
        advice = "keep `decoder.max_block_size` in `bind`, and clamp to it"
        raise OutOfRange(f"it returned {numbers}, above {above}: {advice}", whole)
    return whole


def shapes_of(plan: Plan, sizes: Sequence[int], sources: Sequence[SourceSpec]) -> list[TreeShape | None] | None:
    """The trees of a plan, of each row; None of rows that draft chains, and if all do or the plan has no trees.

    Args:
        sizes: block size of each row. sources: where each drafts from.

    Raises:
        PolicyFault: they are no trees, or not such as these sources draft.
    """
    if plan.parents is None and plan.ranks is None:
        return None
    rows, width = len(sizes), max(sizes) - 1
    given = [_of_nodes(name, value, rows, width) for name, value in (("parents", plan.parents), ("ranks", plan.ranks))]
    parents, ranks = (value.tolist() for value in to_host(given))
    shapes = [
        _shape_of(TreeShape(tuple(before[: size - 1]), tuple(own[: size - 1])), source)
        for before, own, size, source in zip(parents, ranks, sizes, sources, strict=True)
    ]
    return shapes if any(shapes) else None


def _of_nodes(name: str, value: Any, rows: int, width: int) -> Tensor:
    """Numbers of a plan's nodes, int64 [rows, width or more]. Raises PolicyFault for anything else."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = str(value.dtype) if isinstance(value, Tensor) else kind_of(value)
        raise PolicyFault(f"{name} of its Plan: {got}, not int64 [batch, nodes]")
    if value.ndim != 2 or len(value) != rows or value.shape[1] < width:
        raise PolicyFault(
            f"{name} of its Plan have shape {list(value.shape)}, not [{rows}, {width}]: a row of a tree has "
            "block_size - 1 nodes"
        )
    return value


def _shape_of(shape: TreeShape, source: SourceSpec) -> TreeShape | None:
    """The tree, if a source drafts such; None of a chain from a source of chains. Raises OutOfRange."""
    if source.branches == 1:
        if shape == TreeShape.chain(len(shape)):
            return None
        raise OutOfRange(
            f"its Plan has a tree for {source.drafter}, which drafts chains: parents -1, 0, 1, ... and ranks 0"
        )
    places: set[tuple[int, int]] = set()
    for node, place in enumerate(zip(shape.parents, shape.ranks, strict=True)):
        parent, rank = place
        if not -1 <= parent < node:
            raise OutOfRange(f"node {node} of its Plan has parent {parent}, which is not before it")
        if not 0 <= rank < source.branches:
            raise OutOfRange(f"node {node} of its Plan has rank {rank}, of {source.branches} candidates")
        if place in places:
            raise OutOfRange(f"its Plan has two nodes of rank {rank} after node {parent}, one of them node {node}")
        places.add(place)
    if shape.deepest >= source.trained_block_size:
        raise OutOfRange(
            f"its Plan has a path of {shape.deepest} nodes, above trained_block_size - 1, "
            f"{source.trained_block_size - 1} of {source.drafter}"
        )
    return shape
