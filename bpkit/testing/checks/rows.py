"""Rows of a batch: a decision does not depend on the requests beside it, and the state of a request goes with it.

Requests that were decoded one by one are laid side by side, in a batch that requests join and leave. Before every call
the policy is copied, and the copy is asked about each request alone, with the state that the request has had alone:
both must decide the same, given the same memory. docs/check.md has the rules that follow, and how decisions at random
are compared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from bpkit.decode.guard import OutOfRange, decision
from bpkit.policy import Policy, State, overrides
from bpkit.testing.checks import setup
from bpkit.testing.checks.batched_requests import (
    BatchedRequest,
    bad_state,
    batched,
    drafts_of,
    side_by_side,
    state_rows,
    steps_of,
    unlike,
)
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import raised
from bpkit.testing.checks.records import DECIDES, asked_anew, changed, generator_of, most_of, shown
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.setup import LARGEST
from bpkit.testing.checks.surroundings import seed_everything
from bpkit.types import Context, Draft, Seconds, Step

SCRIPT = ((0, 1, 2), (0, 1, 2), (2, 0, 1), (2, 1), (2, 1, 3), (3, 2, 1), (3, 1), (1, 3, 4), (4, 3, 1), (4, 1), (1, 4))
"""Which requests are in the batch at every step: first three, then in another order, then some leave and some join."""
SAMPLES, SIGMAS = 64, 5
"""Decisions at random are compared by their means, which may be so many standard errors apart."""


def rows(policy: CheckedPolicy, out: Findings) -> None:
    """Lay the usual recordings of every drafter side by side."""
    compared = drawn = 0
    for drafter, recordings in policy.clean().items():
        requests = [request for each in recordings if (request := batched(each)).steps]
        if len(requests) < 3:
            continue
        bound = setup.decoder(drafter, policy.fresh(drafter)).policy
        batch = (BatchOfSharingRows if bound.joint else Batch)(bound, requests, drafter, out)
        with torch.inference_mode(), contextlib.suppress(Stop):
            batch.go_through()
        compared, drawn = compared + batch.compared, drawn + batch.drawn
        if batch.uncopyable:
            out.note(
                f"{policy.name} cannot be copied ({batch.uncopyable}): it was itself asked about each request alone"
            )
        if out.failures:
            break  # other drafters would show the same
    if not compared and not drawn and not out.failures:
        raise Skip("too few requests had steps to be laid side by side")
    out.said = f"{compared} decisions and states, of requests alone and in a batch that others join and leave"
    if drawn:
        out.note(f"{drawn} decisions drew for each row by itself: compared by the means of many draws, not one by one")


class Stop(Exception):
    """No more can be said of this batch."""


class Batch:
    """A batch of requests under one policy, and the same requests each alone.

    Attributes:
        present: requests in the batch, in order. state: theirs together. asked: requests of the call at hand.
        compared: decisions and states. drawn: decisions that drew and differed. sampled: of these, method and request
            that were asked many times.
        cut: lengths to which drafts were cut for the question at hand.
        uncopyable: why the policy cannot be copied, if so.
    """

    def __init__(self, policy: Policy, requests: Sequence[BatchedRequest], drafter: str, out: Findings) -> None:
        self.policy, self.requests, self.drafter, self.out = policy, requests, drafter, out
        self.present: list[BatchedRequest] = []
        self.asked: list[BatchedRequest] = []
        self.state: State = {}
        self.time, self.compared, self.drawn = 0, 0, 0
        self.cut: list[int] = []
        self.sampled: set[tuple[str, setup.Case]] = set()
        self.uncopyable = ""

    def go_through(self) -> None:
        """Step by step, until no request has a step left. Raises Stop after a failure."""
        for self.time, places in enumerate(SCRIPT):
            wanted = [self.requests[place] for place in places if place < len(self.requests)]
            self._arrange([request for request in wanted if request.done < len(request.steps)])
            if not self.present:
                return
            self._step()

    # The batch changes

    def _arrange(self, wanted: list[BatchedRequest]) -> None:
        """Let requests leave, reorder the rest, and let new ones join at the end."""
        staying = [request for request in wanted if request in self.present]
        joining = [request for request in wanted if request not in self.present]
        self.asked = [request for request in self.present if request not in wanted]
        if self.asked:
            self._call(self.policy, "end", self._rows_of(self.asked))
        self.state = self._rows_of(staying)
        if joining:
            state = self._begin(joining)
            if staying:  # names that only one of the two states has are lost
                both = self.state.keys() & state.keys()
                state = {name: torch.cat([self.state[name], state[name]]) for name in both}
            self.state = state
        self.present = self.asked = [*staying, *joining]

    def _rows_of(self, requests: list[BatchedRequest]) -> State:
        return state_rows(self.state, [self.present.index(request) for request in requests])

    def _begin(self, joining: list[BatchedRequest]) -> State:
        """New requests begin: together, and each alone."""
        self.asked = joining
        copies = [self._copy() for _ in joining]
        state: State = self._call(self.policy, "begin", side_by_side([each.begin for each in joining], self.time))
        self._whole("begin", state)
        for place, (request, alone) in enumerate(zip(joining, copies, strict=True)):
            request.alone = self._call(alone, "begin", side_by_side([request.begin], self.time))
            self._same_state("begin", request, state_rows(state, [place]))
        return state

    # One step

    def _step(self) -> None:
        contexts = [request.step.context for request in self.present]
        self._decide("select", side_by_side(contexts, self.time), [side_by_side([c], self.time) for c in contexts])
        together, alone = self._drafts([request.step.draft for request in self.present])
        if together is not None:
            if overrides(self.policy, "extend") and together.context.spec.work.may_end_early:
                for count in (1, 3):
                    begun = [None if d is None or int(d.draft_length) < count else d.first(count) for d in alone]
                    self._decide("extend", together.first(count), begun)
            if overrides(self.policy, "truncate"):
                self._decide("truncate", together, alone)
                self._cut_short()
        seen = [request.step.step for request in self.present if request.step.step is not None]
        if len(seen) == len(self.present):
            self._observe(seen)
        for request in self.present:
            request.done += 1

    def _drafts(self, drafts: Sequence[Draft | None]) -> tuple[Draft | None, list[Draft | None]]:
        """Those of the requests at this step as one, and each by itself."""
        contexts = [request.step.context for request in self.present]
        each = [drafts_of([c], [d], self.time) for c, d in zip(contexts, drafts, strict=True)]
        return drafts_of(contexts, drafts, self.time), each

    def _cut_short(self) -> None:
        """Ask `truncate` about drafts of unlike lengths, so that there is padding even where `select` is constant.

        Policy and states are copies, which then are dropped: these drafts are not those that the steps tell of.
        """
        count = len(self.present)
        together, alone = self._drafts(
            [request.step.cut(1 + (place + self.time) % count) for place, request in enumerate(self.present)]
        )
        policy = self._copy()
        if self.uncopyable or together is None or together.tokens.shape[1] == int(together.draft_length.min()):
            return
        other = copy.copy(self)
        other.policy, other.state, other.cut = policy, copy.deepcopy(self.state), together.draft_length.tolist()
        other.present = [dataclasses.replace(each, alone=copy.deepcopy(each.alone)) for each in self.present]
        other._decide("truncate", together, alone)
        self.compared, self.drawn = other.compared, other.drawn

    def _decide(self, method: str, given: Context | Draft, alone: Sequence[Context | Draft | None]) -> None:
        """Ask about the batch and about each request; None where it would not be asked alone."""
        copies, unasked, state = [self._copy() for _ in alone], self._copy(), copy.deepcopy(self.state)
        answer, drew = self._answer(self.policy, method, self.state, given)
        self._whole(method, self.state)
        for place, (request, policy, single) in enumerate(zip(self.present, copies, alone, strict=True)):
            if single is None:
                continue
            state_alone = copy.deepcopy(request.alone)
            [expected], _ = self._answer(policy, method, request.alone, single, request)
            if answer[place] == expected:
                self.compared += 1
            elif not drew:
                got = f"in the batch it answered {answer[place]} for it"
                self._differs(method, request, f"{expected}, as alone", got)
            else:
                self.drawn += 1
                if (method, request.case) not in self.sampled:
                    self.sampled.add((method, request.case))
                    self._sample(method, request, unasked, (state, given, place), (state_alone, single, 0))

    def _sample(
        self, method: str, request: BatchedRequest, policy: Policy, *questions: tuple[State, Context | Draft, int]
    ) -> None:
        """Decisions at random: the same question many times over, together and alone, must give the same mean.

        A question is a state, what is asked about, and the row whose answer counts.
        """
        draws: list[int] = []
        for state, given, place in questions:
            for _ in range(SAMPLES):
                generator_of(given).manual_seed(len(draws))
                asked = policy if self.uncopyable else copy.deepcopy(policy)
                draws.append(self._answer(asked, method, copy.deepcopy(state), given)[0][place])
        ours, theirs = torch.tensor(draws, dtype=torch.float64).view(2, SAMPLES)
        error = float(((ours.var() + theirs.var()) / SAMPLES).sqrt())
        if abs(float(ours.mean() - theirs.mean())) > SIGMAS * error + 1e-9:
            self._differs(
                method,
                request,
                f"decisions at random have the mean {float(theirs.mean()):.2f} of {SAMPLES} draws, as alone",
                f"in the batch the mean is {float(ours.mean()):.2f}, more than {SIGMAS} standard errors away",
            )

    def _observe(self, seen: Sequence[Step]) -> None:
        """Feed a step back; the time of it is everyone's, or an equal part of it each one's."""
        copies, whole = [self._copy() for _ in self.present], self._observe_together(seen)
        part = Seconds(*(seconds / len(seen) for seconds in dataclasses.astuple(whole)))
        for place, (request, policy) in enumerate(zip(self.present, copies, strict=True)):
            before, mine = copy.deepcopy(request.alone), state_rows(self.state, [place])
            self._call(policy, "observe", request.alone, steps_of([seen[place]], part))
            if unlike(mine, request.alone) is not None:
                self._call(self._copy(), "observe", before, steps_of([seen[place]], whole))
                if unlike(mine, before) is None:
                    request.alone = before
            self._same_state("observe", request, mine)

    def _observe_together(self, seen: Sequence[Step]) -> Seconds:
        whole = sum((step.seconds for step in seen), Seconds())
        self._call(self.policy, "observe", self.state, steps_of(seen, whole))
        self._whole("observe", self.state)
        return whole

    # What is expected

    def _same_state(self, method: str, request: BatchedRequest, mine: State) -> None:
        name = unlike(mine, request.alone)
        if name is not None:
            had, got = (shown(state[name], 80) for state in (request.alone, mine))
            alone = f"state[{name!r}] = {had}, as alone"
            self._differs(method, request, alone, f"in the batch its row of state[{name!r}] is {got}")
        self.compared += 1

    def _differs(self, method: str, request: BatchedRequest, expected: str, got: str) -> None:
        self._fail(
            f"{self._did(method)}; then called it for request {request.case.short} alone",
            f"for that request {expected}: rows of a batch are strangers",
            f"{got}. Keep to the row: reduce over the last axes only, mind `draft.draft_length` (what is "
            "beyond it is padding), make every name of the state in `begin`; `joint = True` if rows share a budget",
        )

    def _whole(self, method: str, state: object) -> None:
        """The state is a dict of tensors, batch axis first."""
        wrong = bad_state(state, len(self.asked))
        if wrong is not None:
            expected = "a dict of tensors whose first axis is the batch, so that rows can leave and join"
            self._fail(f"{self._did(method)} and looked at the state", expected, wrong)

    def _did(self, method: str) -> str:
        listed = ", ".join(request.case.short for request in self.asked)
        cut = f", the drafts cut to {self.cut} tokens" if self.cut else ""
        name, step = type(self.policy).__name__, self.time + 1
        return f"called {name}.{method} for a batch (step {step}, drafter {self.drafter}) of {listed}{cut}"

    def _fail(self, did: str, expected: str, got: str) -> None:
        self.out.fail(did, expected, got)
        raise Stop

    # Calls

    def _copy(self) -> Policy:
        """A copy that knows what the policy knows now; the policy itself if it cannot be copied."""
        if not self.uncopyable:
            try:
                return copy.deepcopy(self.policy)
            except Exception as error:
                self.uncopyable = f"{type(error).__name__}: {error}"
        return self.policy

    def _answer(
        self, policy: Policy, method: str, state: State, given: Context | Draft, alone: BatchedRequest | None = None
    ) -> tuple[list[int], bool]:
        """The answer as numbers, and whether it drew."""
        before = generator_of(given).get_state()
        answer: list[int] = self._call(policy, method, state, given, alone=alone)
        return answer, not torch.equal(before, generator_of(given).get_state())

    def _call(self, policy: Policy, method: str, *arguments: Any, alone: BatchedRequest | None = None) -> Any:
        """What a method returns; a decision as numbers. `alone` is the request that is asked about by itself."""
        seed_everything(self.time)  # the same for everyone: other randomness is another check's
        most = most_of(arguments[-1], LARGEST) if method in DECIDES else []
        try:
            answer = getattr(policy, method)(*arguments)
            return decision(method, answer, most) if method in DECIDES else answer
        except Exception as error:
            name, text = f"{type(policy).__name__}.{method}", raised(error)
            expected = f"{name} serves any number of requests at once: every tensor has a batch axis"
            if isinstance(error, OutOfRange) and method == "truncate":
                expected = f"{name} verifies 0 .. draft.draft_length of each row, whatever lengths the others have"
                text += ": beyond draft.draft_length is padding; use torch.minimum(answer, draft.draft_length)"
            then = "" if alone is None else f"; then called it for request {alone.case.short} alone"
            self._fail(f"{self._did(method)}{then}", expected, text)


class BatchOfSharingRows(Batch):
    """Rows that share a budget: their order must not matter."""

    def _decide(self, method: str, given: Context | Draft, alone: Sequence[Context | Draft | None]) -> None:
        """Ask about the batch, and about the same batch the other way round."""
        places = list(range(len(self.present)))[::-1]
        policy, state = self._copy(), state_rows(self.state, places)
        answer, drew = self._answer(self.policy, method, self.state, given)
        self._whole(method, self.state)
        reverse = asked_anew(changed(given, lambda value: value[places]), self.time)
        other, _ = self._answer(policy, method, state, reverse)
        expected = answer[::-1]
        if other == expected:
            self.compared += len(answer)
        elif drew:
            self.drawn += len(answer)
        else:
            self._fail(
                f"{self._did(method)}, then for the same requests in reverse",
                f"the same decisions in reverse, {expected}: `joint = True` lets rows share, not know their places",
                f"it answered {answer}, and in reverse {other}",
            )

    def _observe(self, seen: Sequence[Step]) -> None:
        self._observe_together(seen)

    def _same_state(self, method: str, request: BatchedRequest, mine: State) -> None:
        """Rows that share may have states that do."""
