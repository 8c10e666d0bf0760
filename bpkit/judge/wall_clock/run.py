"""A whole bench: thread counts, warm-up, interleaved runs, figures."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.installation.machine import available_cores, describe_machine
from bpkit.judge.wall_clock.contestants import (
    LOOP,
    Contestant,
    peer_contestants,
    plain_contestants,
    policy_contestants,
)
from bpkit.judge.wall_clock.measure import Measurement, Progress, Task, measure
from bpkit.judge.wall_clock.statistics import RESAMPLES, Roles, summarise
from bpkit.judge.wall_clock.threads import ThreadTable, best_counts, candidate_counts, try_thread_counts
from bpkit.prompts import Prompt
from bpkit.registry.resolve import PolicyLike

CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 3, 64
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BenchSettings:
    """What is compared, and how.

    Attributes:
        policies: by name as typed; specs, so that each run starts with a fresh policy.
        against: decoders of other libraries.
        options: of `generate`, with `max_new_tokens` and `temperature`.
        threads: a count for all, or `auto`: each kind of contestant at its own best.
        seed: of orders, bootstrap and sampling noise.
    """

    policies: Mapping[str, PolicyLike]
    options: Mapping[str, Any]
    against: tuple[str, ...] = ()
    repeats: int = 1
    threads: int | str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Lineup:
    """The contestants by role; fresh ones each time, so that no policy learns from warm-up runs."""

    plain: list[Contestant]
    policies: list[Contestant]
    peers: list[Contestant]

    @property
    def all(self) -> list[Contestant]:
        return [*self.plain, *self.policies, *self.peers]

    @property
    def roles(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        plain, policies, peers = (tuple(c.name for c in part) for part in (self.plain, self.policies, self.peers))
        return plain, policies, peers


def lineup(decoder: SpeculativeDecoder, settings: BenchSettings) -> Lineup:
    """Make the contestants. Raises ValueError for a policy or peer that cannot run with these models."""
    options, seed = dict(settings.options), settings.seed
    return Lineup(
        plain_contestants(decoder, options, seed),
        policy_contestants(decoder, dict(settings.policies), options, seed),
        peer_contestants(decoder, settings.against, options, seed),
    )


def run_bench(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and return the report as plain JSON values; `bpkit.judge.wall_clock.report` says what is in it."""
    contestants = lineup(decoder, settings)
    tasks = make_tasks(decoder, prompts, settings.seed)
    device = decoder.target.device
    machine = describe_machine(device)
    threads, tried = choose_threads(decoder, tasks, settings, progress)
    warm_up(lineup(decoder, settings), tasks, threads)
    started = time.time()
    rows = measure(
        contestants.all, tasks, repeats=settings.repeats, seed=settings.seed, threads=threads, progress=progress
    )
    places = {prompt.id: place for place, prompt in enumerate(prompts)}  # groups in the order that was given
    plain, policies, peers = contestants.roles
    greedy = settings.options["temperature"] == 0
    roles = Roles(plain, policies, peers, comparable=greedy)
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": {**machine, "threads": threads, "threads_tried": tried},
        "settings": {
            **describe_settings(decoder, settings),
            "prompts": [task.prompt.id for task in tasks],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": time.time() - started,
        },
        **summarise(sorted(rows, key=lambda row: places[row.prompt]), roles, settings.seed),
        "measurements": [describe_row(row) for row in rows],
    }


def make_tasks(decoder: SpeculativeDecoder, prompts: Sequence[Prompt], seed: int) -> list[Task]:
    """Tokenize, and shuffle: a policy that learns must not meet one domain after the other."""
    assert decoder.tokenizer is not None
    tasks = []
    for i, prompt in enumerate(prompts):
        ids = decoder._ids(prompt.text)
        tasks.append(Task(prompt, ids.to(decoder.target.device), stream_id=i))
    random.Random(seed).shuffle(tasks)
    return tasks


def choose_threads(
    decoder: SpeculativeDecoder, tasks: Sequence[Task], settings: BenchSettings, progress: Progress | None
) -> tuple[dict[str, int], ThreadTable]:
    """Threads of each contestant, and what was tried. Plain contestants and peers are tried themselves, and the
    first policy stands for all policies.
    """
    contestants = lineup(decoder, settings)
    names = [c.name for c in contestants.all]
    if settings.threads != "auto" or decoder.target.device.type != "cpu":
        count = settings.threads if isinstance(settings.threads, int) else torch.get_num_threads()
        return dict.fromkeys(names, count), {}
    counts = candidate_counts(available_cores())
    if len(counts) == 1:
        return dict.fromkeys(names, counts[0]), {}
    shorter = {**settings.options, "max_new_tokens": min(settings.options["max_new_tokens"], CALIBRATION_TOKENS)}
    tried = lineup(decoder, BenchSettings(settings.policies, shorter, settings.against, seed=settings.seed))
    chosen = _one_of_each_domain(tasks)
    table = try_thread_counts([*tried.plain, *tried.policies[:1], *tried.peers], chosen, counts, progress)
    best = best_counts(table)
    stand_in = best[next(iter(settings.policies), LOOP)]
    return {name: best.get(name, stand_in) for name in names}, table


def _one_of_each_domain(tasks: Sequence[Task]) -> list[Task]:
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.prompt.domain, task)
    return list(first.values())[:CALIBRATION_PROMPTS]


def warm_up(contestants: Lineup, tasks: Sequence[Task], threads: Mapping[str, int]) -> None:
    """One run of each contestant that is not counted: first calls allocate and compile."""
    measure(contestants.all, tasks[:1], repeats=1, seed=0, threads=threads)


def describe_settings(decoder: SpeculativeDecoder, settings: BenchSettings) -> dict[str, Any]:
    """The settings as plain JSON values."""
    spec = decoder.spec
    return {
        "target": spec.target,
        "drafter": spec.drafter,
        "drafter_kind": spec.drafter_kind,
        "trained_block_size": spec.trained_block_size,
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "rule": decoder.rule,
        "policies": {
            name: policy if isinstance(policy, str) else dict(policy)
            for name, policy in settings.policies.items()
            if isinstance(policy, (str, Mapping))
        },
        "against": list(settings.against),
        "options": dict(settings.options),
        "repeats": settings.repeats,
        "threads": settings.threads,
        "seed": settings.seed,
        "resamples": RESAMPLES,
    }


def describe_row(row: Measurement) -> dict[str, Any]:
    """A row as plain JSON values, with the number of tokens instead of the tokens."""
    return {
        "contestant": row.contestant,
        "prompt": row.prompt,
        "repeat": row.repeat,
        "tokens": len(row.outcome.tokens),
        "steps": row.outcome.steps,
        "seconds": round(row.outcome.seconds, 6),
    }
