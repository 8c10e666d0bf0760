"""How long decisions take, beside a step of the tiny pair."""

from __future__ import annotations

from statistics import median

from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import Recording
from bpkit.testing.checks.records import DECIDES
from bpkit.testing.checks.report import Findings


def timing(policy: CheckedPolicy, out: Findings) -> None:
    """Medians over the usual recordings."""
    drafter, recordings = next(iter(policy.clean().items()))
    step = setup.step_seconds(drafter)
    taken, slow = beside_a_step(recordings, step)
    out.notes += slow
    out.said = f"{taken}; a step of the tiny pair takes {micro(step)}"
    out.note(
        f"medians of {sum(len(each.calls) for each in recordings)} calls, drafter {drafter}. Steps of real models take "
        "longer than those of the tiny pair: see a decision beside yours with `bpkit check --target ... --drafter "
        "...`, or time it with `bpkit bench policy`"
    )


def beside_a_step(recordings: list[Recording], step: float) -> tuple[str, list[str]]:
    """What methods that decide take, and notes on those that take longer than a step, which is `step` seconds."""
    taken = {
        method: median(seconds)
        for method in (*DECIDES, "observe")
        if (seconds := [call.seconds for each in recordings for call in each.calls if call.method == method])
    }
    slow = [
        f"a call of `{method}` takes longer than a whole step: {micro(seconds)}, and a step {micro(step)} without it. "
        "What it saves must pay for that"
        for method, seconds in taken.items()
        if seconds > step
    ]
    return ", ".join(f"{method} {micro(seconds)}" for method, seconds in taken.items()), slow


def micro(seconds: float) -> str:
    """As microseconds or milliseconds.

    >>> micro(0.0000123), micro(0.0123)
    ('12 µs', '12.3 ms')
    """
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
