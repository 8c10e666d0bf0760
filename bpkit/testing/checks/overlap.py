"""Requests that overlap in time: what a policy decides for one does not depend on those that run meanwhile.

A decoder may have several runs open, and read a record of one, then of another. Where a policy has no memory across
requests, every decision must be that of the request alone. One that keeps something of a request on `self` decides by
the wrong request here, even if `begin` resets it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bpkit.policy import Policy
from bpkit.testing.checks.determinism import OTHER, first_difference
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.runs import Run
from bpkit.testing.checks.subject import Subject

TOGETHER = 3
"""Usual cases that overlap. Among the usual ones they are the first, so that their random numbers are the same."""


def overlap(subject: Subject, out: Findings) -> None:
    """The first usual cases once more, a record of each in turn, under one policy; one drafter shows as much as all."""
    drafter, usual = list(subject.clean().items())[-1]  # where drafts mostly stand, so that steps differ
    if _remembers(subject.players[drafter].policy):
        raise Skip(
            f"{subject.name} has a memory across requests (`state_dict`), which overlapping ones share; whether "
            "something of a single request is on `self` cannot be told apart from it"
        )
    player, alone = subject.player(drafter), usual[:TOGETHER]
    watch = Attributes(player.policy)
    runs = player.play_in_turn([run.case for run in alone], watch.look)
    place = _parted(alone, runs)
    if place is not None:
        _rule_out_others(subject, drafter, alone)
        _tell(subject.name, alone, runs[place], place, watch, out)
    compared = sum(len(run.decisions) for run in runs)
    out.said = f"{compared} decisions for {len(runs)} requests that took turns, the same as for each alone"


class Attributes:
    """Which plain values on a policy change: of help to whoever looks for the one that is a request's."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.changed: set[str] = set()
        self._before = self._values()

    def look(self) -> None:
        """Note what is not as it was the last time."""
        now = self._values()
        self.changed |= {name for name in now if now[name] != self._before.get(name)}
        self._before = now

    def _values(self) -> dict[str, str]:
        return {name: repr(value) for name, value in vars(self.policy).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict | set | Tensor)


def _remembers(policy: Policy) -> bool:
    """Whether there is a memory across requests, after the usual ones; whether it is a good one, `memory` says."""
    try:
        return bool(policy.state_dict())
    except Exception:
        return True


def _parted(alone: list[Run], runs: list[Run]) -> int | None:
    """Which request to tell of: the one that a fault ended, else the one that differs in the earliest step."""
    for place, run in enumerate(runs):
        if run.fault is not None:
            return place
    found = [
        (_step(one, other), place)
        for place, (one, other) in enumerate(zip(alone, runs, strict=True))
        if first_difference(one, other) is not None
    ]
    return min(found)[1] if found else None


def _step(one: Run, other: Run) -> int:
    """The step of the first decision that differs, from 1; every step begins with `select`."""
    step = 0
    for place, made in enumerate(one.decisions):
        step += made[0] == "select"
        if other.decisions[place : place + 1] != [made]:
            break
    return step


def _rule_out_others(subject: Subject, drafter: str, alone: list[Run]) -> None:
    """Raise Skip if a fresh policy decides otherwise for one alone, after no others and under other global seeds."""
    for place, run in enumerate(alone):
        player = subject.player(drafter)
        player.decoder.requests = place  # so that the request has the number, and random numbers, that it had
        if first_difference(run, player.play(run.case, surroundings=OTHER)) is not None:
            raise Skip(
                "its decisions hang on earlier requests or on global randomness, as `memory` or `determinism` tells"
            )


def _tell(name: str, alone: list[Run], run: Run, place: int, watch: Attributes, out: Findings) -> None:
    parted = first_difference(alone[place], run)
    assert parted is not None
    where, one, other = parted
    listed = "; ".join(f"({number}) {each.case}" for number, each in enumerate(alone, start=1))
    seen = ", ".join(f"self.{attribute}" for attribute in sorted(watch.changed))
    out.fail(
        f"decoded {len(alone)} requests at the same time with one decoder, a record of each in turn, drafter "
        f"{run.drafter}: {listed}",
        f"{name} decides for each what it decides for it alone; for request {place + 1}, {where} (step "
        f"{_step(alone[place], run)}) is {one}",
        f"it was {other}. Something of a request is kept on `self`, where the next one finds it, even if `begin` "
        "resets it: put it into the dict that `begin` returns, with the batch axis first"
        + (f". What changed on the policy meanwhile: {seen}" if seen else ""),
        drafter=run.drafter,
    )
