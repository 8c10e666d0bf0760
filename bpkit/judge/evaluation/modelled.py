"""How far the modelled speed of replay can be trusted: the same prompts and policies, replayed and decoded for real.

Wall clock and replay take turns prompt by prompt in one process, policies in an order shuffled for each prompt. A
policy that learns from time may part from its replay, because the wall clock is not the cost model; the others must
take the same steps, but for near ties.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bpkit.decode.clock import WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.result import Generation
from bpkit.installation.machine import describe_machine
from bpkit.judge.progress import NoProgress, Progress
from bpkit.judge.statistics import LEVEL, RESAMPLES, interval, resampled_sums
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.collect import TraceOptions, generation_options
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayed, Replayer
from bpkit.trace.store.manifest import Manifest

SCHEMA_VERSION = 1


@dataclass
class Pair:
    """One policy, twice.

    Attributes:
        rows: of each prompt: tokens, measured seconds, modelled seconds (decision time as measured in replay).
        same_steps: of each prompt, whether both took the same steps.
    """

    live: SpeculativeDecoder
    replayer: Replayer
    rows: list[tuple[float, float, float]]
    same_steps: list[bool]

    def run(self, prompt: PromptTrace, options: dict[str, Any], cost: CostTable) -> None:
        ids = torch.tensor(prompt.prompt_tokens).long()[None].to(self.live.target.device)
        result = self.live.run(ids, stream_id=prompt.index, **options).finish()
        replayed = self.replayer.run(prompt)
        measured = sum(step.seconds.total for step in result.steps)
        deciding = replayed.begin_seconds + float(np.median(replayed.step_seconds)) * replayed.steps
        self.rows.append((float(prompt.decided_by_steps), measured, replayed.seconds(cost) + deciding))
        self.same_steps.append(_same(result, replayed))


def _same(result: Generation, replayed: Replayed) -> bool:
    return [(int(s.block_size), int(s.num_accepted)) for s in result.steps] == list(
        zip(replayed.block_size.tolist(), replayed.num_accepted.tolist(), strict=True)
    )


def bench_model(
    decoder: SpeculativeDecoder,
    manifest: Manifest,
    prompts: Sequence[PromptTrace],
    policies: Mapping[str, PolicyLike],
    cost: CostTable,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode and replay every prompt under every policy; plain JSON values.

    Args:
        decoder: with the models of the trace.
        policies: by name, as specs.
    """
    ticker = progress or NoProgress()
    pairs = {name: _pair(decoder, manifest, policy, cost) for name, policy in policies.items()}
    options = generation_options(
        TraceOptions(manifest.block_sizes, manifest.max_new_tokens, manifest.sampling, manifest.seed)
    )
    for pair in pairs.values():  # not counted: first calls allocate
        pair.run(prompts[0], options, cost)
        pair.rows.clear()
        pair.same_steps.clear()
    started, order = time.time(), random.Random(seed)
    ticker.start("decoding and replaying", len(prompts) * len(pairs))
    for prompt in prompts:
        for name in order.sample(list(pairs), len(pairs)):
            pairs[name].run(prompt, options, cost)
            ticker.tick()
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": {**describe_machine(decoder.target.device), "threads": torch.get_num_threads()},
        "settings": {
            "target": manifest.target.name,
            "drafter": manifest.drafter.name,
            "options": options,
            "prompts": [prompt.id for prompt in prompts],
            "cost": cost.name,
            "calibrated": None if cost.measured is None else cost.measured.started,
            "seed": seed,
            "resamples": RESAMPLES,
            "level": LEVEL,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": time.time() - started,
        },
        "policies": {name: _entry(np.array(pair.rows), pair.same_steps, seed) for name, pair in pairs.items()},
    }


def _pair(decoder: SpeculativeDecoder, manifest: Manifest, policy: PolicyLike, cost: CostTable) -> Pair:
    live = SpeculativeDecoder(
        decoder.target,
        decoder.drafter,
        policy,
        clock=WallClock(decoder.target.device),
        max_block_size=max(manifest.block_sizes),
    )
    return Pair(live, Replayer(live.spec, policy, cost, seed=manifest.seed), [], [])


def _entry(rows: NDArray[np.float64], same_steps: Sequence[bool], seed: int) -> dict[str, Any]:
    """Figures of one policy; `rows` is [prompts, (tokens, measured, modelled)]."""
    tokens, measured, modelled = rows.sum(axis=0)
    sums = resampled_sums(rows, seed)
    return {
        "measured_tokens_per_second": tokens / measured,
        "modelled_tokens_per_second": tokens / modelled,
        "modelled_over_measured": {
            "value": measured / modelled,
            "interval": interval(sums[:, 1] / sums[:, 2]),
        },
        "prompts_with_the_same_steps": int(sum(same_steps)),
    }
