"""Section `loop`: where the time of a step goes, and how often the host waits in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from bpkit.decode.clock import WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.testing.simulated_device import SimulatedDevice
from bpkit.types import Seconds, Step
from recipes.gpu.clock import Deadline
from recipes.gpu.models import captured, random_pair, shipped_pair
from recipes.gpu.sizes import Sizes
from recipes.gpu.texts import SAMPLING, some_prompts

Row = dict[str, Any]


def loop(sizes: Sizes, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """Reads of the shipped pair's steps, and the time of steps of both pairs.

    `waits` are what torch says of this device: points at which the host waits, copies from it to the host included;
    `reads` are counted on a simulated device. `loop_share` is what is neither a model's pass nor a policy's, of the
    parts of a step, for which the clock waits for the device; `step_ms` is measured without.
    """
    try:
        yield from _reads(sizes, deadline)
    except Exception as error:  # beside a real device, where it was never tried; the rest is worth having
        yield {"what": "reads", "error": f"{type(error).__name__}: {error}"}
    for pair in ("random", "shipped"):
        plain = shipped_pair(device) if pair == "shipped" else _random(sizes, device)
        decoders = {"off": plain, "on": captured(plain)}
        policies, count = (sizes.timed, sizes.new_tokens) if pair == "shipped" else (sizes.timed[:1], 16)
        for name, sampling in SAMPLING.items():
            for batch in sizes.batch_sizes:
                ids = _ids(plain, batch, sizes.context)
                for policy in policies:
                    options = {**sampling, "batch_size": batch, "max_new_tokens": min(count, sizes.new_tokens)}
                    for mode, decoder in decoders.items():
                        if not deadline:
                            return
                        row = {"what": "step", "pair": pair, "sampling": name, "batch": batch, "policy": policy}
                        yield row | {"capture": mode} | _timed(decoder, policy, ids, device, options)


def _random(sizes: Sizes, device: torch.device) -> SpeculativeDecoder:
    drafter = random_pair(sizes, device)
    return SpeculativeDecoder(drafter.target, drafter, "fixed:1", capture="off")


def _ids(decoder: SpeculativeDecoder, batch: int, context: int) -> list[torch.Tensor]:
    """Prompts of random tokens."""
    count, generator = decoder.spec.vocab_size, torch.Generator().manual_seed(0)
    return [torch.randint(3, count, (1, max(1, context - row)), generator=generator) for row in range(batch)]


def _timed(
    base: SpeculativeDecoder, policy: str, ids: list[torch.Tensor], device: torch.device, options: dict[str, Any]
) -> Row:
    """Milliseconds of a step and of its parts, and its waits."""
    decoder = base.with_policy(policy)
    _steps(decoder, ids, options)  # captures
    with Waits(device) as waits:
        whole = _steps(decoder, ids, options, waits)
    clock = WallClock(device, wait=True)
    timed = SpeculativeDecoder(base.target, base.drafter, policy, clock=clock, capture=base.capture)
    parts = [step.seconds for step, _ in _steps(timed, ids, options)]
    total, counts = sum(parts, Seconds()), [count for _, count in whole]
    row: Row = {"steps": len(whole), "step_ms": 1e3 * sum(step.seconds.total for step, _ in whole) / len(whole)}
    row |= {f"{part}_ms": 1e3 * getattr(total, part) / len(parts) for part in ("draft", "verify", "policy", "rest")}
    told = device.type == "cuda" and len(whole) > 1
    return row | {
        "loop_share": total.rest / total.total,
        "waits_per_step": (counts[-1] - counts[0]) / (len(counts) - 1) if told else None,
    }


def _steps(
    decoder: SpeculativeDecoder, ids: list[torch.Tensor], options: dict[str, Any], waits: Waits | None = None
) -> list[tuple[Step, int]]:
    """Of a generation, with the waits until the end of each."""
    with decoder.run_many(ids, eos_token_id=None, **options) as runs:
        found = [(record, waits.count if waits else 0) for record in runs]
    return [(record, count) for record, count in found if isinstance(record, Step)]


class Waits:
    """Counts what torch says of calls in which the host waits for a CUDA device, inside a `with` block."""

    def __init__(self, device: torch.device) -> None:
        self.told, self.count = device.type == "cuda", 0

    def __enter__(self) -> Waits:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        if self.told:
            warnings.simplefilter("always")
            usual = warnings.showwarning

            def show(message: Warning | str, *place: Any, **more: Any) -> None:
                if "synchronizing CUDA operation" in str(message):
                    self.count += 1
                else:
                    usual(message, *place, **more)

            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        if self.told:
            torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)  # type: ignore[arg-type]


def _reads(sizes: Sizes, deadline: Deadline) -> Iterator[Row]:
    host = shipped_pair(torch.device("cpu"))
    (prompt, *_) = some_prompts(1)
    with SimulatedDevice() as device:
        moved = device.decoder(host)
        for policy in sizes.timed:
            if not deadline:
                return
            reads = device.count(moved.with_policy(policy), prompt, temperature=0.0, max_new_tokens=sizes.new_tokens)
            mean = sum(reads.steps) / max(1, len(reads.steps))
            yield {"what": "reads", "policy": policy, "steps": len(reads.steps), "reads_per_step": mean}
