"""A batch of requests under one policy, beside the same requests each alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bpkit.policy import Policy, State, overrides
from bpkit.testing.checks import tapes
from bpkit.testing.checks.answers import wrong_answer
from bpkit.testing.checks.copies import same
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.stage import LARGEST
from bpkit.testing.checks.surroundings import seed_everything
from bpkit.testing.checks.tapes import Tape, Turn
from bpkit.types import Context, Draft, Step

SAMPLES, SIGMAS = 64, 5
"""Decisions at random are compared by their means, which may be so many standard errors apart."""
Asked = tuple[Policy, State, Context | Draft, int]
"""Whom to ask, about what, and which row's answer counts."""


class Stop(Exception):
    """No more can be said of this batch."""


class Batch:
    """A batch of requests under one policy, and the same requests each alone.

    Attributes:
        order: requests in the batch. together: their state. alone: state of each request by itself.
        compared: decisions and states. drawn: decisions that drew and differed. sampled: of these, method and request
            that were asked many times.
        cut: lengths to which drafts were cut for the question at hand.
        copies: whether the policy can be copied. why: it cannot.
    """

    def __init__(self, policy: Policy, found: Sequence[Tape], name: str, drafter: str, out: Findings) -> None:
        self.policy, self.tapes, self.name, self.drafter, self.out = policy, found, name, drafter, out
        self.order: list[int] = []
        self.together: State = {}
        self.alone: dict[int, State] = {}
        self.place = dict.fromkeys(range(len(found)), 0)
        self.time, self.compared, self.drawn = 0, 0, 0
        self.cut: list[int] | None = None
        self.sampled: set[tuple[str, int]] = set()
        self.copies, self.why = True, ""

    def go_through(self, script: Sequence[Sequence[int]]) -> None:
        """Step by step, until nothing more can be said."""
        try:
            for self.time, present in enumerate(script):
                self._arrange([row for row in present if self.place.get(row, 99) < len(self._turns(row))])
                if not self.order:
                    return
                self._step()
        except Stop:
            return

    # The batch changes

    def _arrange(self, wanted: list[int]) -> None:
        """Let requests leave, reorder the rest, and let new ones join at the end."""
        staying = [row for row in wanted if row in self.order]
        joining = [row for row in wanted if row not in self.order]
        left = [row for row in self.order if row not in wanted]
        if left:
            self._call(self.policy, "end", tapes.rows_of(self.together, [self.order.index(row) for row in left]))
        self.together = tapes.rows_of(self.together, [self.order.index(row) for row in staying])
        if joining:
            state = self._begin(joining)
            self.together = tapes.joined_states(self.together, state) if staying else state
        self.order = [*staying, *joining]

    def _begin(self, joining: list[int]) -> State:
        """New requests begin: together, and each alone."""
        starts = [self.tapes[row].begin for row in joining]
        twins = [self._twin() for _ in joining]
        state: State = self._call(self.policy, "begin", tapes.contexts(starts, self.time))
        self._whole(state, len(joining), "begin", joining)
        for place, (row, twin) in enumerate(zip(joining, twins, strict=True)):
            self.alone[row] = self._call(twin, "begin", tapes.contexts([starts[place]], self.time))
            self._same_state("begin", row, tapes.rows_of(state, [place]), self.alone[row])
        return state

    # One step

    def _step(self) -> None:
        turns = [self._turns(row)[self.place[row]] for row in self.order]
        context = tapes.contexts([turn.context for turn in turns], self.time)
        self._decide("select", context, [tapes.contexts([turn.context], self.time) for turn in turns])
        draft = tapes.drafts(turns, context)
        if draft is not None:
            self._drafted(draft, turns)
        if all(turn.step is not None for turn in turns):
            self._observe([turn.step for turn in turns if turn.step is not None])
        for row in self.order:
            self.place[row] += 1

    def _drafted(self, draft: Draft, turns: list[Turn]) -> None:
        """`extend` after the first tokens, and `truncate`."""
        alone: list[Draft | None] = []
        for turn in turns:
            alone.append(tapes.drafts([turn], tapes.contexts([turn.context], self.time)))
        if overrides(self.policy, "extend") and draft.context.spec.work.may_end_early:
            for count in (1, 3):
                lengths = [0 if one is None else int(one.draft_length) for one in alone]
                begun = [
                    None if length < count or one is None else one.first(count)
                    for one, length in zip(alone, lengths, strict=True)
                ]
                self._decide("extend", draft.first(count), begun)
        if overrides(self.policy, "truncate"):
            self._decide("truncate", draft, alone)
            self._cut_short(turns)

    def _cut_short(self, turns: Sequence[Turn]) -> None:
        """Ask `truncate` about drafts of unlike lengths, so that there is padding even where `select` is constant.

        Policy and states are copies, which then are dropped: these drafts are not those that the steps tell of.
        """
        together = self._twin()
        if not self.copies:
            return
        short = [tapes.cut(turn, 1 + (place + self.time) % len(turns)) for place, turn in enumerate(turns)]
        draft = tapes.drafts(short, tapes.contexts([turn.context for turn in turns], self.time))
        if draft is None or draft.tokens.shape[1] == int(draft.draft_length.min()):
            return
        alone = [tapes.drafts([turn], tapes.contexts([turn.context], self.time)) for turn in short]
        kept = self.policy, self.together, self.alone
        self.policy, self.together = together, tapes.copied_state(self.together)
        self.alone = {row: tapes.copied_state(state) for row, state in self.alone.items()}
        self.cut = draft.draft_length.tolist()
        self._decide("truncate", draft, alone)
        self.cut = None
        self.policy, self.together, self.alone = kept

    def _decide(self, method: str, given: Context | Draft, alone: Sequence[Context | Draft | None]) -> None:
        """Ask about the batch and about each request; None where it would not be asked alone."""
        twins, before = [self._twin() for _ in alone], (self._twin(), tapes.copied_state(self.together))
        answer, drew = self._asked(self.policy, method, self.together, given)
        self._whole(self.together, len(self.order), method, self.order)
        for place, (row, twin, single) in enumerate(zip(self.order, twins, alone, strict=True)):
            if single is None:
                continue
            before_alone = copy.deepcopy(twin) if drew and self.copies else twin, tapes.copied_state(self.alone[row])
            expected, _ = self._asked(twin, method, self.alone[row], single, row)
            if answer[place] == expected[0]:
                self.compared += 1
            elif drew:
                self.drawn += 1
                if (method, row) not in self.sampled:
                    self.sampled.add((method, row))
                    self._sample(method, row, (*before, given, place), (*before_alone, single, 0))
            else:
                self._differs(
                    method, row, f"{expected[0]}, as alone", f"in the batch it answered {answer[place]} for it"
                )

    def _sample(self, method: str, row: int, together: Asked, alone: Asked) -> None:
        """Decisions at random: the same question many times over, together and alone, must give the same mean."""
        answers = [self._answers(method, *asked, first) for asked, first in ((together, 0), (alone, SAMPLES))]
        (ours, mean), (theirs, alone_mean) = ((given, given.mean()) for given in answers)
        error = float(((ours.var() + theirs.var()) / SAMPLES).sqrt())
        if abs(float(mean - alone_mean)) > SIGMAS * error + 1e-9:
            self._differs(
                method,
                row,
                f"decisions at random have the mean {float(alone_mean):.2f} of {SAMPLES} draws, as alone",
                f"in the batch the mean is {float(mean):.2f}, more than {SIGMAS} standard errors away",
            )

    def _answers(
        self, method: str, policy: Policy, state: State, given: Context | Draft, place: int, first: int
    ) -> Tensor:
        """What one row gets for many states of the generator: float64 [SAMPLES]."""
        found = []
        generator = given.generator if isinstance(given, Context) else given.context.generator
        for seed in range(first, first + SAMPLES):
            generator.manual_seed(seed)
            asked = copy.deepcopy(policy) if self.copies else policy
            answer, _ = self._asked(asked, method, tapes.copied_state(state), given)
            found.append(answer[place])
        return torch.tensor(found, dtype=torch.float64)

    def _observe(self, seen: Sequence[Step]) -> None:
        """Feed a step back; the time of it is everyone's, or an equal part of it each one's."""
        whole = tapes.total(seen)
        twins = [self._twin() for _ in self.order]
        self._call(self.policy, "observe", self.together, tapes.steps(seen, whole))
        self._whole(self.together, len(self.order), "observe", self.order)
        for place, (row, twin) in enumerate(zip(self.order, twins, strict=True)):
            before = tapes.copied_state(self.alone[row])
            mine = tapes.rows_of(self.together, [place])
            self._call(twin, "observe", self.alone[row], tapes.steps([seen[place]], tapes.share(whole, len(seen))))
            if _unlike(mine, self.alone[row]) is not None:
                self._call(self._twin(), "observe", before, tapes.steps([seen[place]], whole))
                if _unlike(mine, before) is None:
                    self.alone[row] = before
            self._same_state("observe", row, mine, self.alone[row])

    # What is expected

    def _same_state(self, method: str, row: int, mine: State, alone: State) -> None:
        unlike = _unlike(mine, alone)
        if unlike is not None:
            name = unlike
            had, got = (_shown(state.get(name)) for state in (alone, mine))
            self._differs(
                method, row, f"state[{name!r}] = {had}, as alone", f"in the batch its row of state[{name!r}] is {got}"
            )
        self.compared += 1

    def _differs(self, method: str, row: int, expected: str, got: str) -> None:
        self.out.fail(
            f"{self._batch(method)}; then called it for request {self.tapes[row]} alone",
            f"for that request {expected}: rows of a batch are strangers",
            f"{got}. Keep to the row: reduce over the last axes only, mind `draft.draft_length` (what is "
            "beyond it is padding), make every name of the state in `begin`; `joint = True` if rows share a budget",
        )
        raise Stop

    def _whole(self, state: object, count: int, method: str, requests: Sequence[int]) -> None:
        """The state is a dict of tensors, batch axis first."""
        wrong = tapes.bad_state(state, count)
        if wrong is not None:
            self.out.fail(
                f"{self._batch(method, requests)} and looked at the state",
                "a dict of tensors whose first axis is the batch, so that rows can leave and join",
                wrong,
            )
            raise Stop

    def _batch(self, method: str, requests: Sequence[int] | None = None) -> str:
        listed = ", ".join(str(self.tapes[row]) for row in (self.order if requests is None else requests))
        cut = f", the drafts cut to {self.cut} tokens" if self.cut and method == "truncate" else ""
        return (
            f"called {self.name}.{method} for a batch (step {self.time + 1}, drafter {self.drafter}) of {listed}{cut}"
        )

    # Calls

    def _turns(self, row: int) -> list[Turn]:
        return self.tapes[row].turns if row < len(self.tapes) else []

    def _twin(self) -> Policy:
        """A copy that knows what the policy knows now; the policy itself if it cannot be copied."""
        if self.copies:
            try:
                return copy.deepcopy(self.policy)
            except Exception as error:
                self.copies, self.why = False, f"{type(error).__name__}: {error}"
        return self.policy

    def _asked(
        self, policy: Policy, method: str, state: State, given: Context | Draft, row: int | None = None
    ) -> tuple[list[int], bool]:
        """The answer as numbers, and whether it drew."""
        generator = given.generator if isinstance(given, Context) else given.context.generator
        before = generator.get_state()
        answer = self._call(policy, method, state, given, row=row)
        wrong = wrong_answer(method, answer, given, LARGEST)
        if wrong is not None:
            self._failed(method, wrong.text, row, beyond=method == "truncate" and wrong.kind == "size")
        assert isinstance(answer, Tensor)
        return [int(number) for number in answer.tolist()], not torch.equal(before, generator.get_state())

    def _call(self, policy: Policy, method: str, *arguments: Any, row: int | None = None) -> Any:
        seed_everything(self.time)  # the same for everyone: other randomness is another check's
        function: Callable[..., Any] = getattr(policy, method)
        try:
            return function(*arguments)
        except Exception as error:
            self._failed(method, f"it raised {type(error).__name__}: {error}", row)

    def _failed(self, method: str, text: str, row: int | None, *, beyond: bool = False) -> None:
        """Args: beyond: it answered with a length that the draft does not have."""
        alone = "" if row is None else f"; then called it for request {self.tapes[row]} alone"
        expected = f"{self.name}.{method} serves any number of requests at once: every tensor has a batch axis"
        if beyond:
            expected = (
                f"{self.name}.{method} verifies 0 .. draft.draft_length of each row, whatever lengths the others have"
            )
            text += ": beyond draft.draft_length is padding; use torch.minimum(answer, draft.draft_length)"
        self.out.fail(f"{self._batch(method)}{alone}", expected, text)
        raise Stop


def _unlike(one: State, other: State) -> str | None:
    """The name of a tensor that differs by more than rounding, if there is one in both."""
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.shape != b.shape:
            return name
        if a.is_floating_point() and b.is_floating_point():
            if not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
                return name
        elif not same(a, b):
            return name
    return None


def _shown(value: Any) -> str:
    text = str(value.tolist()) if isinstance(value, Tensor) else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."
