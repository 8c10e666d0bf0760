"""Measures what steps cost on this device: inside the live loop, with block sizes and verify widths interleaved."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, cycle, islice
from typing import Any

import numpy as np
import torch

from bpkit.decode.clock import Clock, WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import Drafter
from bpkit.decode.result import Generation
from bpkit.decode.sources import sources_of
from bpkit.files import utc
from bpkit.installation.machine import describe_machine
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.trace.cost.estimate import estimate, worst_cell
from bpkit.trace.cost.figures import CostError
from bpkit.trace.cost.held_out import held_out_error
from bpkit.trace.cost.random_sizes import RandomSizes
from bpkit.trace.cost.table import Cell, CostTable, HeldOut, Measured
from bpkit.trace.cost.timed import TimedPrompts, TimedSteps
from bpkit.types import OF_THE_DISTRIBUTION, DecoderSpec, DraftWork, Feature, Seconds, Work

RUNS_BETWEEN_LOOKS = 10
FOLDS = 4
"""Parts of the runs at each batch size that are held out in turn, to tell the error of tables of several rows."""
WARMING_UP = 16
"""New tokens of the first run of several rows, which is not counted."""

Progress = Callable[[str, int, int], None]
"""Is told what is going on, runs done in this round, and runs of a round."""
Timed = list[tuple[Work, Seconds]]
Batch = list[tuple[int, Prompt]]
"""Prompts that run at once, each with its stream."""


class RecordingClock:
    """The decoder's clock, with a memory of the work and the seconds of every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.timed: Timed = []

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
        max_minutes: at most; the run in hand is finished if it is of one row.
        rounds: over all prompts at most; None for no limit. Smaller batch sizes than the largest have as many runs as
            the largest, over fewer prompts.
        batch_sizes: numbers of rows to measure. One row is always among them.
        options: of `SpeculativeDecoder.generate`, without the seed.
        seed: of sampling noise and of the order of prompts.
        command: to keep in the table.
    """

    max_block_size: int | None = None
    spread: float = 0.02
    max_minutes: float = 10.0
    rounds: int | None = None
    batch_sizes: tuple[int, ...] = (1,)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    command: str | None = None

    @property
    def sizes(self) -> list[int]:
        """Batch sizes in order, with 1."""
        return sorted({1, *self.batch_sizes})


@dataclass
class TimedRuns:
    """What was measured.

    Attributes:
        runs: batch size and timed steps of each.
        prompts: passes that read them.
        rounds: that were begun. ended: why measuring ended.
    """

    runs: list[tuple[int, Timed]] = field(default_factory=list)
    prompts: list[TimedPrompts] = field(default_factory=list)
    rounds: int = 0
    ended: str = ""

    @property
    def timed(self) -> Timed:
        """All steps."""
        return list(chain.from_iterable(timed for _, timed in self.runs))

    def folds(self) -> Iterator[tuple[Timed, Timed]]:
        """Steps of the runs of a fold, and all others."""
        seen = Counter[int]()
        fold_of = []
        for size, _ in self.runs:
            fold_of.append(seen[size] % FOLDS)
            seen[size] += 1
        for fold in range(FOLDS):
            parts: tuple[Timed, Timed] = [], []
            for (_, timed), own in zip(self.runs, fold_of, strict=True):
                parts[own != fold].extend(timed)
            yield parts


def calibrate(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    progress: Progress | None = None,
) -> CostTable:
    """Measure until every draft and every target pass is known well enough, or time is up.

    The decoder's own policy does not run; its clock times the steps. Several sources are measured one after the other,
    each for its share of the time; target passes, up to its widest, and the rest of a step are those of the first.

    Raises:
        ValueError: a block size that this drafter cannot draft; CostError if too little could be measured.
    """
    sources = sources_of(decoder.drafter)
    if len(sources) > 1:
        first, *others = [
            calibrate(decoder.with_policy("fixed", source), prompts, _share(settings, source, len(sources)), progress)
            for source in sources
        ]
        return first.with_sources(others)
    spec, target = decoder.spec, decoder.target
    largest = _largest(spec, settings.max_block_size)
    recorder = RecordingClock(decoder.clock.waiting() if isinstance(decoder.clock, WallClock) else decoder.clock)
    variants = [decoder.with_policy(policy) for policy in _policies(decoder, largest, settings)]
    machine = describe_machine(target.device, decoder.drafter_device)
    for variant in variants:
        variant.clock, variant.strict = recorder, True
        _warm_up(variant, prompts, settings)
    started = time.time()
    runs = _measure(variants, recorder, prompts, settings, largest, progress)
    steps = TimedSteps.of(runs.timed)
    cost = estimate(steps, largest, spec.work, settings.sizes, runs.prompts)
    worst = _worst(steps, largest, settings.sizes)
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
        rounds=runs.rounds,
        ended=runs.ended,
        worst_spread=round(worst[1].spread, 5) if math.isfinite(worst[1].spread) else None,
        modelled_over_measured=round(float(modelled.sum() / seconds.sum()), 4),
        drift=round(float(late / early) - 1, 4),
        held_out=_held_out(runs, largest, spec.work, settings.sizes),
    )
    said = f"{spec.target} with {spec.drafter} on {machine['gpu'] or machine['cpu']}, {dtype}, {threads} thread(s)"
    return cost.model_copy(update={"description": said, "measured": measured})


def _share(settings: CalibrationSettings, source: Drafter, sources: int) -> CalibrationSettings:
    """The settings for one of several sources, which may draft less than another."""
    asked = settings.max_block_size
    most = None if asked is None else min(asked, source.max_block_size)
    return replace(settings, max_block_size=most, max_minutes=settings.max_minutes / sources)


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


def _warm_up(variant: SpeculativeDecoder, prompts: Sequence[Prompt], settings: CalibrationSettings) -> None:
    """First calls allocate and choose kernels."""
    run_batch(variant, [(0, prompts[0])], settings)
    if (most := settings.sizes[-1]) > 1:
        short = replace(settings, options={**settings.options, "max_new_tokens": WARMING_UP})
        run_batch(variant, list(islice(cycle(enumerate(prompts)), most)), short)


def _measure(
    variants: Sequence[SpeculativeDecoder],
    recorder: RecordingClock,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    largest: int,
    progress: Progress | None,
) -> TimedRuns:
    """Run rounds over the prompts, with and without features in turn."""
    tasks, rng, runs = list(enumerate(prompts)), random.Random(settings.seed), TimedRuns()
    deadline = time.monotonic() + 60 * settings.max_minutes
    known = ""
    for round_ in count(1):
        runs.rounds = round_
        batches = _round(tasks, settings.sizes, rng)
        for done, batch in enumerate(batches):
            if done % RUNS_BETWEEN_LOOKS == 0:
                known = _said(_worst(TimedSteps.of(runs.timed), largest, settings.sizes))
            if progress is not None:
                progress(f"round {round_}, {known}", done, len(batches))
            recorder.timed = []
            ended = run_batch(variants[(round_ + done) % len(variants)], batch, settings, deadline)
            runs.prompts += TimedPrompts.of(ended)
            runs.runs.append((len(batch), recorder.timed))
            if time.monotonic() > deadline:
                runs.ended = f"{settings.max_minutes:g} minutes were over"
                return runs
        worst = _worst(TimedSteps.of(runs.timed), largest, settings.sizes)
        if worst is not None and worst[1].spread < settings.spread:
            runs.ended = f"every draft and target pass was known to {100 * settings.spread:g}%"
            return runs
        if round_ == settings.rounds:
            runs.ended = f"{round_} rounds were over" if round_ > 1 else "the round was over"
            return runs
    raise AssertionError("rounds have no end of their own")


def _round(tasks: list[tuple[int, Prompt]], sizes: Sequence[int], rng: random.Random) -> list[Batch]:
    """As many batches of each size as it takes to run all prompts at the largest, in random order."""
    rng.shuffle(tasks)
    batches = []
    for size in sizes:
        endless = cycle(tasks)
        batches += [list(islice(endless, size)) for _ in range(-(-len(tasks) // sizes[-1]))]
    if len(sizes) > 1:
        rng.shuffle(batches)
    return batches


def run_batch(
    variant: SpeculativeDecoder, batch: Batch, settings: CalibrationSettings, deadline: float = math.inf
) -> list[Generation]:
    """Decode prompts at once: one to its end, several to the end of the last or the first step after the deadline.

    Returns those that ended.
    """
    if len(batch) == 1:
        ((stream, prompt),) = batch
        return [variant.run(prompt.text, seed=settings.seed, stream_id=stream, **settings.options).finish()]
    prompts = [{"prompt": prompt.text, "stream_id": stream} for stream, prompt in batch]
    with variant.run_many(prompts, batch_size=len(batch), seed=settings.seed, **settings.options) as runs:
        for _ in runs:
            if time.monotonic() > deadline:
                break
        ended = [generation for _, generation in runs.ended()]
    for generation in ended:
        if generation.error is not None:
            raise generation.error
    return ended


def _worst(steps: TimedSteps, largest: int, sizes: Sequence[int]) -> tuple[int, Cell] | None:
    """The figure that is known least, with its number of rows. None while something was not measured at all."""
    found = [(rows, worst_cell(steps.of_rows(rows), largest)) for rows in sizes]
    known = [(rows, cell) for rows, cell in found if cell is not None]
    return max(known, key=lambda pair: pair[1].spread) if len(known) == len(found) else None


def _said(worst: tuple[int, Cell] | None) -> str:
    if worst is None or math.isinf(worst[1].spread):
        return "not all sizes seen yet"
    rows, cell = worst
    of_rows = f", {rows} rows" if rows > 1 else ""
    return f"worst spread {100 * cell.spread:.1f}% ({cell.phase} {cell.size}{of_rows})"


def _held_out(runs: TimedRuns, largest: int, work: DraftWork, sizes: Sequence[int]) -> HeldOut | None:
    """The error of tables of several rows. None if there are none, or too little was measured to hold some out."""
    held_out: Timed = []
    modelled = []
    for part, others in runs.folds() if len(sizes) > 1 else ():
        try:
            cost = estimate(TimedSteps.of(others), largest, work, sizes)
            modelled.append(TimedSteps.of(part).modelled(cost))
        except CostError:
            continue
        held_out += part
    return held_out_error(TimedSteps.of(held_out), np.concatenate(modelled), sizes) if modelled else None
