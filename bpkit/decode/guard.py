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
from typing import Any

import torch
from torch import Tensor

from bpkit.decode.host import to_host
from bpkit.decode.trees import closed
from bpkit.policy import Policy, PolicyError, State, overrides
from bpkit.types import Context, DecoderSpec, Draft, Feature, Plan, Step


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

    def select(self, context: Context) -> tuple[list[int], list[int]]:
        """Block size of the next draft of each row, 1 .. its source's limit, and that source; 0 at block size 1."""
        default, rows = self.spec.trained_block_size, context.batch_size
        sources, most = [0] * rows, [self.spec.max_block_size] * rows
        try:
            answer = self.policy.select(self.state, context)
            if isinstance(answer, Plan):
                sources = decision("source", answer.source, [len(self.spec.sources)] * rows)
                most = [self.spec.sources[source].max_block_size for source in sources]
                answer = answer.block_size
            sizes = decision("select", answer, most)
        except OutOfRange as error:
            too_large = [*map(min, error.sizes, most)]
            self._mend("select", error, str(max(too_large)) if too_large else f"the trained block size {default}")
            sizes = too_large or [default] * rows
            sources = sources if too_large else [0] * rows
        except Exception as error:
            self._mend("select", error, f"the trained block size {default}")
            sizes, sources = [default] * rows, [0] * rows
        if any(sources):
            sources = [source if size > 1 else 0 for size, source in zip(sizes, sources, strict=True)]
        return sizes, sources

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
