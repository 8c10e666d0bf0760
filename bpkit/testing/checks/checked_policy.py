"""The policy under check: how to make it anew, which drafters serve it, its usual recordings, which checks share."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from bpkit.decode.guard import kind_of
from bpkit.learn.trained import TrainedPolicy
from bpkit.policy import Policy, PolicyError
from bpkit.registry.resolve import PolicyLike, resolve_policy
from bpkit.testing.checks import setup
from bpkit.testing.checks.fresh_weights import FreshWeights, NoTrainer, NoWeights
from bpkit.testing.checks.recorder import CallRecorder, Fault, Recording, raised
from bpkit.testing.checks.report import Skip, gist
from bpkit.testing.checks.setup import ASSISTANT, DFLASH, PROMPTS, SOURCES, USUAL, Case

FEWER = 3
"""Cases with the assistant, whose drafts tell little that the other two do not."""
LATER = 2
"""Usual cases that are decoded after `state_dict` was asked for."""

PolicyToCheck = PolicyLike | type[Policy]


class CheckedPolicy:
    """A policy under check.

    Attributes:
        name: of its class. shown: with its options.
        drafters: that serve it, by their names in the setup. left_out: the others, and why.
        saved: by drafter, what `state_dict` gave before the last `LATER` usual cases, through JSON and back, or what
            is wrong with it. recorders: by drafter, those of the usual recordings.
        fails_in_batches: whether `rows` found something.

    Raises:
        PolicyError: there is no such policy, or none of the usual drafters serves it.
    """

    def __init__(self, policy: PolicyToCheck, seed: int) -> None:
        self.seed = seed
        self._make = _maker(policy)
        first = self._make()
        self.name, self.shown = type(first).__name__, repr(first)
        self._weights = FreshWeights(first) if isinstance(first, TrainedPolicy) else None
        self.saved: dict[str, dict[str, Any] | str] = {}
        self.recorders: dict[str, CallRecorder] = {}
        self.fails_in_batches = False
        self._unbound: dict[str, Fault] = {}
        self._refused: dict[str, PolicyError] = {}
        self.drafters = [drafter for drafter in USUAL if self._serves(drafter)]
        if not self.drafters and self._weights is None and self._serves(SOURCES):
            self.drafters = [SOURCES]
        self.left_out = {drafter: str(why) for drafter, why in self._refused.items()}
        if not self.drafters:
            raise self._unserved()

    def fresh(self, drafter: str) -> Policy:
        """A new policy that was not bound yet and knows nothing; with weights, if it has any, for this drafter."""
        if self._weights is None:
            return self._make()
        return self._weights.policy(DFLASH if drafter == SOURCES else drafter)  # the first of the sources

    def recorder(self, drafter: str, *, force: Callable[[Tensor], Tensor] | None = None) -> CallRecorder:
        """A new policy at work with a drafter. Raises PolicyError if it cannot serve it."""
        return CallRecorder(setup.decoder(drafter, self.fresh(drafter)), drafter, force=force)

    @cached_property
    def cases(self) -> list[Case]:
        """The usual generations: prompts at temperature 0 and, seeded, at 1."""
        temperatures = (0.0, 1.0, 0.0, 1.0, 1.0)
        return [Case(text, t, self.seed, i) for i, (text, t) in enumerate(zip(PROMPTS, temperatures, strict=True))]

    @cached_property
    def usual(self) -> dict[str, list[Recording]]:
        """The usual recordings with every drafter, one policy for all that a drafter drafts; a fault ends them."""
        return {drafter: self._record(drafter) for drafter in self.drafters}

    @property
    def faults(self) -> list[tuple[Recording, Fault]]:
        """What ended usual recordings."""
        return [(each, each.fault) for made in self.usual.values() for each in made if each.fault is not None]

    def clean(self) -> dict[str, list[Recording]]:
        """The usual recordings of drafters with which the policy made no fault. Raises Skip if there is none."""
        faulty = {recording.drafter for recording, _ in self.faults}
        found = {drafter: made for drafter, made in self.usual.items() if drafter not in faulty}
        if not found:
            raise Skip("no usual generation of the policy came to its end; mend the other failures first")
        return found

    def ends(self) -> dict[str, list[Recording]]:
        """Those of the first and the last drafter, where drafts hardly ever stand and where they mostly do."""
        clean = self.clean()
        return {drafter: clean[drafter] for drafter in (next(iter(clean)), list(clean)[-1])}

    def _record(self, drafter: str) -> list[Recording]:
        if drafter in self._unbound:
            return [Recording(drafter, self.cases[0], fault=self._unbound[drafter])]
        recorder, recordings = self.recorders[drafter], list[Recording]()
        cases = self.cases[:FEWER] if drafter == ASSISTANT else self.cases
        for place, case in enumerate(cases):
            if place == len(cases) - LATER:
                self.saved[drafter] = _saved(recorder.policy)
            recordings.append(recorder.record(case))
            if recordings[-1].fault is not None:
                break
        return recordings

    def _serves(self, drafter: str) -> bool:
        """Whether the policy can be bound to a decoder with this drafter; why not, is noted."""
        try:
            self.recorders[drafter] = self.recorder(drafter)
        except NoTrainer:
            raise
        except PolicyError as error:
            self._refused[drafter] = error
            return False
        except Exception as error:
            self._unbound[drafter] = Fault("bind", "raised", raised(error))
        return True

    def _unserved(self) -> PolicyError:
        """Why nothing can be checked, each reason once."""
        groups: dict[str, list[str]] = {}
        for drafter, why in self.left_out.items():
            groups.setdefault(gist(why), []).append(drafter)
        reasons = [(", ".join(drafters), self.left_out[drafters[0]]) for drafters in groups.values()]
        if all(isinstance(why, NoWeights) for why in self._refused.values()):
            causes = "; ".join(why for _, why in reasons)
            return PolicyError(
                f"policy {self.name} cannot be checked, because no weights for the tiny pair can be made: {causes}"
            )
        served = "; ".join(f"{drafters}: {why}" for drafters, why in reasons)
        return PolicyError(
            f"policy {self.name} cannot be checked on the tiny pair, no drafter serves it: {served}. With the "
            "models that it is for: `bpkit check POLICY --shipped`, or --target and --drafter"
        )


def _saved(policy: Policy) -> dict[str, Any] | str:
    try:
        saved = policy.state_dict()
        if not isinstance(saved, dict):
            return f"it returned {kind_of(saved)}"
        read: dict[str, Any] = json.loads(json.dumps(saved, allow_nan=False))
        return read
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _maker(policy: PolicyToCheck) -> Callable[[], Policy]:
    """Makes the policy anew every time."""
    if isinstance(policy, type):
        if not issubclass(policy, Policy):
            raise PolicyError(f"{policy.__name__} is not a subclass of bpkit.Policy")
        return policy
    if not isinstance(policy, Policy):
        return lambda: resolve_policy(policy)
    try:
        original = copy.deepcopy(policy)
    except Exception as error:
        raise PolicyError(
            f"this {type(policy).__name__} cannot be copied ({type(error).__name__}: {error}): hand over its class, or "
            "its name with options, so that it can be made anew"
        ) from error
    return lambda: copy.deepcopy(original)
