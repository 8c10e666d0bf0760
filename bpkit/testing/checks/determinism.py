"""All that a policy decides follows from what it is handed: the seed of its generator and the clock included."""

from __future__ import annotations

from collections.abc import Collection

from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.runs import Run
from bpkit.testing.checks.subject import Subject

OTHER = 12345
"""Seed of the global generators in the second run; in the first it is 0."""

AGAIN = 3
"""Usual runs that are made once more."""


def determinism(subject: Subject, out: Findings) -> None:
    """The first usual runs once more, with another policy of the same kind and other global randomness."""
    compared = 0
    for drafter, first in ends(subject.clean()).items():
        player = subject.player(drafter)
        for run in first[:AGAIN]:
            again = player.play(run.case, surroundings=OTHER)
            if not same_decisions(subject.name, run, again, out):
                break
            compared += len(run.decisions)
    out.said = f"{compared} decisions twice, same seed, steps priced by the same cost model"


def ends(clean: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """The first and the last, where drafts hardly ever stand and where they mostly do."""
    return {drafter: clean[drafter] for drafter in (next(iter(clean)), list(clean)[-1])}


def same_decisions(name: str, first: Run, second: Run, out: Findings) -> bool:
    """Whether two runs of one case decide the same; tell of the first difference."""
    parted = first_difference(first, second)
    if parted is None:
        return True
    where, one, other = parted
    out.fail(
        f"decoded twice with {first}: two fresh policies, the same seed, every step priced by the same cost model",
        f"{name} decides the same both times: random numbers come from `context.generator`, time from `step.seconds`",
        f"{where} was {one} the first time and {other} the second",
        drafter=first.drafter,
    )
    return False


def first_difference(
    first: Run, second: Run, methods: Collection[str] = ("select", "extend", "truncate")
) -> tuple[str, str, str] | None:
    """Which decision differs, and what it was in either run."""
    if second.fault is not None:
        return f"the answer of {second.fault.method}", "a decision", f"none ({second.fault.text})"
    ours, theirs = ([made for made in run.decisions if made[0] in methods] for run in (first, second))
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            count = sum(method == one[0] for method, _ in ours[: place + 1])
            got = str(other[1]) if one[0] == other[0] else f"one of {other[0]} instead"
            return f"answer {count} of {one[0]}", str(one[1]), got
    if len(ours) != len(theirs):
        return "the number of decisions", str(len(ours)), str(len(theirs))
    return None
