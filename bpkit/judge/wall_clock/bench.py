"""A whole bench: thread counts, warm-up, interleaved runs, figures."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.files import utc
from bpkit.installation.machine import available_cores, describe_machine
from bpkit.judge.described import describe_policies, describe_spec
from bpkit.judge.statistics import RESAMPLES
from bpkit.judge.wall_clock.decoders import (
    LOOP,
    PEERS,
    TRANSFORMERS,
    EncodedPrompt,
    GenerateDecoder,
    Measurement,
    PolicyDecoder,
    TimedDecoder,
    check_peers,
    plain_loop,
)
from bpkit.judge.wall_clock.figures import BenchFigures
from bpkit.judge.wall_clock.threads import (
    ThreadTable,
    best_counts,
    candidate_counts,
    threads_restored,
    try_thread_counts,
    use_threads,
)
from bpkit.progress import NoProgress, Progress
from bpkit.prompts import Prompt
from bpkit.registry.resolve import PolicyLike

CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 3, 64


@dataclass(frozen=True)
class BenchSettings:
    """What is compared, and how.

    Attributes:
        policies: by name as typed; specs, so that each run starts with a fresh policy.
        against: decoders of other libraries.
        options: of `generate`, with `max_new_tokens` and `temperature`.
        threads: a count for all, or `auto`: each kind of decoder at its own best.
        seed: of orders, bootstrap and sampling noise.
        drafters: of policies that have another one than the decoder's, by name.
    """

    policies: Mapping[str, PolicyLike]
    options: Mapping[str, Any]
    against: tuple[str, ...] = ()
    repeats: int = 1
    threads: int | str = "auto"
    seed: int = 0
    drafters: Mapping[str, str] = field(default_factory=dict)

    def under_policies(self, decoder: SpeculativeDecoder) -> dict[str, SpeculativeDecoder]:
        """The decoder under each policy. The same drafter with other options has the decoder's costs."""
        made = {name: decoder.with_policy(policy, self.drafters.get(name)) for name, policy in self.policies.items()}
        for name in self.drafters:
            if made[name].drafter.name == decoder.drafter.name:
                made[name] = decoder.with_policy(self.policies[name], made[name].drafter, cost=decoder.cost)
        return made

    def decoders(self, decoder: SpeculativeDecoder, **more: Any) -> dict[str, list[TimedDecoder]]:
        """`plain`, `policies` and `against`, fresh ones, so that no policy learns from warm-up runs.

        All share the models of `decoder`. Plain decoding is by the loop and, if greedy, by transformers: sampling there
        has other noise and other texts.

        Args:
            more: options that replace those of the settings.

        Raises:
            ValueError: a policy or peer cannot run with these models.
        """
        options, seed, target = {**self.options, **more}, self.seed, decoder.target
        plain: list[TimedDecoder] = [PolicyDecoder(LOOP, plain_loop(decoder), options, seed)]
        if options["temperature"] == 0:
            plain.append(GenerateDecoder(TRANSFORMERS, target, options, seed))
        check_peers(self.against)
        under = self.under_policies(decoder)
        return {
            "plain": plain,
            "policies": [PolicyDecoder(name, one, options, seed) for name, one in under.items()],
            "against": [PEERS[peer](decoder, options, seed) for peer in self.against],
        }


def run_bench(
    decoder: SpeculativeDecoder, prompts: Sequence[Prompt], settings: BenchSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure, and return the report as plain JSON values; `bpkit.judge.wall_clock.report` says what is in it."""
    compared, warmed_up = settings.decoders(decoder), settings.decoders(decoder)
    seed, tasks = settings.seed, encoded(decoder, prompts, settings.seed)
    machine = describe_machine(decoder.target.device, decoder.drafter_device)
    threads, tried = choose_threads(decoder, tasks, settings, progress)
    # A run of each that is not counted: first calls allocate and compile.
    measure([*chain(*warmed_up.values())], tasks[:1], repeats=1, seed=0, threads=threads)
    started = time.time()
    measured = measure(
        [*chain(*compared.values())], tasks, repeats=settings.repeats, seed=seed, threads=threads, progress=progress
    )
    places = {prompt.id: place for place, prompt in enumerate(prompts)}  # groups in the order that was given
    figures = BenchFigures(
        sorted(measured, key=lambda one: places[one.prompt]),
        **{role: [one.name for one in of_role] for role, of_role in compared.items()},
        comparable=settings.options["temperature"] == 0,
        seed=seed,
    )
    return {
        "schema_version": 1,
        "machine": {**machine, "threads": threads, "threads_tried": tried},
        "settings": described(decoder, settings, tasks, started),
        **figures.as_json(),
        "measurements": [
            {
                "contestant": one.decoder,
                "prompt": one.prompt,
                "repeat": one.repeat,
                "tokens": len(one.outcome.tokens),
                "steps": one.outcome.steps,
                "seconds": round(one.outcome.seconds, 6),
            }
            for one in measured
        ],
    }


def encoded(decoder: SpeculativeDecoder, prompts: Sequence[Prompt], seed: int) -> list[EncodedPrompt]:
    """Prompts ready to run, shuffled: a policy that learns must not meet one domain after the other."""
    device = decoder.target.device
    tasks = [
        EncodedPrompt(prompt, decoder.token_ids(prompt.text).to(device), stream_id=i)
        for i, prompt in enumerate(prompts)
    ]
    random.Random(seed).shuffle(tasks)
    return tasks


def described(
    decoder: SpeculativeDecoder, settings: BenchSettings, tasks: Sequence[EncodedPrompt], started: float
) -> dict[str, Any]:
    """The settings of runs that began at `started`, seconds since 1970, and have ended."""
    return {
        **describe_spec(decoder.spec),
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "rule": decoder.rule,
        "policies": describe_policies(settings.policies),
        "against": list(settings.against),
        "options": dict(settings.options),
        "repeats": settings.repeats,
        "threads": settings.threads,
        "seed": settings.seed,
        "resamples": RESAMPLES,
        "prompts": [task.prompt.id for task in tasks],
        "started": utc(started),
        "seconds": time.time() - started,
    }


def measure(
    decoders: Sequence[TimedDecoder],
    tasks: Sequence[EncodedPrompt],
    *,
    repeats: int,
    seed: int,
    threads: Mapping[str, int],
    progress: Progress | None = None,
) -> list[Measurement]:
    """Every decoder on every prompt, one after the other, in an order shuffled for each prompt.

    Each repeat goes through all prompts, so that drift of the machine meets all of them.

    Args:
        seed: of the order of decoders.
        threads: by decoder; those that are missing run with the current number.
    """
    ticker = progress or NoProgress()
    ticker.start("measuring", repeats * len(tasks) * len(decoders))
    rng, rows = random.Random(seed), []
    with threads_restored() as usual:
        for repeat in range(repeats):
            for task in tasks:
                for decoder in rng.sample(decoders, len(decoders)):
                    use_threads(threads.get(decoder.name, usual))
                    outcome = decoder.run(task.ids, task.stream_id)
                    rows.append(Measurement(decoder.name, task.prompt.id, task.prompt.domain, repeat, outcome))
                    ticker.tick()
    return rows


def choose_threads(
    decoder: SpeculativeDecoder, tasks: Sequence[EncodedPrompt], settings: BenchSettings, progress: Progress | None
) -> tuple[dict[str, int], ThreadTable]:
    """Threads of each decoder, and what was tried. Plain decoding and peers are tried themselves, and the first policy
    stands for all policies.
    """
    shorter = min(settings.options["max_new_tokens"], CALIBRATION_TOKENS)
    compared = settings.decoders(decoder, max_new_tokens=shorter)
    names = [one.name for one in chain(*compared.values())]
    counts = counts_to_try(decoder, settings)
    if len(counts) == 1:
        return dict.fromkeys(names, counts[0]), {}
    first_of_domain: dict[str, EncodedPrompt] = {}
    for task in tasks:
        first_of_domain.setdefault(task.prompt.domain, task)
    few = list(first_of_domain.values())[:CALIBRATION_PROMPTS]
    tried = [*compared["plain"], *compared["policies"][:1], *compared["against"]]
    table = try_thread_counts({one.name: partial(rated, one) for one in tried}, few, counts, progress)
    best = best_counts(table)
    stand_in = best[next(iter(settings.policies), LOOP)]
    return {name: best.get(name, stand_in) for name in names}, table


def counts_to_try(decoder: SpeculativeDecoder, settings: BenchSettings) -> list[int]:
    """Thread counts to choose from; one where there is no choice."""
    if settings.threads != "auto" or decoder.target.device.type != "cpu":
        return [settings.threads if isinstance(settings.threads, int) else torch.get_num_threads()]
    return candidate_counts(available_cores())


def rated(decoder: TimedDecoder, task: EncodedPrompt) -> tuple[int, float]:
    """Tokens and seconds of one run."""
    outcome = decoder.run(task.ids, task.stream_id)
    return len(outcome.tokens), outcome.seconds
