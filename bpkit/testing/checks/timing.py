"""How long decisions take, beside a step of the tiny pair."""

from __future__ import annotations

from statistics import median

from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import Recording
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.setup import tiny_setup


def timing(policy: CheckedPolicy, out: Findings) -> None:
    """Medians over the usual recordings."""
    drafter, recordings = next(iter(policy.clean().items()))
    step = tiny_setup().step_seconds(drafter)
    text, slow = beside_a_step(recordings, step)
    for note in slow:
        out.note(note)
    out.said = f"{text}; a step of the tiny pair takes {micro(step)}"
    out.note(
        f"medians of {sum(len(each.calls) for each in recordings)} calls, drafter {drafter}. Steps of real models take "
        "longer than those of the tiny pair: see a decision beside yours with `bpkit check --target ... --drafter "
        "...`, or time it with `bpkit bench policy`"
    )


def beside_a_step(recordings: list[Recording], step: float) -> tuple[str, list[str]]:
    """What methods that decide take, and notes on those that take longer than a step, which is `step` seconds."""
    calls = [call for recording in recordings for call in recording.calls]
    said, slow = [], []
    for method in ("select", "extend", "truncate", "observe"):
        taken = [call.seconds for call in calls if call.method == method]
        if not taken:
            continue
        seconds = median(taken)
        said.append(f"{method} {micro(seconds)}")
        if seconds > step:
            slow.append(
                f"a call of `{method}` takes longer than a whole step: {micro(seconds)}, and a step {micro(step)} "
                "without it. What it saves must pay for that"
            )
    return ", ".join(said), slow


def micro(seconds: float) -> str:
    """As microseconds or milliseconds.

    >>> micro(0.0000123), micro(0.0123)
    ('12 µs', '12.3 ms')
    """
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
