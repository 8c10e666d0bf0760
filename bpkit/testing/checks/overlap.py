"""Requests that overlap in time: what a policy decides for one does not depend on those that run meanwhile.

Of one that keeps something of a request on `self`, even if `begin` resets it, requests that overlap take what another
has left there. A memory across requests cannot be told apart from that.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from bpkit.policy import Policy
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import Recording, first_difference
from bpkit.testing.checks.repeated import OTHER
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.setup import TOGETHER


def overlap(policy: CheckedPolicy, out: Findings) -> None:
    """The first usual cases once more, a record of each in turn, under one policy; one drafter shows as much as all."""
    drafter, usual = list(policy.clean().items())[-1]  # where drafts mostly stand, so that steps differ
    if _remembers(policy.recorders[drafter].policy):
        raise Skip(
            f"{policy.name} has a memory across requests (`state_dict`), which overlapping ones share; whether "
            "something of a single request is on `self` cannot be told apart from it"
        )
    recorder, alone = policy.recorder(drafter), usual[:TOGETHER]  # the first, whose random numbers are the same
    seen = [_plain_values(recorder.policy)]  # after every record
    recordings = recorder.record_in_turn(
        [each.case for each in alone], lambda: seen.append(_plain_values(recorder.policy))
    )
    out.said = (
        f"{sum(len(each.decisions) for each in recordings)} decisions for {len(alone)} requests that took turns, the "
        "same as for each alone"
    )
    differ = [
        (other.fault is None, parted.step, place, parted)
        for place, (one, other) in enumerate(zip(alone, recordings, strict=True))
        if (parted := first_difference(one, other)) is not None
    ]
    if not differ:
        return
    _rule_out_others(policy, drafter, alone)
    _, step, place, parted = min(differ)  # the request that a fault ended, else the one that differs first
    listed = "; ".join(f"({number}) {each.case}" for number, each in enumerate(alone, start=1))
    changed = {name for before, now in pairwise(seen) for name in now if now[name] != before.get(name)}
    attributes = ", ".join(f"self.{name}" for name in sorted(changed))
    out.fail(
        f"decoded {len(alone)} requests at the same time with one decoder, a record of each in turn, drafter "
        f"{drafter}: {listed}",
        f"{policy.name} decides for each what it decides for it alone; for request {place + 1}, {parted.where} (step "
        f"{step}) is {parted.one}",
        f"it was {parted.other}. Something of a request is kept on `self`, where the next one finds it, even if "
        "`begin` resets it: put it into the dict that `begin` returns, with the batch axis first"
        + (f". What changed on the policy meanwhile: {attributes}" if changed else ""),
        drafter=drafter,
    )


def _plain_values(policy: Policy) -> dict[str, str]:
    """Attributes that may be a request's, of help to whoever looks for the one that is."""
    plain: Any = bool | int | float | str | list | tuple | dict | set | Tensor | None
    return {name: repr(value) for name, value in vars(policy).items() if isinstance(value, plain)}


def _remembers(policy: Policy) -> bool:
    """Whether there is a memory across requests, after the usual ones; whether it is a good one, `memory` says."""
    try:
        return bool(policy.state_dict())
    except Exception:
        return True


def _rule_out_others(policy: CheckedPolicy, drafter: str, alone: list[Recording]) -> None:
    """Raise Skip if a fresh policy decides otherwise for one alone, after no others and under other global seeds."""
    for place, each in enumerate(alone):
        recorder = policy.recorder(drafter)
        recorder.decoder.requests = place  # so that the request has the number, and random numbers, that it had
        if first_difference(each, recorder.record(each.case, surroundings=OTHER)) is not None:
            raise Skip(
                "its decisions hang on earlier requests or on global randomness, as `memory` or `determinism` tells"
            )
