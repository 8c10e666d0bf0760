"""Rows of a batch: a decision does not depend on the requests beside it, and the state of a request goes with it.

Requests are decoded in a batch that they join and leave. Before every call the policy is copied, and the copy is asked
about each request alone, with the state that the request has had alone: both must decide the same, given the same
memory. docs/check.md has the rules that follow, and how decisions at random are compared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.guard import OutOfRange
from bpkit.policy import Policy, State, overrides
from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import CallRecorder, raised
from bpkit.testing.checks.records import (
    DECIDES,
    Decided,
    Given,
    copied,
    filled,
    numbers,
    random_of,
    row_ids,
    shown,
    some_rows,
)
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.setup import TOGETHER, Case
from bpkit.testing.checks.states import bad_state, state_rows, unlike
from bpkit.testing.checks.surroundings import seed_everything
from bpkit.testing.checks.usual import compare_with_plain
from bpkit.types import Draft, Seconds, Step

MAX_NEW_TOKENS = (5, 12, 8, 9, 6)
"""Of the usual cases here, so that requests leave at different steps, others join and rows change places."""
SERVES_ANY_NUMBER = "serves any number of requests at once: every tensor has a batch axis"
SAMPLES, SIGMAS = 64, 5
"""Decisions at random are compared by their means, which may be so many standard errors apart."""


def rows(policy: CheckedPolicy, out: Findings) -> None:
    """Decode the usual cases in a batch with every drafter."""
    compared = drawn = texts = 0
    lengths = zip(policy.cases, MAX_NEW_TOKENS, strict=True)
    cases = [dataclasses.replace(case, max_new_tokens=most) for case, most in lengths]
    for drafter in policy.clean():
        decoder = setup.decoder(drafter, policy.fresh(drafter))
        recorder = (SharingRowsRecorder if decoder.policy.joint else RowsRecorder)(decoder, drafter, cases, out)
        recordings = recorder.record_together(cases, TOGETHER)
        compared, drawn = compared + recorder.compared, drawn + recorder.drawn
        if recorder.uncopyable:
            out.note(
                f"{policy.name} cannot be copied ({recorder.uncopyable}): it was itself asked about each request alone"
            )
        fault = recordings[0].fault
        if fault is not None and not out.failures:
            did = f"decoded {len(cases)} requests, {TOGETHER} at a time, drafter {drafter}"
            out.fail(did, f"{policy.name}.{fault.method} {SERVES_ANY_NUMBER}", fault.text)
        if out.failures:
            policy.fails_in_batches = True
            break  # other drafters would show the same
        for recording in recordings:
            compare_with_plain(policy.name, recording, setup.plain(recording.case), out)
        texts += len(recordings)
    out.said = f"{compared} decisions and states and {texts} texts, alone and in a batch that requests join and leave"
    if drawn:
        out.note(f"{drawn} decisions drew for each row by itself: compared by the means of many draws, not one by one")


class Stop(Exception):
    """No more can be said of this batch."""


class BatchCall(NamedTuple):
    """What the policy is asked about a batch, as it was before it answered.

    Attributes:
        state: of all rows. random: the state of the generator.
        policy: a copy that knows what the policy knew, or itself if it cannot be copied.
    """

    method: str
    given: Given
    state: State
    random: Tensor
    policy: Policy

    def of(self, places: Sequence[int], random: Tensor | None = None) -> Given:
        """What is asked about some rows, with a generator of their own."""
        if isinstance(self.given, Step):
            return self.given.row(*places)
        return some_rows(self.given, places, self.random if random is None else random)

    @property
    def counts(self) -> list[int]:
        """Rows of which the answer counts: those that alone would be asked about, too."""
        if not isinstance(self.given, Draft):
            return list(range(len(row_ids(self.given))))
        least = self.given.tokens.shape[1] if self.method == "extend" else 1
        return [row for row, length in enumerate(self.given.draft_length.tolist()) if length >= least > 0]


class RowsRecorder(CallRecorder):
    """Beside every call of the runtime, asks copies of the policy about each row alone.

    Args:
        cases: to be decoded in one batch.

    Attributes:
        rows: ids of those in the call at hand. first: the lowest id. alone: the state that each has had alone.
        time: the step at hand, from 1. cut: what is said of block sizes that were cut in it.
        compared: decisions and states of rows beside others. drawn: decisions that drew and differed.
        sampled: of these, method and row that were asked many times.
        uncopyable: why the policy cannot be copied, if so.
    """

    def __init__(self, decoder: SpeculativeDecoder, drafter: str, cases: Sequence[Case], out: Findings) -> None:
        super().__init__(decoder, drafter, force=self._cut if overrides(decoder.policy, "truncate") else None)
        self.cases, self.out = cases, out
        self.rows: tuple[int, ...] = ()
        self.first = sys.maxsize
        self.alone: dict[int, State] = {}
        self.time, self.compared, self.drawn = 0, 0, 0
        self.sampled: set[tuple[str, int]] = set()
        self.cut = self.uncopyable = ""

    def _cut(self, sizes: Tensor) -> Tensor:
        """Unlike sizes at every other step, so that there is padding even where `select` is constant."""
        if self.time % 2 == 0:
            sizes = torch.minimum(sizes, 2 + torch.arange(len(sizes)))
            self.cut = f", block sizes cut to {sizes.tolist()}"
        return sizes

    # The batch is asked

    def _recorded(self, method: str, original: Callable[..., Any], *arguments: Any) -> Any:
        if method == "end":
            with self._blaming(method):
                return super()._recorded(method, original, *arguments)
        *states, given = arguments
        self.rows = row_ids(given)
        self.first = min(self.first, *self.rows)
        if method == "select":
            self.time, self.cut = self.time + 1, ""
        if isinstance(given, Draft):
            given = filled(given)
        call = self._before(method, given, states)
        with self._blaming(method):
            seed_everything(self.time)
            answer = super()._recorded(method, original, *states, given)
        state = answer if method == "begin" else states[0]
        wrong = bad_state(state, len(self.rows))
        if wrong is not None:
            expected = "a dict of tensors whose first axis is the batch, so that rows can leave and join"
            self._fail(f"{self._did(method)} and looked at the state", expected, wrong)
        self._compare_rows(call, state, random_of(given))
        return answer

    def _before(self, method: str, given: Given, states: list[State]) -> BatchCall:
        policy = self.policy
        if not self.uncopyable:
            try:
                policy = self.policy_now()
            except Exception as error:
                self.uncopyable = f"{type(error).__name__}: {error}"
        return BatchCall(method, copied(given), copy.deepcopy(states[0]) if states else {}, random_of(given), policy)

    @property
    def answer(self) -> Decided:
        """What the policy answered last, of all rows."""
        answer = self._calls[-1].answer
        assert answer is not None
        return answer

    # Each row is asked about

    def _compare_rows(self, call: BatchCall, state: State, random: Tensor) -> None:
        """What is decided of each row, and what its state is after it began and after a step."""
        if call.method in DECIDES:
            self._decided(call, state, drew=not torch.equal(call.random, random))
        elif call.method == "begin":
            for place, row in enumerate(self.rows):
                self.alone[row] = self._ask(call, call.of([place]), {}, row)
                self._same_state(call, place, state)
        else:
            self._observed(call, state)

    def _decided(self, call: BatchCall, state: State, *, drew: bool) -> None:
        method, answers = call.method, self.answer
        for place in call.counts:
            row, before = self.rows[place], copy.deepcopy(self.alone[self.rows[place]])
            [expected] = self._ask(call, call.of([place]), self.alone[row], row)
            if answers[place] == expected:
                self.compared += len(self.rows) > 1
            elif not drew:
                got = f"in the batch it answered {answers[place]} for it"
                self._differs(method, row, f"{expected}, as alone", got)
            else:
                self.drawn += 1
                self.alone[row] = state_rows(state, [place])  # what was drawn may be in it
                if (method, row) not in self.sampled:
                    self.sampled.add((method, row))
                    self._sample(call, place, before)

    def _sample(self, call: BatchCall, place: int, alone: State) -> None:
        """Decisions at random: the same question many times over, together and alone, must give the same mean."""
        row, draws = self.rows[place], list[Any]()
        for places, state in ((range(len(self.rows)), call.state), ([place], alone)):
            for _ in range(SAMPLES):
                random = torch.Generator().manual_seed(len(draws)).get_state()
                answers = self._ask(call, call.of(places, random), copy.deepcopy(state), row)
                draws.append(answers[places.index(place)])
        ours, theirs = torch.tensor(draws, dtype=torch.float64).view(2, SAMPLES, -1)  # of a Plan sizes and sources
        error = ((ours.var(dim=0) + theirs.var(dim=0)) / SAMPLES).sqrt()
        if ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() > SIGMAS * error + 1e-9).any():
            means = (", ".join(f"{mean:.2f}" for mean in each.mean(dim=0).tolist()) for each in (ours, theirs))
            together, alone_mean = means
            self._differs(
                call.method,
                row,
                f"decisions at random have the mean {alone_mean} of {SAMPLES} draws, as alone",
                f"in the batch the mean is {together}, more than {SIGMAS} standard errors away",
            )

    def _observed(self, call: BatchCall, state: State) -> None:
        """The time of a step is everyone's, or an equal part of it each one's."""
        for place, row in enumerate(self.rows):
            step, before = cast("Step", call.of([place])), self.alone[row]
            part = Seconds(*(seconds / len(self.rows) for seconds in dataclasses.astuple(step.seconds)))
            for seconds in (step.seconds, part):
                self.alone[row] = copy.deepcopy(before)
                self._ask(call, dataclasses.replace(step, seconds=seconds), self.alone[row], row)
                if unlike(state_rows(state, [place]), self.alone[row]) is None:
                    break
            self._same_state(call, place, state)

    def _same_state(self, call: BatchCall, place: int, state: State) -> None:
        row, mine = self.rows[place], state_rows(state, [place])
        name = unlike(mine, self.alone[row])
        if name is not None:
            had, got = (shown(each[name], 80) for each in (self.alone[row], mine))
            alone = f"state[{name!r}] = {had}, as alone"
            self._differs(call.method, row, alone, f"in the batch its row of state[{name!r}] is {got}")
        self.compared += len(self.rows) > 1

    def _ask(self, call: BatchCall, given: Given, state: State, row: int | None) -> Any:
        """What a copy of the policy answers about some rows, decisions as numbers; `row` is the one that is alone."""
        method, policy = call.method, call.policy
        if not self.uncopyable:
            policy = copy.deepcopy(policy)
        seed_everything(self.time)  # the same for everyone: other randomness is another check's
        with self._blaming(method, row):
            answer = getattr(policy, method)(*([] if method == "begin" else [state]), given)
            if isinstance(given, Step) or method == "begin":
                return answer
            return numbers(method, answer, given)

    # What is said

    def _differs(self, method: str, row: int, expected: str, got: str) -> None:
        self._fail(
            f"{self._did(method)}; then called it for request {self._case(row)} alone",
            f"for that request {expected}: rows of a batch are strangers",
            f"{got}. Keep to the row: reduce over the last axes only, mind `draft.draft_length` (what is "
            "beyond it is padding), make every name of the state in `begin`; `context.running` says how many run; "
            "`joint = True` if rows share a budget",
        )

    @contextlib.contextmanager
    def _blaming(self, method: str, row: int | None = None) -> Iterator[None]:
        """What is raised inside is the policy's fault."""
        try:
            yield
        except Exception as error:
            name, text = f"{type(self.policy).__name__}.{method}", raised(error)
            expected = f"{name} {SERVES_ANY_NUMBER}"
            if isinstance(error, OutOfRange) and method == "truncate":
                expected = f"{name} verifies 0 .. draft.draft_length of each row, whatever lengths the others have"
                text += ": beyond draft.draft_length is padding; use torch.minimum(answer, draft.draft_length)"
            then = "" if row is None else f"; then called it for request {self._case(row)} alone"
            self._fail(f"{self._did(method)}{then}", expected, text)

    def _did(self, method: str) -> str:
        listed = ", ".join(map(self._case, self.rows))
        name = type(self.policy).__name__
        return f"called {name}.{method} for a batch (step {self.time}, drafter {self.drafter}) of {listed}{self.cut}"

    def _case(self, row: int) -> str:
        """Row ids follow the order of the cases."""
        return self.cases[row - self.first].short

    def _fail(self, did: str, expected: str, got: str) -> None:
        self.out.fail(did, expected, got)
        raise Stop


class SharingRowsRecorder(RowsRecorder):
    """Rows that share a budget: only their order must not matter."""

    def _compare_rows(self, call: BatchCall, state: State, random: Tensor) -> None:
        """Ask about the same batch the other way round."""
        if call.method not in DECIDES:
            return
        places, expected = range(len(self.rows))[::-1], self.answer[::-1]
        other = self._ask(call, call.of(places), state_rows(call.state, places), None)
        if other == expected:
            self.compared += len(other) if len(other) > 1 else 0
        elif not torch.equal(call.random, random):
            self.drawn += len(other)
        else:
            self._fail(
                f"{self._did(call.method)}, then for the same requests in reverse",
                f"the same decisions in reverse, {expected}: `joint = True` lets rows share, not know their places",
                f"it answered {expected[::-1]}, and in reverse {other}",
            )
