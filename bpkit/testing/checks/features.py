"""`wants` is what the policy reads."""

from __future__ import annotations

from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.subject import Subject
from bpkit.types import Feature

_WHERE = "draft features are given to `truncate` and `extend`, prefill features to `begin`"


def features(subject: Subject, out: Findings) -> None:
    """What was read in the usual runs, and what was asked for and not there."""
    players = {name: player for name, player in subject.players.items() if name in subject.usual}
    wanted: set[str] = set()
    optional: set[str] = set()
    read: set[str] = set()
    for drafter, player in players.items():
        wanted |= set(map(str, player.policy.wants))
        optional |= set(map(str, player.policy.wants_optional))
        read |= set().union(*player.witness.read.values())
        for method, missed in player.witness.missed.items():
            for name in sorted(missed):
                _missed(subject.name, method, name, drafter, wanted, optional, out)
    whole = all(run.fault is None for runs in subject.usual.values() for run in runs)
    if whole:
        for name in sorted(wanted - read):
            out.fail(
                f"decoded {len(subject.cases)} prompts with each drafter ({', '.join(subject.drafters)})",
                f"{subject.name} reads every feature of its `wants`, because each is computed at every step",
                f"no method ever read {name!r}: take it out of `wants`, or into `wants_optional` if it is rarely used",
            )
        for name in sorted(optional - wanted - read):
            out.note(f"{name!r} of wants_optional was never read")
    out.said = f"declared and read: {', '.join(sorted(read)) or 'none'}"


def _missed(
    policy: str, method: str, name: str, drafter: str, wanted: set[str], optional: set[str], out: Findings
) -> None:
    if name in optional - wanted:
        return  # a drafter that does not provide it; what the policy did about it is seen elsewhere
    if name in wanted:
        got = f"it reads {name!r}, which is not there: {_WHERE}"
    elif name in frozenset(map(str, Feature)):
        got = f"it reads {name!r}, which `wants` does not name, so that it is not computed: add it to `wants`"
    else:
        got = f"it reads {name!r}, and there is no such feature: see bpkit.Feature"
    declared = ", ".join(sorted(wanted)) or "none"
    out.fail(
        f"watched what {policy}.{method} reads, drafter {drafter}",
        f"features that `wants` declares ({declared}), where they are given",
        got,
        drafter=drafter,
    )
