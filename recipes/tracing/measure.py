"""How fast prompts are traced, against the two ways of doing without traces. Everything runs in one process, prompt by
prompt, the order turned round from prompt to prompt, so that drift of the machine meets all alike.

- **nine generations** (as many as there are block sizes): the live decoder once for each block size. It yields the
  steps of those runs and nothing else.
- **from every position**: the live decoder at every position with every block size, which is what a trace holds. It is
  run at a few positions of each prompt, and scaled.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
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
from bpkit.prompts import Prompt
from bpkit.trace.collect import PARTS, TraceOptions, Tracer, generation_options
from bpkit.trace.collect.job import describe
from bpkit.trace.store.storage import TraceWriter
from bpkit.types import Step

SCHEMA_VERSION = 1
TRACED, GENERATIONS, POSITIONS = "trace", "generations", "positions"
"""The trace, a generation for each block size, and a run from every position with each block size."""
WRITING = "writing"

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class PromptTimes:
    """One prompt.

    Attributes:
        tokens: output tokens. positions: where a draft may begin.
        seconds: wall clock by way of tracing; that of `positions` is scaled from a sample.
        parts: seconds of the trace by part.
        sampled: positions that were run.
    """

    prompt: str
    tokens: int
    positions: int
    seconds: dict[str, float]
    parts: dict[str, float]
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
        sampled_positions: of each prompt, for the brute force from every position.
        seed: of the positions.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        options: TraceOptions,
        writer: TraceWriter,
        *,
        sampled_positions: int,
        seed: int,
    ) -> None:
        self.decoder, self.tracer, self.writer = decoder, Tracer(decoder, options), writer
        self.options = generation_options(options)
        self.fixed = [decoder.with_policy(f"fixed:{b}") for b in options.block_sizes]
        self.sampled_positions, self.rng = sampled_positions, random.Random(seed)

    def run(self, index: int, prompt: Prompt) -> PromptTimes:
        """Time all ways on one prompt, whose output a run that does not count makes known."""
        result = self.decoder.run(prompt.text, stream_id=index, **self.options).finish()
        length = result.sequences.shape[1] - result.tokens.shape[1]
        task = FinishedPrompt(index, prompt, result.sequences[:, :length], result.tokens)
        ways = {TRACED: self.trace, GENERATIONS: self.generations, POSITIONS: self.positions}
        order = list(ways) if index % 2 == 0 else list(ways)[::-1]
        parts = {name: ways[name](task) for name in order}
        return PromptTimes(
            prompt=prompt.id,
            tokens=task.positions + 1,
            positions=task.positions,
            seconds={name: sum(parts[name].values()) for name in ways},
            parts=parts[TRACED],
            sampled=min(task.positions, self.sampled_positions),
        )

    def trace(self, task: FinishedPrompt) -> dict[str, float]:
        """Trace and write: seconds by part."""
        spent = self.tracer.watch.spent
        spent.clear()
        trace = self.tracer.trace(task.index, task.prompt)
        return {**spent, WRITING: self.timed(lambda: self.writer.write(trace))}

    def generations(self, task: FinishedPrompt) -> dict[str, float]:
        """A generation for each block size."""
        seconds = 0.0
        for decoder in self.fixed:
            run = partial(decoder.run, task.prompt.text, stream_id=task.index, **self.options)
            seconds += self.timed(lambda: run().finish())  # noqa: B023 (it is called at once)
        return {"all": seconds}

    def positions(self, task: FinishedPrompt) -> dict[str, float]:
        """A step from some positions with each block size: of each size the median, scaled to all positions.

        The median, because a single stall of the machine would be scaled with the rest.
        """
        count = min(task.positions, self.sampled_positions)
        seconds: list[list[float]] = []
        for position in sorted(self.rng.sample(range(1, task.positions + 1), count)):
            seconds.append([self.timed(partial(self._one_step, decoder, task, position)) for decoder in self.fixed])
        return {"all": float(np.median(seconds, axis=0).sum()) * task.positions if seconds else 0.0}

    def _one_step(self, decoder: SpeculativeDecoder, task: FinishedPrompt, position: int) -> None:
        """Read what is before the anchor, decide the anchor anew, and take one step."""
        left = max(2, self.options["max_new_tokens"] - position + 1)
        options = {**self.options, "max_new_tokens": left}
        for record in decoder.run(task.before_anchor(position), stream_id=task.index, **options):
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and return the report as plain JSON values; `summarise` says what is in it."""
    ticker, machine, started = progress or NoProgress(), describe_machine(decoder.target.device), time.time()
    ticker.start("measuring", len(prompts))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter(Path(folder) / "trace", describe(decoder, prompts, options))
        bench = TraceBench(decoder, options, writer, sampled_positions=sampled_positions, seed=seed)
        bench.run(0, prompts[0])  # first calls allocate: not counted
        for i, prompt in enumerate(prompts):
            rows.append(bench.run(i, prompt))
            ticker.tick()
        joining = bench.timed(writer.finish)
    settings = {
        **describe_options(decoder, options),
        "sampled_positions": sampled_positions,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "seconds": time.time() - started,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "settings": settings,
        **summarise(rows, joining, seed),
        "measurements": [vars(row) for row in rows],
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


def summarise(rows: Sequence[PromptTimes], joining: float, seed: int) -> dict[str, Any]:
    """The figures.

    Args:
        joining: seconds that making tables of all prompts took; each prompt is charged its share.

    Returns:
        `prompts`, `output_tokens`; `trace` with `prompts_per_minute`, `seconds` and `parts` (share of its time by
        part); `generations` and `positions`, each with `prompts_per_minute`, `ratio` (its seconds over those of the
        trace, sums over prompts) and `median_ratio` over prompts, both with a 95% `interval` (paired bootstrap over
        prompts); `sampled_share` of positions that were run; and `generation_bound`, the ratio of nine generations if
        all but the generation of the output were free.
    """
    columns = {name: np.array([row.seconds[name] for row in rows]) for name in (TRACED, GENERATIONS, POSITIONS)}
    columns[TRACED] = columns[TRACED] + joining / len(rows)
    total = float(columns[TRACED].sum())
    parts = {part: sum(row.parts[part] for row in rows) for part in (*PARTS, WRITING)}
    parts[WRITING] += joining
    picks = resample(len(rows), seed)
    return {
        "prompts": len(rows),
        "output_tokens": sum(row.tokens for row in rows),
        "level": LEVEL,
        "resamples": RESAMPLES,
        TRACED: {
            "prompts_per_minute": _per_minute(columns[TRACED]),
            "seconds": total,
            "parts": {part: spent / total for part, spent in parts.items()},
        },
        GENERATIONS: _against(columns[GENERATIONS], columns[TRACED], picks),
        POSITIONS: _against(columns[POSITIONS], columns[TRACED], picks),
        "sampled_share": sum(row.sampled for row in rows) / max(1, sum(row.positions for row in rows)),
        "generation_bound": float(columns[GENERATIONS].sum()) / parts[PARTS[0]],
    }


def _against(brute: Seconds, traced: Seconds, picks: NDArray[np.int64]) -> dict[str, Any]:
    """One brute force against the trace."""
    ratios = brute / traced
    return {
        "prompts_per_minute": _per_minute(brute),
        "seconds": float(brute.sum()),
        "ratio": float(brute.sum() / traced.sum()),
        "ratio_interval": interval(brute[picks].sum(axis=1) / traced[picks].sum(axis=1)),
        "median_ratio": float(np.median(ratios)),
        "median_ratio_interval": interval(np.median(ratios[picks], axis=1)),
    }


def _per_minute(seconds: Seconds) -> float:
    total = float(seconds.sum())
    return 60 * len(seconds) / total if total > 0 else 0.0
