"""The policy that is checked: how to make it anew, which drafters serve it, and its usual runs, which checks share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

from bpkit.learn.trained import TrainedPolicy
from bpkit.policy import Policy, PolicyError
from bpkit.registry.resolve import PolicyLike, resolve_policy
from bpkit.testing.checks.answers import Fault
from bpkit.testing.checks.fresh import FreshWeights, NoTrainer, NoWeights
from bpkit.testing.checks.report import Skip, gist
from bpkit.testing.checks.runs import Player, Run
from bpkit.testing.checks.stage import ASSISTANT, PROMPTS, USUAL, Case, stage

FEWER = 3
"""Cases with the assistant, whose drafts tell little that the other two do not."""

PolicyToCheck = PolicyLike | type[Policy]


class Subject:
    """A policy to check.

    Attributes:
        name: of its class. shown: with its options.
        drafters: that serve it, by their names on the stage. left_out: the others, and why.

    Raises:
        PolicyError: there is no such policy, or none of the usual drafters serves it.
    """

    def __init__(self, policy: PolicyToCheck, seed: int) -> None:
        self.seed = seed
        self._make = _maker(policy)
        first = self._make()
        self.name, self.shown = type(first).__name__, repr(first)
        self._weights = FreshWeights(first) if isinstance(first, TrainedPolicy) else None
        self.left_out: dict[str, str] = {}
        self.unbound: dict[str, Fault] = {}
        self._without_weights: set[str] = set()
        self.drafters = [drafter for drafter in USUAL if self._serves(drafter)]
        if not self.drafters:
            raise self._unserved()

    @property
    def served(self) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """Drafters, and those left out with the reason, as a report has them."""
        return tuple(self.drafters), tuple(self.left_out.items())

    def fresh(self, drafter: str) -> Policy:
        """A new policy that was not bound yet and knows nothing; with weights, if it has any, for this drafter."""
        return self._make() if self._weights is None else self._weights.policy(drafter)

    def player(self, drafter: str, *, force: int | None = None) -> Player:
        """A new policy at work with a drafter. Raises PolicyError if it cannot serve it."""
        return Player(self.fresh(drafter), drafter, force=force)

    @cached_property
    def cases(self) -> list[Case]:
        """The usual generations: prompts at temperature 0 and, seeded, at 1."""
        temperatures = (0.0, 1.0, 0.0, 1.0, 1.0)
        return [Case(text, t, self.seed, i) for i, (text, t) in enumerate(zip(PROMPTS, temperatures, strict=True))]

    @cached_property
    def usual(self) -> dict[str, list[Run]]:
        """The usual runs with every drafter, one policy for all that a drafter drafts; a fault ends them."""
        return {drafter: self._runs(drafter) for drafter in self.drafters}

    @cached_property
    def players(self) -> dict[str, Player]:
        """The policies of the usual runs, after them, with their witnesses."""
        assert self.usual
        return self._players

    @property
    def faults(self) -> list[tuple[Run, Fault]]:
        """What ended usual runs."""
        return [(run, run.fault) for runs in self.usual.values() for run in runs if run.fault is not None]

    def clean(self) -> dict[str, list[Run]]:
        """The usual runs of drafters with which the policy made no fault. Raises Skip if there is none."""
        found = {drafter: runs for drafter, runs in self.usual.items() if all(run.fault is None for run in runs)}
        if not found:
            raise Skip("no usual run of the policy came to its end; mend the other failures first")
        return found

    def _runs(self, drafter: str) -> list[Run]:
        if drafter in self.unbound:
            return [Run(drafter, self.cases[0], fault=self.unbound[drafter])]
        player, runs = self.player(drafter), []
        self._players[drafter] = player
        for case in self.cases[:FEWER] if drafter == ASSISTANT else self.cases:
            runs.append(player.play(case))
            if runs[-1].fault is not None:
                break
        return runs

    @cached_property
    def _players(self) -> dict[str, Player]:
        return {}

    def _serves(self, drafter: str) -> bool:
        """Whether the policy can be bound to a decoder with this drafter; why not, is noted."""
        try:
            stage().decoder(drafter, self.fresh(drafter))
        except NoTrainer:
            raise
        except PolicyError as error:
            self.left_out[drafter] = str(error)
            if isinstance(error, NoWeights):
                self._without_weights.add(drafter)
            return False
        except Exception as error:
            self.unbound[drafter] = Fault("bind", "raised", f"it raised {type(error).__name__}: {error}")
        return True

    def _unserved(self) -> PolicyError:
        """Why nothing can be checked, each reason once."""
        groups: dict[str, list[str]] = {}
        for drafter, why in self.left_out.items():
            groups.setdefault(gist(why), []).append(drafter)
        first = {drafters[0]: ", ".join(drafters) for drafters in groups.values()}
        if self._without_weights == set(self.left_out):
            causes = "; ".join(self.left_out[drafter] for drafter in first)
            return PolicyError(
                f"policy {self.name} cannot be checked, because no weights for the tiny pair can be made: {causes}"
            )
        reasons = "; ".join(f"{drafters}: {self.left_out[drafter]}" for drafter, drafters in first.items())
        return PolicyError(
            f"policy {self.name} cannot be checked on the tiny pair, no drafter serves it: {reasons}. With the "
            "models that it is for: `bpkit check POLICY --shipped`, or --target and --drafter"
        )


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
