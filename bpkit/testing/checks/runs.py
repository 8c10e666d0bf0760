"""Generations of a policy under a witness, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.guard import PolicyFault
from bpkit.policy import Policy
from bpkit.testing.checks.answers import Fault
from bpkit.testing.checks.stage import LARGEST, Case, Plain, stage
from bpkit.testing.checks.surroundings import seed_everything
from bpkit.testing.checks.witness import Call, Witness


@dataclass
class Run:
    """One generation.

    Attributes:
        drafter: its name on the stage. calls: of the policy, in order.
        tokens: of the output, or None if the policy's fault ended it. near_ties: too close to call.
    """

    drafter: str
    case: Case
    calls: list[Call] = field(default_factory=list)
    tokens: tuple[int, ...] | None = None
    fault: Fault | None = None

    @property
    def decisions(self) -> list[tuple[str, list[int]]]:
        """Every decision in order: the method and its answer."""
        return [(call.method, call.answer) for call in self.calls if call.answer is not None]

    def __str__(self) -> str:
        return f"drafter {self.drafter}, {self.case}"


class Player:
    """A policy at work with one drafter, request after request.

    Args:
        policy: not bound yet. force: as of `Witness`.

    Raises:
        PolicyError: the policy cannot serve this drafter.
    """

    def __init__(self, policy: Policy, drafter: str, *, force: int | None = None) -> None:
        self.policy, self.drafter = policy, drafter
        self.decoder: SpeculativeDecoder = stage().decoder(drafter, policy)
        self.witness = Witness(policy, LARGEST, force=force)

    def play(self, case: Case, *, surroundings: int = 0) -> Run:
        """Decode; a fault of the policy ends it and is noted.

        Args:
            surroundings: seed of the global generators while it decodes.
        """
        seed_everything(surroundings)
        run = Run(self.drafter, case)
        try:
            made = self.decoder.generate(case.prompt, **case.options())
            run.tokens = tuple(made.tokens[0].tolist())
        except Exception as error:
            run.fault = self._fault(error)
        run.calls = self.witness.take()
        return run

    def play_in_turn(self, cases: Sequence[Case], after: Callable[[], None]) -> list[Run]:
        """Decode several requests at the same time, a record of each in turn; the first fault ends them all.

        Args:
            after: is called after every record.
        """
        seed_everything(0)
        runs = [Run(self.drafter, case) for case in cases]
        with ExitStack() as opened:
            going = [opened.enter_context(self.decoder.run(case.prompt, **case.options())) for case in cases]
            turns = list(zip(runs, going, strict=True))
            while turns:
                for run, records in tuple(turns):
                    try:
                        if next(records, None) is None:
                            turns.remove((run, records))
                    except Exception as error:
                        run.fault = self._fault(error)
                    run.calls += self.witness.take()
                    after()
                    if run.fault is not None:
                        return runs
        return runs

    def _fault(self, error: Exception) -> Fault:
        """What the witness saw, else what the runtime says."""
        text = str(error)
        if not isinstance(error, PolicyFault):  # the policy left something behind that the runtime stumbled over
            text = f"decoding ended with {type(error).__name__}: {error}"
        return self.witness.fault or Fault("a method", "raised", text)


def difference(tokens: tuple[int, ...], plain: Plain) -> tuple[int, bool] | None:
    """Where tokens part from those of plain decoding, and whether that place was too close to call. None: nowhere."""
    for place, (ours, theirs) in enumerate(zip(tokens, plain.tokens, strict=False)):
        if ours != theirs:
            return place, place in plain.near_ties
    if len(tokens) != len(plain.tokens):
        return min(len(tokens), len(plain.tokens)), False
    return None
