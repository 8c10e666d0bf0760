"""Where the time of a step goes: wrappers of the two sessions and of the policy that read the clock around each call.

The loop knows nothing of them. `verify` is the target's passes, `draft` the drafter's, `policy` what the policy does
and what it wants of a draft; all else is `rest`. The time that the consumer of a record takes is nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bpkit.decode.clock import GuardedClock
from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.guard import GuardedPolicy, Selected
from bpkit.decode.sampling import Draw
from bpkit.decode.sources import SourceSessions
from bpkit.decode.target import TargetOutput, TargetSession
from bpkit.decode.trees import Shapes, Tree
from bpkit.policy import Policy
from bpkit.types import Context, DecoderSpec, Draft, Feature, Seconds, Step, Work


class Stopwatch:
    """Splits time into phases, lap by lap."""

    def __init__(self, clock: GuardedClock) -> None:
        self.clock = clock
        self.last, self.phase = clock.now(), "rest"
        self.spent: dict[str, float] = {}

    def resume(self) -> None:
        """Time that passed since the last lap is not counted."""
        self.last = self.clock.now()

    def lap(self, phase: str) -> None:
        """The time since the last lap went into `phase`."""
        now = self.clock.now()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self.last
        self.last, self.phase = now, phase

    def take(self, phase: str) -> float:
        """Time of a phase that is not to be charged to the next record."""
        return self.spent.pop(phase, 0.0)

    def give(self, phase: str, seconds: float) -> None:
        """Charge such time to the next record after all."""
        self.spent[phase] = self.spent.get(phase, 0.0) + seconds

    def charge(self, work: Work | None) -> Seconds:
        """What the clock charges for all since the last time: for a step that did `work`, or for prefill (None)."""
        self.lap("rest")
        spent, self.spent = Seconds(**self.spent), {}
        return self.clock.charge(spent, work)


class TimedTarget:
    """A target session whose passes are `verify`."""

    def __init__(self, session: TargetSession, watch: Stopwatch) -> None:
        self.session, self.watch = session, watch
        self.positions, self.rollback, self.embed = session.positions, session.rollback, session.embed
        self.keep, self.cache = session.keep, session.cache
        self.accept = getattr(session, "accept", None)

    @property
    def reread(self) -> int:
        return self.session.reread

    @property
    def held(self) -> list[int]:
        return self.session.held

    def join(self, other: TimedTarget) -> None:
        self.session.join(other.session)

    def prefill(self, tokens: Tensor, counts: Sequence[int], *, last: bool, **inputs: Any) -> TargetOutput:
        self.watch.resume()
        output = self.session.prefill(tokens, counts, last=last, **inputs)
        self.watch.lap("verify")
        return output

    def verify(self, tokens: Tensor, counts: Sequence[int]) -> TargetOutput:
        self.watch.lap("policy")  # features of the draft, after which it may have decided nothing
        output = self.session.verify(tokens, counts)
        self.watch.lap("verify")
        return output

    def verify_trees(self, tokens: Tensor, tree: Tree) -> TargetOutput:
        self.watch.lap("policy")
        session: Any = self.session
        output: TargetOutput = session.verify_trees(tokens, tree)
        self.watch.lap("verify")
        return output


class TimedDrafter:
    """Sessions of sources whose drafts are `draft`, without what the policy does in between; as is what they offer."""

    def __init__(self, session: SourceSessions, watch: Stopwatch) -> None:
        self.session, self.watch = session, watch
        self.advance, self.keep = session.advance, session.keep
        self.passed, self.verified, self.agreed = session.passed, session.verified, session.agreed

    @property
    def read(self) -> dict[int, int]:
        return self.session.read

    def join(self, other: TimedDrafter) -> None:
        self.session.join(other.session)

    def features(self, wants: frozenset[Feature]) -> dict[Feature, Tensor]:
        if self.watch.phase == "verify":  # of prompts
            self.watch.lap("rest")
        else:
            self.watch.resume()  # a turn begins
        found = self.session.features(wants)
        self.watch.lap("draft")
        return found

    def draft(
        self,
        block_size: Sequence[int],
        source: Sequence[int],
        draw: Draw,
        go_on: GoOn | None,
        wants: frozenset[Feature],
        shapes: Shapes | None = None,
    ) -> Proposal:
        proposal = self.session.draft(block_size, source, draw, go_on and self._timed(go_on), wants, shapes)
        self.watch.lap("draft")
        return proposal

    def _timed(self, go_on: GoOn) -> GoOn:
        def timed(latest: Proposal) -> list[bool]:
            self.watch.lap("draft")
            answer = go_on(latest)
            self.watch.lap("policy")
            return answer

        return timed


class TimedPolicy(GuardedPolicy):
    """A guarded policy whose methods are `policy`."""

    def __init__(
        self, policy: Policy, spec: DecoderSpec, watch: Stopwatch, *, strict: bool = False, stepwise: bool = False
    ) -> None:
        super().__init__(policy, spec, strict=strict, stepwise=stepwise)
        self.watch = watch

    def begin(self, context: Context) -> None:
        self.watch.lap("rest")
        super().begin(context)
        self.watch.lap("policy")

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor] | None:
        if self.watch.phase == "verify":
            self.watch.lap("rest")
        predictions = super().predict(features)
        self.watch.lap("policy")
        return predictions

    def select(self, context: Context) -> Selected:
        self.watch.resume()  # a turn begins
        chosen = super().select(context)
        self.watch.lap("policy")
        return chosen

    def truncate(self, draft: Draft) -> list[int]:
        lengths = super().truncate(draft)
        self.watch.lap("policy")
        return lengths

    def keep_nodes(self, draft: Draft) -> list[list[int]]:
        nodes = super().keep_nodes(draft)
        self.watch.lap("policy")
        return nodes

    def observe(self, step: Step) -> None:
        super().observe(step)
        self.watch.lap("policy")  # charged to the next step: this one's record is made
