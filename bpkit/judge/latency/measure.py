"""How long a decision takes, in torch and in onnxruntime, and what share that is of a prefill and of a step.

The JSON of a latency bench:

    command, machine   the machine with the distribution and version of onnxruntime
    settings           models, prompts, batch sizes, calls, threads, provider, seconds that it took
    pair               block_size (the fastest fixed one), tokens_per_second by size, prefill_ms and step_ms
    policies           NAME -> asks (whether torch asks the networks at all), why_not (no onnxruntime, or null), methods
                       METHOD (those that the loop asked; `step` is all of a step) -> rows (distinct questions), torch,
                       and, where the policy is exportable, onnxruntime, torch_over_onnxruntime (ratios by batch) and
                       agreement

A backend: `p50_us`, `p99_us`, `min_us` and `calls` by batch; `largest_over_smallest`, what the largest batch takes over
the smallest: the median over neighbouring blocks, and `of_min`, the ratio of the shortest calls; `share_of_prefill` and
`share_of_step` (p50 at the smallest batch over the pair's p50); and `in_loop`: the same of single decisions in the live
loop, where the models' weights fill the caches.
Agreement: `rows`, `agree`, `near_ties` (rows that differ, with a margin below the network's tolerance).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.export.core import Core, Method
from bpkit.files import utc
from bpkit.installation.distribution import onnxruntimes
from bpkit.installation.machine import describe_machine
from bpkit.judge.latency.backends import ONNXRUNTIME, TORCH, Backends, asker, decide, prepared
from bpkit.judge.latency.questions import Question, Recorder, Timed, batches, mixed
from bpkit.judge.latency.timing import Nanoseconds, interleave, percentile, ratio
from bpkit.judge.wall_clock.threads import threads_restored, use_threads
from bpkit.policy import PolicyError
from bpkit.progress import NoProgress, Progress
from bpkit.prompts import Prompt
from bpkit.types import Prefill

THREADS = 1
"""Of torch and of onnxruntime while decisions are timed."""
CANDIDATES = (2, 3, 4, 6, 8, 10, 12, 16)
"""Block sizes among which the fastest is sought, as far as the drafter can draft them."""


@dataclass(frozen=True)
class LatencySettings:
    """How decisions are timed.

    Attributes:
        calls: timed calls of each policy, method, backend and batch size; warm_up: calls before them.
        threads: of torch while the models run.
        block_size: to take steps of; by default the fastest one.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 64)
    calls: int = 1000
    warm_up: int = 100
    max_new_tokens: int = 64
    threads: int = 1
    block_size: int | None = None
    provider: str = "cpu"


def bench_latency(
    decoder: SpeculativeDecoder,
    chosen: Sequence[Backends],
    prompts: Sequence[Prompt],
    settings: LatencySettings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and return the report as plain JSON values."""
    ticker, started = progress or NoProgress(), time.time()
    machine = describe_machine(decoder.target.device)
    with threads_restored():
        use_threads(settings.threads)
        pair = measure_pair(decoder, prompts, settings.max_new_tokens, settings.block_size, ticker)
        bench = _Bench(decoder, prompts, settings, pair, ticker)
        policies = {backends.name: bench.run(backends) for backends in chosen}
    return {
        "schema_version": 1,
        "machine": {**machine, "onnxruntime": onnxruntimes()},
        "settings": {
            "target": decoder.spec.target,
            "drafter": decoder.spec.drafter,
            "dtype": str(decoder.target.dtype).removeprefix("torch."),
            "prompts": [prompt.id for prompt in prompts],
            "max_new_tokens": settings.max_new_tokens,
            "batch_sizes": list(settings.batch_sizes),
            "calls": settings.calls,
            "warm_up": settings.warm_up,
            "provider": settings.provider,
            "threads": {"decisions": THREADS, "models": settings.threads},
            "started": utc(started),
            "seconds": time.time() - started,
        },
        "pair": pair,
        "policies": policies,
    }


@dataclass(frozen=True)
class _Bench:
    """Times policies on one pair, whose figures `measure_pair` gave."""

    decoder: SpeculativeDecoder
    prompts: Sequence[Prompt]
    settings: LatencySettings
    pair: dict[str, Any]
    progress: Progress

    def run(self, backends: Backends) -> dict[str, Any]:
        """The entry of a policy."""
        use_threads(self.settings.threads)
        recorders = {backend: self.record(backends, backend) for backend in backends.policies}
        use_threads(THREADS)
        methods = [method for method in backends.methods if recorders[TORCH].seconds[method]]
        if not methods:
            raise PolicyError(
                f"policy {backends.name!r} was asked nothing on {len(self.prompts)} prompts: outputs end at once; name "
                "other prompts, or more of them or of --max-new-tokens"
            )
        self.progress.start(f"{backends.name}: timing", len(methods))
        timed = {}
        for method in methods:
            timed[method] = self.method(backends, method, recorders)
            self.progress.tick()
        return {"asks": backends.asks, "why_not": backends.why_not, "methods": timed}

    def record(self, backends: Backends, backend: str) -> Recorder:
        """Decode the prompts under a backend of the policy."""
        recorder = Recorder(backends.policies[backend], backends.wants)
        decoder = self.decoder.with_policy(recorder)
        decoder.strict = True  # a decision that was mended is none to be timed
        limit = self.settings.max_new_tokens
        self.progress.start(f"{backends.name}: decoding under {backend}", len(self.prompts))
        for index, prompt in enumerate(self.prompts):
            decoder.run(prompt.text, stream_id=index, max_new_tokens=limit, temperature=0.0).finish()
            self.progress.tick()
        return recorder

    @torch.inference_mode()
    def method(self, backends: Backends, method: Timed, recorders: dict[str, Recorder]) -> dict[str, Any]:
        """The entry of one of its methods, or of whole steps."""
        rows, settings, serving = mixed(recorders[TORCH].of(method)), self.settings, backends.serving(method)
        made = {size: batches(rows, size) for size in settings.batch_sizes}
        asks = {(name, size): asker(policy, method, made[size]) for size in made for name, policy in serving.items()}
        device = self.decoder.target.device
        spent = interleave(asks, calls=settings.calls, warm_up=settings.warm_up, device=device)
        found: dict[str, Any] = {"rows": len(rows)}
        for name in serving:
            of_size = {size: spent[name, size] for size in made}
            found[name] = {**self.figures(of_size), "in_loop": self.in_loop(recorders[name].seconds[method])}
        if ONNXRUNTIME in serving:
            pairs = {str(size): ratio(spent[TORCH, size], spent[ONNXRUNTIME, size]) for size in made}
            found["torch_over_onnxruntime"] = pairs
            if method != "step" and backends.comparable:  # its decisions are compared by method
                questions = [batch for each in made.values() for batch in each]
                found["agreement"] = agreement(backends, method, questions)
        return found

    def figures(self, spent: Mapping[int, Nanoseconds]) -> dict[str, Any]:
        """What calls took, by batch size, and what the largest batch takes over the smallest."""
        smallest, largest = spent[min(spent)], spent[max(spent)]
        percentiles = {
            f"p{which}_us": {str(size): percentile(each, which) for size, each in spent.items()} for which in (50, 99)
        }
        return {
            **percentiles,
            "min_us": {str(size): percentile(each, 0) for size, each in spent.items()},
            "calls": {str(size): each.size for size, each in spent.items()},
            "largest_over_smallest": {**ratio(largest, smallest), "of_min": float(largest.min() / smallest.min())},
            **self.shares(percentile(smallest, 50)),
        }

    def shares(self, p50_us: float) -> dict[str, float]:
        """Of a prefill and of a step."""
        return {f"share_of_{what}": p50_us / 1e3 / self.pair[f"{what}_ms"]["p50"] for what in ("prefill", "step")}

    def in_loop(self, seconds: Sequence[float]) -> dict[str, float] | None:
        """Of single decisions while decoding, those of the first prompts included; None if there were none."""
        if not seconds:
            return None
        p50, p99 = (1e6 * float(np.percentile(seconds, which)) for which in (50, 99))
        return {"p50_us": p50, "p99_us": p99, "calls": len(seconds), **self.shares(p50)}


def agreement(backends: Backends, method: Method, made: Sequence[Question]) -> dict[str, int]:
    """How many rows of the batches both backends decide alike."""
    rows = agree = near_ties = 0
    for batch in made:
        ours = decide(backends.policies[TORCH], method, batch).cpu()
        theirs = decide(backends.policies[ONNXRUNTIME], method, batch).cpu()
        same = ours == theirs
        rows, agree = rows + len(same), agree + int(same.sum())
        if not bool(same.all()):
            near = margins(backends, method, batch) < backends.cores[method].tolerance
            near_ties += int((~same & near).sum())
    return {"rows": rows, "agree": agree, "near_ties": near_ties}


def margins(backends: Backends, method: Method, batch: Question) -> torch.Tensor:
    """How clear each row's decision is: float32 [batch]."""
    core: Core = backends.cores[method]
    policy: Any = backends.policies[ONNXRUNTIME]
    given = policy.inputs[method](batch.source(method), prepared(policy, method, batch))
    module = deepcopy(core.module).cpu()
    outputs = module(*(given[port.name].cpu() for port in core.inputs))
    margin: torch.Tensor = outputs[[port.name for port in core.outputs].index(core.margin)]
    return margin


def measure_pair(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    block_size: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """A prefill and a step of the pair: decode the prompts greedily with `block_size`, or each candidate in turn.

    Returns:
        `block_size`, the one with the most tokens per second; `tokens_per_second` by size; `prefill_ms` and `step_ms`,
        each with `p50`, `p99` and `count`: prefills of all runs, steps of the best size.
    """
    sizes = [block_size] if block_size else [s for s in CANDIDATES if s <= decoder.spec.max_block_size]
    decoders = {size: decoder.with_policy(f"fixed:{size}") for size in sizes}
    progress.start("prefill and steps of the pair", len(prompts) * len(sizes))
    prefills: list[float] = []
    steps: dict[int, list[float]] = {size: [] for size in sizes}
    tokens = dict.fromkeys(sizes, 0)
    decoders[sizes[0]].run(prompts[0].text, max_new_tokens=max_new_tokens, temperature=0.0).finish()  # allocates
    for index, prompt in enumerate(prompts):
        for size in sizes if index % 2 == 0 else sizes[::-1]:
            for record in decoders[size].run(prompt.text, max_new_tokens=max_new_tokens, temperature=0.0):
                if isinstance(record, Prefill):
                    prefills.append(record.seconds.total)
                else:
                    steps[size].append(record.seconds.total)
                    tokens[size] += record.tokens.shape[1]
            progress.tick()
    if not any(steps.values()):
        raise ValueError("no prompt was decoded beyond its first token: name other prompts, or more --max-new-tokens")
    rates = {size: tokens[size] / sum(steps[size]) if steps[size] else 0.0 for size in sizes}
    best = max(sizes, key=rates.__getitem__)
    return {
        "block_size": best,
        "tokens_per_second": {str(size): rate for size, rate in rates.items()},
        "prefill_ms": in_milliseconds(prefills),
        "step_ms": in_milliseconds(steps[best]),
    }


def in_milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and how many."""
    low, high = np.percentile(seconds, [50, 99])
    return {"p50": 1e3 * float(low), "p99": 1e3 * float(high), "count": len(seconds)}
