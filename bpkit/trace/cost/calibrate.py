"""Measures what steps cost on this device: inside the live loop, with block sizes and verify widths interleaved."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from bpkit.decode.clock import Clock, WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.files import utc
from bpkit.installation.machine import describe_machine
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.trace.cost.estimate import estimate, worst_cell
from bpkit.trace.cost.random_sizes import RandomSizes
from bpkit.trace.cost.table import CostTable, Measured
from bpkit.trace.cost.timed import TimedSteps
from bpkit.types import OF_THE_DISTRIBUTION, DecoderSpec, Feature, Seconds, Work

REQUESTS_BETWEEN_LOOKS = 10

Progress = Callable[[str, int, int], None]
"""Is told what is going on, requests done in this round, and requests of a round."""


class RecordingClock:
    """The decoder's clock, with a memory of the work and the seconds of every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.timed: list[tuple[Work, Seconds]] = []

    def now(self) -> float:
        return self.clock.now()

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        seconds = self.clock.charge(measured, work)
        if work is not None:
            self.timed.append((work, seconds))
        return seconds


@dataclass(frozen=True)
class CalibrationSettings:
    """How long to measure, and what.

    Attributes:
        max_block_size: largest block size and verify width; the drafter's trained block size if None.
        spread: relative standard error below which a figure is good enough.
        max_minutes: at most; the request in hand is finished.
        rounds: over all prompts at most; None for no limit.
        options: of `SpeculativeDecoder.generate`, without the seed.
        seed: of sampling noise and of the order of prompts.
        command: to keep in the table.
    """

    max_block_size: int | None = None
    spread: float = 0.02
    max_minutes: float = 10.0
    rounds: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    command: str | None = None


def calibrate(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    progress: Progress | None = None,
) -> CostTable:
    """Measure until every draft and every target pass is known well enough, or time is up.

    The decoder's own policy does not run; its clock times the steps.

    Raises:
        ValueError: a block size that this drafter cannot draft; CostError if too little could be measured.
    """
    spec, target = decoder.spec, decoder.target
    largest = _largest(spec, settings.max_block_size)
    recorder = RecordingClock(decoder.clock.waiting() if isinstance(decoder.clock, WallClock) else decoder.clock)
    variants = [decoder.with_policy(policy) for policy in _policies(decoder, largest, settings)]
    machine = describe_machine(target.device)
    for variant in variants:
        variant.clock, variant.strict = recorder, True
        # First calls allocate and choose kernels.
        variant.run(prompts[0].text, seed=settings.seed, **settings.options).finish()
    recorder.timed.clear()
    started = time.time()
    rounds, ended = _measure(variants, recorder, prompts, settings, largest, progress)
    steps = TimedSteps.of(recorder.timed)
    cost, worst = estimate(steps, largest, spec.work), worst_cell(steps, largest)
    assert worst is not None  # or there would be no figures
    seconds, modelled, half = steps.measured, steps.modelled(cost), len(steps) // 2
    early, late = (seconds[part].sum() / modelled[part].sum() for part in (slice(half), slice(half, None)))
    dtype, threads = str(target.dtype).removeprefix("torch."), torch.get_num_threads()
    measured = Measured(
        target=spec.target,
        drafter=spec.drafter,
        drafter_kind=spec.drafter_kind,
        device=str(target.device),
        machine=machine,
        threads=threads,
        dtype=dtype,
        rule=spec.verify_rule,
        options=dict(settings.options),
        command=settings.command,
        started=utc(started),
        seconds=round(time.time() - started, 3),
        steps=len(steps),
        prompts=len(prompts),
        rounds=rounds,
        ended=ended,
        worst_spread=round(worst.spread, 5),
        modelled_over_measured=round(float(modelled.sum() / seconds.sum()), 4),
        drift=round(float(late / early) - 1, 4),
    )
    said = f"{spec.target} with {spec.drafter} on {machine['gpu'] or machine['cpu']}, {dtype}, {threads} thread(s)"
    return cost.model_copy(update={"description": said, "measured": measured})


def _largest(spec: DecoderSpec, asked: int | None) -> int:
    """The largest block size and width to measure. Raises ValueError if the drafter cannot draft it."""
    most = spec.max_block_size
    if asked is not None and not 2 <= asked <= most:
        raise ValueError(f"max_block_size {asked} is not within 2 .. {most}, what drafter {spec.drafter} can")
    return asked or max(spec.trained_block_size, 2)


def _policies(decoder: SpeculativeDecoder, largest: int, settings: CalibrationSettings) -> list[Policy]:
    """One that wants no features, and one that wants all that may be had: they take time too."""
    if not decoder.drafter.provides & OF_THE_DISTRIBUTION:
        return [RandomSizes(largest)]
    # Rejection sampling forbids a policy to see the probabilities of drafted tokens.
    forbidden = decoder.rule == "rejection" and settings.options.get("temperature") != 0

    class WithFeatures(RandomSizes):
        wants_optional = frozenset({Feature.DRAFT_ENTROPY}) if forbidden else OF_THE_DISTRIBUTION

    return [RandomSizes(largest), WithFeatures(largest)]


def _measure(
    variants: Sequence[SpeculativeDecoder],
    recorder: RecordingClock,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    largest: int,
    progress: Progress | None,
) -> tuple[int, str]:
    """Run rounds over the prompts, requests with and without features in turn. Returns rounds and why they ended."""
    tasks, rng = list(enumerate(prompts)), random.Random(settings.seed)
    deadline = time.monotonic() + 60 * settings.max_minutes
    known = ""
    for round_ in count(1):
        rng.shuffle(tasks)
        for done, (index, prompt) in enumerate(tasks):
            if done % REQUESTS_BETWEEN_LOOKS == 0:
                worst = worst_cell(TimedSteps.of(recorder.timed), largest)
                known = "not all sizes seen yet"
                if worst is not None and worst.spread < float("inf"):
                    known = f"worst spread {100 * worst.spread:.1f}% ({worst.phase} {worst.size})"
            if progress is not None:
                progress(f"round {round_}, {known}", done, len(tasks))
            variant = variants[(round_ + done) % len(variants)]
            variant.run(prompt.text, seed=settings.seed, stream_id=index, **settings.options).finish()
            if time.monotonic() > deadline:
                return round_, f"{settings.max_minutes:g} minutes were over"
        worst = worst_cell(TimedSteps.of(recorder.timed), largest)
        if worst is not None and worst.spread < settings.spread:
            return round_, f"every draft and target pass was known to {100 * settings.spread:g}%"
        if round_ == settings.rounds:
            return round_, f"{round_} rounds were over" if round_ > 1 else "the round was over"
    raise AssertionError("rounds have no end of their own")
