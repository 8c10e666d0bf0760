"""How far the modelled speed of replay can be trusted: the same prompts and policies, replayed and decoded for real.

Wall clock and replay take turns prompt by prompt in one process, policies in an order shuffled for each prompt. A
policy that learns from time may part from its replay, because the wall clock is not the cost model; the others must
take the same steps, but for near ties.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bpkit.decode.clock import WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.files import utc
from bpkit.installation.machine import describe_machine
from bpkit.judge.statistics import LEVEL, RESAMPLES, interval, resampled_sums
from bpkit.progress import NoProgress, Progress
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.collect import TraceOptions, generation_options
from bpkit.trace.cost import CostTable, NamedCost
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.trace.store.manifest import Manifest

SCHEMA_VERSION = 1


class _LiveAndReplayed:
    """One policy, twice.

    Attributes:
        rows: of each prompt: tokens, measured seconds, modelled seconds (decision time as measured in replay).
        same_steps: of each prompt, whether both took the same steps.
    """

    def __init__(self, decoder: SpeculativeDecoder, manifest: Manifest, policy: PolicyLike, cost: NamedCost) -> None:
        clock, largest = WallClock(decoder.target.device), max(manifest.block_sizes)
        self.live = SpeculativeDecoder(
            decoder.target, decoder.drafter, policy, clock=clock, max_block_size=largest, capture=decoder.capture
        )
        self.replayer, self.cost = Replayer(self.live.spec, policy, cost, seed=manifest.seed), cost
        self.rows: list[tuple[float, float, float]] = []
        self.same_steps: list[bool] = []

    def run(self, prompt: PromptTrace, options: dict[str, Any]) -> None:
        ids = torch.tensor(prompt.prompt_tokens).long()[None].to(self.live.target.device)
        result = self.live.run(ids, stream_id=prompt.index, **options).finish()
        replayed = self.replayer.run(prompt)
        measured = sum(step.seconds.total for step in result.steps)
        deciding = replayed.begin_seconds + float(np.median(replayed.step_seconds)) * replayed.steps
        self.rows.append((float(prompt.decided_by_steps), measured, replayed.seconds(self.cost) + deciding))
        live = [(int(s.block_size), int(s.num_accepted)) for s in result.steps]
        modelled = zip(replayed.block_size.tolist(), replayed.num_accepted.tolist(), strict=True)
        self.same_steps.append(live == list(modelled))

    def figures(self, seed: int) -> dict[str, Any]:
        rows = np.array(self.rows)
        tokens, measured, modelled = rows.sum(axis=0)
        sums = resampled_sums(rows, seed)
        return {
            "measured_tokens_per_second": tokens / measured,
            "modelled_tokens_per_second": tokens / modelled,
            "modelled_over_measured": {"value": measured / modelled, "interval": interval(sums[:, 1] / sums[:, 2])},
            "prompts_with_the_same_steps": int(sum(self.same_steps)),
        }


def bench_model(
    decoder: SpeculativeDecoder,
    manifest: Manifest,
    prompts: Sequence[PromptTrace],
    policies: Mapping[str, PolicyLike],
    cost: NamedCost,
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
    pairs = {name: _LiveAndReplayed(decoder, manifest, policy, cost) for name, policy in policies.items()}
    options = generation_options(
        TraceOptions(manifest.block_sizes, manifest.max_new_tokens, manifest.sampling, manifest.seed)
    )
    for pair in pairs.values():  # not counted: first calls allocate
        pair.run(prompts[0], options)
        pair.rows.clear()
        pair.same_steps.clear()
    started, order = time.time(), random.Random(seed)
    ticker.start("decoding and replaying", len(prompts) * len(pairs))
    for prompt in prompts:
        for name in order.sample(list(pairs), len(pairs)):
            pairs[name].run(prompt, options)
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
            "calibrated": cost.measured.started if isinstance(cost, CostTable) and cost.measured else None,
            "seed": seed,
            "resamples": RESAMPLES,
            "level": LEVEL,
            "started": utc(started),
            "seconds": time.time() - started,
        },
        "policies": {name: pair.figures(seed) for name, pair in pairs.items()},
    }
