"""A whole bench of many rows: thread counts, warm-up, interleaved runs at each batch size, figures."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.installation.machine import describe_machine
from bpkit.judge.wall_clock.bench import BenchSettings, counts_to_try, described, encoded
from bpkit.judge.wall_clock.decoders import LOOP, TRANSFORMERS, EncodedPrompt, plain_loop
from bpkit.judge.wall_clock.rows.decoders import GenerateRows, PolicyRows, RowsDecoder, Text
from bpkit.judge.wall_clock.rows.figures import RowsFigures, RowsMeasurement
from bpkit.judge.wall_clock.threads import (
    ThreadTable,
    best_counts,
    threads_restored,
    try_thread_counts,
    use_threads,
)
from bpkit.progress import NoProgress, Progress
from bpkit.prompts import Prompt

FEWEST_SETS = 3
TRIED_PROMPTS, TRIED_TOKENS = 4, 32
"""Thread counts are tried on a batch of prompts, or on so many if it is smaller, and so many new tokens."""

Threads = dict[int, dict[str, int]]
"""batch size -> decoder -> thread count."""


def run_rows_bench(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    batch_sizes: Sequence[int],
    progress: Progress | None = None,
    *,
    alone: Mapping[str, Text] | None = None,
) -> dict[str, Any]:
    """Measure, and return the report as plain JSON values; `bpkit.judge.wall_clock.rows.report` says what is in it.

    Peers of the settings take no part: they decode one prompt at a time.

    Args:
        alone: each prompt's text by plain decoding alone, where that is known; as `texts_alone` gives it.

    Raises:
        ValueError: a policy cannot run with these models.
    """
    compared = {size: compared_decoders(decoder, settings) for size in batch_sizes}
    machine, tasks = (
        describe_machine(decoder.target.device, decoder.drafter_device),
        encoded(decoder, prompts, settings.seed),
    )
    sets = dealt(tasks, max(batch_sizes))
    threads, tried = choose_rows_threads(decoder, tasks, settings, batch_sizes, progress)
    started = time.time()
    measured = measure_rows(
        compared, sets, repeats=settings.repeats, seed=settings.seed, threads=threads, progress=progress
    )
    figures = RowsFigures(
        measured,
        reference=alone or texts_alone(decoder, tasks, settings, measured, progress),
        policies=list(settings.policies),
        comparable=settings.options["temperature"] == 0,
        seed=settings.seed,
    )
    return {
        "schema_version": 1,
        "machine": {
            **machine,
            "threads": {str(size): of for size, of in threads.items()},
            "threads_tried": {str(size): of for size, of in tried.items()},
        },
        "settings": {
            **described(decoder, settings, tasks, started),
            "batch_sizes": list(batch_sizes),
            "sets": [[task.prompt.id for task in tasks] for tasks in sets],
        },
        "batch_sizes": figures.as_json(),
        "measurements": [
            {
                "contestant": one.decoder,
                "batch_size": one.batch_size,
                "set": one.part,
                "repeat": one.repeat,
                "tokens": one.outcome.tokens,
                "passes": one.outcome.passes,
                "seconds": round(one.outcome.seconds, 6),
            }
            for one in measured
        ],
    }


def compared_decoders(decoder: SpeculativeDecoder, settings: BenchSettings, **more: Any) -> list[RowsDecoder]:
    """Plain decoding by the loop and by transformers, and the policies: fresh ones, that have learned nothing.

    Args:
        more: options that replace those of the settings.
    """
    options, seed = {**settings.options, **more}, settings.seed
    under = settings.under_policies(decoder)
    return [
        PolicyRows(LOOP, plain_loop(decoder), options, seed),
        GenerateRows(TRANSFORMERS, decoder.target, options, seed),
        *(PolicyRows(name, one, options, seed) for name, one in under.items()),
    ]


def dealt(tasks: Sequence[EncodedPrompt], largest: int) -> list[list[EncodedPrompt]]:
    """Prompts in sets, each of which is timed as a whole: of about twice the largest batch, so that rows that end make
    room for others; or smaller ones, down to the largest batch, if there were fewer than three.
    """
    count = max(len(tasks) // (2 * largest), min(FEWEST_SETS, len(tasks) // largest), 1)
    return [list(tasks[first::count]) for first in range(count)]


def measure_rows(
    decoders: Mapping[int, Sequence[RowsDecoder]],
    sets: Sequence[Sequence[EncodedPrompt]],
    *,
    repeats: int,
    seed: int,
    threads: Threads,
    progress: Progress | None = None,
) -> list[RowsMeasurement]:
    """Every decoder on every set at every batch size, one after the other, in an order shuffled each time.

    Args:
        decoders: by batch size.
        seed: of the order.
    """
    ticker, rng, measured = progress or NoProgress(), random.Random(seed), []
    ticker.start("measuring", repeats * len(sets) * sum(map(len, decoders.values())))
    with threads_restored():
        for repeat in range(repeats):
            for part, tasks in enumerate(sets):
                for batch_size, compared in decoders.items():
                    for decoder in rng.sample(list(compared), len(compared)):
                        use_threads(threads[batch_size][decoder.name])
                        outcome = decoder.run(tasks, batch_size)
                        measured.append(RowsMeasurement(decoder.name, batch_size, part, repeat, outcome))
                        ticker.tick()
    return measured


def texts_alone(
    decoder: SpeculativeDecoder,
    tasks: Sequence[EncodedPrompt],
    settings: BenchSettings,
    measured: Sequence[RowsMeasurement] = (),
    progress: Progress | None = None,
) -> dict[str, Text]:
    """Each prompt's text by the plain loop, alone: as it was measured at batch size 1, else decoded for it."""
    found: dict[str, Text] = {}
    for one in measured:
        if (one.decoder, one.batch_size) == (LOOP, 1):
            found = {**one.outcome.texts, **found}
    if not found:
        alone, ticker = PolicyRows(LOOP, plain_loop(decoder), settings.options, settings.seed), progress or NoProgress()
        ticker.start("decoding texts alone", len(tasks))
        for task in tasks:
            found |= alone.run([task], 1).texts
            ticker.tick()
    return found


def choose_rows_threads(
    decoder: SpeculativeDecoder,
    tasks: Sequence[EncodedPrompt],
    settings: BenchSettings,
    batch_sizes: Sequence[int],
    progress: Progress | None,
) -> tuple[Threads, dict[int, ThreadTable]]:
    """Threads of each decoder at each batch size, and what was tried; the first policy stands for all policies.

    Where there is no choice, every decoder runs once all the same: first calls allocate and compile.
    """
    counts = counts_to_try(decoder, settings)
    shorter = min(settings.options["max_new_tokens"], TRIED_TOKENS)
    chosen: Threads = {}
    tables: dict[int, ThreadTable] = {}
    for batch_size in batch_sizes:
        compared = compared_decoders(decoder, settings, max_new_tokens=shorter)
        names = [one.name for one in compared]
        few = tasks[: max(batch_size, TRIED_PROMPTS)]
        if len(counts) == 1:
            measure_rows(
                {batch_size: compared},
                [few],
                repeats=1,
                seed=0,
                threads={batch_size: dict.fromkeys(names, counts[0])},
            )
            chosen[batch_size] = dict.fromkeys(names, counts[0])
            continue
        tried = {one.name: partial(rated_rows, one, batch_size) for one in compared[:3]}
        tables[batch_size] = try_thread_counts(tried, [few], counts, progress)
        best = best_counts(tables[batch_size])
        stand_in = best[next(iter(chain(settings.policies, [LOOP])))]
        chosen[batch_size] = {name: best.get(name, stand_in) for name in names}
    return chosen, tables


def rated_rows(decoder: RowsDecoder, batch_size: int, tasks: Sequence[EncodedPrompt]) -> tuple[int, float]:
    """Tokens and seconds of one run."""
    outcome = decoder.run(tasks, batch_size)
    return outcome.tokens, outcome.seconds
