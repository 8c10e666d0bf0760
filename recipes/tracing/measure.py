"""How fast prompts are traced, one at a time and together, and against the ways of doing without traces.

All is done in turn, batch by batch, the order turned round from batch to batch, so that drift of the machine meets all
alike.

- **trace**: one prompt at a time; **together**: as many as there are in a batch.
- **generations** (as many as there are block sizes): the live decoder once for each block size, one prompt at a time
  and together. It yields the steps of those runs and nothing else.
- **from every position**: the live decoder at every position with every block size, which is what a trace holds. It is
  run at a few positions of each prompt, and scaled.
- **earlier**: the trace by another checkout of bpkit, one prompt at a time, in a process of its own.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.decode.clock import WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.installation.machine import describe_machine
from bpkit.judge.statistics import LEVEL, RESAMPLES, interval, resample
from bpkit.progress import NoProgress, Progress
from bpkit.prompts import BATCH_SIZE, Prompt
from bpkit.trace.collect import PARTS, TraceOptions, Tracer, generation_options
from bpkit.trace.collect.job import describe
from bpkit.trace.store.storage import TraceWriter
from bpkit.types import Step
from recipes.tracing.earlier import Earlier, earlier

SCHEMA_VERSION = 2
TRACED, TOGETHER, GENERATIONS, GENERATIONS_TOGETHER = "trace", "together", "generations", "generations_together"
POSITIONS, EARLIER = "positions", "earlier"
"""The ways, see above."""
AGAINST = {TOGETHER: TRACED, GENERATIONS: TRACED, GENERATIONS_TOGETHER: TOGETHER, POSITIONS: TRACED, EARLIER: TOGETHER}
"""What each way is compared with."""
WRITING = "writing"

Seconds = NDArray[np.float64]
Parts = dict[str, float]


@dataclass(frozen=True)
class BatchTimes:
    """One batch of prompts.

    Attributes:
        prompts: their ids. tokens: output tokens of each. positions: where a draft may begin, of all.
        seconds: wall clock by way; that of `positions` is scaled from a sample.
        parts: seconds by part, of `trace` and `together`.
        sampled: positions that were run.
    """

    prompts: tuple[str, ...]
    tokens: tuple[int, ...]
    positions: int
    seconds: dict[str, float]
    parts: dict[str, Parts]
    sampled: int


@dataclass(frozen=True)
class FinishedPrompt:
    """A prompt with its output: token ids int64 [1, length]; `index` is the stream of its noise."""

    index: int
    prompt: Prompt
    ids: Tensor
    output: Tensor

    @property
    def positions(self) -> int:
        """Where a draft may begin: 1 .. positions."""
        return self.output.shape[1] - 1

    def before_anchor(self, position: int) -> Tensor:
        """What is decided before the anchor of the draft at a position, int64 [1, length]."""
        return torch.cat([self.ids, self.output[:, : position - 1]], dim=1)


class TraceBench:
    """The ways of tracing on one pair of models.

    Args:
        decoder: its policy makes the outputs of traces.
        sampled_positions: of each prompt, for the brute force from every position; 0 leaves it out.
        seed: of the positions.
        batch_size: prompts that are traced together.
        other: the other checkout, if there is one.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        options: TraceOptions,
        writer: TraceWriter,
        *,
        sampled_positions: int,
        seed: int,
        batch_size: int,
        other: Earlier | None = None,
    ) -> None:
        self.decoder, self.writer, self.other = decoder, writer, other
        self.alone, self.together = Tracer(decoder, options), Tracer(decoder, options, batch_size=batch_size)
        self.options = generation_options(options)
        self.fixed = [decoder.with_policy(f"fixed:{b}") for b in options.block_sizes]
        self.sampled_positions, self.rng = sampled_positions, random.Random(seed)

    def run(self, number: int, prompts: Sequence[tuple[int, Prompt]]) -> BatchTimes:
        """Time all ways on one batch of (index, prompt), whose outputs a run that does not count makes known."""
        tasks = [self._finished(index, prompt) for index, prompt in prompts]
        ways: dict[str, Callable[[Sequence[FinishedPrompt]], Parts]] = {
            TRACED: partial(self.trace, self.alone),
            TOGETHER: partial(self.trace, self.together),
            GENERATIONS: self.generations,
            GENERATIONS_TOGETHER: self.generations_together,
        }
        if self.sampled_positions:
            ways[POSITIONS] = self.positions
        if self.other is not None:
            ways[EARLIER] = self.earlier
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        parts = {name: ways[name](tasks) for name in order}
        return BatchTimes(
            prompts=tuple(task.prompt.id for task in tasks),
            tokens=tuple(task.positions + 1 for task in tasks),
            positions=sum(task.positions for task in tasks),
            seconds={name: sum(parts[name].values()) for name in ways},
            parts={name: parts[name] for name in (TRACED, TOGETHER)},
            sampled=sum(min(task.positions, self.sampled_positions) for task in tasks),
        )

    def _finished(self, index: int, prompt: Prompt) -> FinishedPrompt:
        result = self.decoder.run(prompt.text, stream_id=index, **self.options).finish()
        length = result.sequences.shape[1] - result.tokens.shape[1]
        return FinishedPrompt(index, prompt, result.sequences[:, :length], result.tokens)

    def trace(self, tracer: Tracer, tasks: Sequence[FinishedPrompt]) -> Parts:
        """Trace and write: seconds by part."""
        writing = 0.0
        tracer.watch.spent.clear()

        def work() -> None:
            nonlocal writing
            for trace in tracer.traces([(task.index, task.prompt) for task in tasks]):
                writing += self.timed(partial(self.writer.write, trace))

        seconds = self.timed(work)
        parts = {**tracer.watch.spent, WRITING: writing}
        return {**parts, PARTS[-1]: parts[PARTS[-1]] + seconds - sum(parts.values())}

    def generations(self, tasks: Sequence[FinishedPrompt]) -> Parts:
        """A generation for each block size."""
        seconds = 0.0
        for task in tasks:
            for decoder in self.fixed:
                run = partial(decoder.run, task.prompt.text, stream_id=task.index, **self.options)
                seconds += self.timed(lambda: run().finish())  # noqa: B023 (it is called at once)
        return {"all": seconds}

    def generations_together(self, tasks: Sequence[FinishedPrompt]) -> Parts:
        """The same, of all prompts together."""
        asked = [{"prompt": task.prompt.text, "stream_id": task.index} for task in tasks]
        size = self.together.batch_size
        runs = [partial(decoder.generate, asked, batch_size=size, **self.options) for decoder in self.fixed]
        return {"all": sum(self.timed(run) for run in runs)}

    def positions(self, tasks: Sequence[FinishedPrompt]) -> Parts:
        """A step from some positions with each block size: of each size the median, scaled to all positions.

        The median, because a single stall of the machine would be scaled with the rest.
        """
        scaled = 0.0
        for task in tasks:
            count = min(task.positions, self.sampled_positions)
            seconds: list[list[float]] = []
            for position in sorted(self.rng.sample(range(1, task.positions + 1), count)):
                seconds.append([self.timed(partial(self._one_step, decoder, task, position)) for decoder in self.fixed])
            scaled += float(np.median(seconds, axis=0).sum()) * task.positions if seconds else 0.0
        return {"all": scaled}

    def earlier(self, tasks: Sequence[FinishedPrompt]) -> Parts:
        """The other checkout's time."""
        assert self.other is not None
        return {"all": sum(self.other.trace(task.index) for task in tasks)}

    def _one_step(self, decoder: SpeculativeDecoder, task: FinishedPrompt, position: int) -> None:
        """Read what is before the anchor, decide the anchor anew, and take one step."""
        left = max(2, self.options["max_new_tokens"] - position + 1)
        options = {**self.options, "max_new_tokens": left}
        with decoder.run(task.before_anchor(position), stream_id=task.index, **options) as run:
            for record in run:
                if isinstance(record, Step):
                    return

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds that it takes."""
        now = WallClock(self.decoder.target.device, wait=True).now
        started = now()
        work()
        return now() - started


def bench_tracing(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    options: TraceOptions,
    *,
    sampled_positions: int = 8,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    against: tuple[Path, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and return the report as plain JSON values; `summarise` says what is in it.

    Args:
        against: another checkout, and the models for it as `SpeculativeDecoder.from_pretrained` takes them.
    """
    ticker, machine, started = progress or NoProgress(), describe_machine(decoder.target.device), time.time()
    settings = {
        **describe_options(decoder, options),
        "sampled_positions": sampled_positions,
        "seed": seed,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
    }
    batches = [list(enumerate(prompts))[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    ticker.start("measuring", len(batches))
    rows = []
    with ExitStack() as stack:
        folder, other = stack.enter_context(tempfile.TemporaryDirectory()), None
        if against is not None:
            other = stack.enter_context(earlier(against[0], {**asked(options, prompts), **against[1]}))
        writer = TraceWriter(Path(folder) / "trace", describe(decoder, prompts, options))
        bench = TraceBench(
            decoder,
            options,
            writer,
            sampled_positions=sampled_positions,
            seed=seed,
            batch_size=batch_size,
            other=other,
        )
        bench.run(0, batches[0][:2])  # first calls allocate: not counted
        for number, batch in enumerate(batches):
            rows.append(bench.run(number, batch))
            ticker.tick()
        joining = bench.timed(writer.finish)
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "settings": {**settings, "seconds": time.time() - started},
        **summarise(rows, joining, seed),
        "measurements": [vars(row) for row in rows],
    }


def asked(options: TraceOptions, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What another checkout is to trace, and on how many threads."""
    return {
        "threads": torch.get_num_threads(),
        "prompts": [[prompt.id, prompt.domain, prompt.text] for prompt in prompts],
        "block_sizes": list(options.block_sizes),
        "max_new_tokens": options.max_new_tokens,
        "sampling": dict(options.sampling),
        "seed": options.seed,
    }


def describe_options(decoder: SpeculativeDecoder, options: TraceOptions) -> dict[str, Any]:
    """What was traced with what, as plain JSON values."""
    return {
        "target": decoder.spec.target,
        "drafter": decoder.spec.drafter,
        "drafter_kind": decoder.spec.drafter_kind,
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "block_sizes": list(options.block_sizes),
        "sampling": dict(options.sampling),
        "max_new_tokens": options.max_new_tokens,
        "noise_seed": options.seed,
    }


def summarise(rows: Sequence[BatchTimes], joining: float, seed: int) -> dict[str, Any]:
    """The figures.

    Args:
        joining: seconds that making tables of all prompts took; each trace is charged its share.

    Returns:
        `prompts`, `output_tokens`; by way `prompts_per_minute` and `seconds`; of `trace` and `together` also `parts`
        (share of the time by part); of all but `trace` also `against` (the trace that it is compared with), `ratio`
        (its seconds over that one's, sums over batches) and `median_ratio` over batches, both with a 95% `interval`
        (paired bootstrap over batches). `batch_ratio`: how many times as fast prompts are traced together as alone,
        with its interval, and `trace_ratio`: as by the other checkout, likewise. `sampled_share` of positions that were
        run; and `generation_bound`, the ratio of all generations if all but the generation of the output were free.
    """
    ways = list(rows[0].seconds)
    columns = {name: np.array([row.seconds[name] for row in rows]) for name in ways}
    counts = np.array([len(row.prompts) for row in rows])
    charged = joining * counts / counts.sum()
    columns[TRACED], columns[TOGETHER] = columns[TRACED] + charged, columns[TOGETHER] + charged
    picks = resample(len(rows), seed)
    found: dict[str, Any] = {
        "prompts": int(counts.sum()),
        "output_tokens": sum(sum(row.tokens) for row in rows),
        "level": LEVEL,
        "resamples": RESAMPLES,
    }
    for name in ways:
        seconds = float(columns[name].sum())
        found[name] = {"prompts_per_minute": 60 * float(counts.sum()) / seconds if seconds else 0.0, "seconds": seconds}
        if name in AGAINST:
            found[name] |= {"against": AGAINST[name], **_ratios(columns[name], columns[AGAINST[name]], picks)}
    for name in (TRACED, TOGETHER):
        parts = {part: sum(row.parts[name].get(part, 0.0) for row in rows) for part in (*PARTS, WRITING)}
        parts[WRITING] += joining
        found[name]["parts"] = {part: spent / float(columns[name].sum()) for part, spent in parts.items()}
    gained = _ratios(columns[TRACED], columns[TOGETHER], picks)
    found |= {"batch_ratio": gained["ratio"], "batch_ratio_interval": gained["ratio_interval"]}
    if EARLIER in ways:
        found |= {f"trace_{name}": found[EARLIER][name] for name in ("ratio", "ratio_interval")}
    generating = sum(row.parts[TRACED][PARTS[0]] for row in rows)
    return {
        **found,
        "sampled_share": sum(row.sampled for row in rows) / max(1, sum(row.positions for row in rows)),
        "generation_bound": float(columns[GENERATIONS].sum()) / generating,
    }


def _ratios(slower: Seconds, faster: Seconds, picks: NDArray[np.int64]) -> dict[str, Any]:
    """Seconds of one way over those of another."""
    ratios = slower / faster
    return {
        "ratio": float(slower.sum() / faster.sum()),
        "ratio_interval": interval(slower[picks].sum(axis=1) / faster[picks].sum(axis=1)),
        "median_ratio": float(np.median(ratios)),
        "median_ratio_interval": interval(np.median(ratios[picks], axis=1)),
    }
