"""How often a step reads the device, by policy and drafter, counted on a simulated device with the real models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import PolicyError, overrides
from bpkit.progress import NoProgress, Progress
from bpkit.prompts import Prompt
from bpkit.registry.resolve import PolicyLike
from bpkit.testing.simulated_device import SimulatedDevice

SCHEMA_VERSION = 1


def count_reads(
    decoders: Sequence[SpeculativeDecoder],
    policies: Mapping[str, PolicyLike],
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode each prompt under each policy with each drafter; plain JSON values.

    Args:
        decoders: one for each drafter, on the host. options: of `generate`, with `seed`.

    Returns:
        `rows`: of each drafter and policy the mean and the largest number of reads of a step, whether all texts were
        those of plain decoding on the host, and whether the drafter asks the policy after every token. `left_out`: by
        drafter, policies that it cannot serve, with the reason.
    """
    ticker = progress or NoProgress()
    ticker.start("counting", len(decoders) * len(policies))
    rows: list[dict[str, Any]] = []
    left_out: dict[str, dict[str, str]] = {}
    for host in decoders:
        plain = host.with_policy("fixed:1")
        texts = [
            plain.generate(prompt.text, stream_id=i, **options).tokens[0].tolist() for i, prompt in enumerate(prompts)
        ]
        with SimulatedDevice() as device:
            moved = device.decoder(host)
            for name, policy in policies.items():
                try:
                    rows.append(_row(device, name, moved.with_policy(policy), prompts, texts, options))
                except PolicyError as error:
                    left_out.setdefault(host.spec.drafter, {})[name] = str(error)
                ticker.tick()
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": {
            "target": decoders[0].spec.target,
            "prompts": [prompt.id for prompt in prompts],
            "options": dict(options),
        },
        "rows": rows,
        "left_out": left_out,
    }


def _row(
    device: SimulatedDevice,
    name: str,
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    texts: Sequence[list[int]],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    steps: list[int] = []
    equal = True
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        reads = device.count(decoder, prompt.text, stream_id=i, **options)
        equal &= list(reads.tokens) == text
        steps += reads.steps
    asks = decoder.spec.work.may_end_early and overrides(decoder.policy, "extend")
    return {
        "drafter": decoder.spec.drafter,
        "drafter_kind": decoder.drafter.kind,
        "policy": name,
        "steps": len(steps),
        "mean": round(sum(steps) / max(len(steps), 1), 3),
        "most": max(steps, default=0),
        "asks_after_every_token": asks,
        "texts_equal": equal,
    }
