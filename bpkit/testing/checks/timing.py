"""How long decisions take, beside a step of the tiny pair."""

from __future__ import annotations

from statistics import median

from bpkit.decode.clock import WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.runs import Run
from bpkit.testing.checks.stage import PROMPTS, stage
from bpkit.testing.checks.subject import Subject

DECIDING = ("select", "extend", "truncate", "observe")


def timing(subject: Subject, out: Findings) -> None:
    """Medians over the usual runs."""
    drafter, runs = next(iter(subject.clean().items()))
    step = _step_seconds(drafter)
    text = medians(runs)
    out.said = f"{text}; a step of the tiny pair takes {micro(step)}"
    note_slow(runs, step, out)
    out.note(
        f"medians of {sum(len(run.calls) for run in runs)} calls, drafter {drafter}. Steps of real models take longer "
        "than those of the tiny pair: see a decision beside yours with `bpkit check --target ... --drafter ...`, or "
        "time it with `bpkit bench policy`"
    )


def medians(runs: list[Run]) -> str:
    """Of every method that decides, as text."""
    return ", ".join(f"{method} {micro(seconds)}" for method, seconds in _medians(runs).items())


def note_slow(runs: list[Run], step: float, out: Findings) -> None:
    """Say which decisions take longer than a step, which is `step` seconds."""
    for method, seconds in _medians(runs).items():
        if seconds > step:
            out.note(
                f"a call of `{method}` takes longer than a whole step: {micro(seconds)}, and a step {micro(step)} "
                "without it. What it saves must pay for that"
            )


def _medians(runs: list[Run]) -> dict[str, float]:
    """Seconds of every method that decides."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for call in run.calls:
            found.setdefault(call.method, []).append(call.seconds)
    return {method: median(found[method]) for method in DECIDING if method in found}


def micro(seconds: float) -> str:
    """As microseconds or milliseconds.

    >>> micro(0.0000123), micro(0.0123)
    ('12 µs', '12.3 ms')
    """
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _step_seconds(drafter: str) -> float:
    """Median by the wall."""
    pair = stage().pair
    clock = WallClock(pair.target.device)
    decoder = SpeculativeDecoder(pair.target, stage().drafters[drafter], "fixed", tokenizer=pair.tokenizer, clock=clock)
    made = decoder.generate(PROMPTS[0], max_new_tokens=24, temperature=1.0, seed=0)
    return median(step.seconds.total for step in made.steps)
