"""Section `exported`: policies in files, run by onnxruntime beside the decoder on the CPU and on the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.result import Generation
from bpkit.policy import PolicyError
from recipes.gpu.clock import Deadline
from recipes.gpu.models import captured, shipped_pair
from recipes.gpu.sizes import Sizes
from recipes.gpu.texts import compared, some_prompts

FOLDER = Path(__file__).parents[2] / "exported"
Row = dict[str, Any]


def exported(sizes: Sizes, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """A row for each file and provider: texts beside plain decoding, and decisions beside the policy in torch.

    `left_out` says why a provider does not run it.
    """
    plain = shipped_pair(device)
    decoder = captured(plain)
    prompts, options = some_prompts(sizes.prompts), {"temperature": 0.0, "max_new_tokens": sizes.new_tokens}
    wanted = plain.generate(prompts, batch_size=1, **options)
    for name in sizes.exported or sorted(
        folder.name for folder in FOLDER.iterdir() if (folder / "policy.json").is_file()
    ):
        in_torch = _generated(decoder, _of_torch(name), prompts, options)
        for provider in ("cpu", "cuda"):
            if not deadline:
                return
            row: Row = {"policy": name, "provider": provider}
            try:
                started = time.perf_counter()
                policy = {"name": "onnx", "path": str(FOLDER / name), "provider": provider}
                found = _generated(decoder, policy, prompts, options)
                row["seconds"] = time.perf_counter() - started
            except PolicyError as error:
                yield row | {"left_out": str(error)}
                continue
            except RuntimeError as error:
                yield row | {"error": f"{type(error).__name__}: {error}"}
                continue
            same = sum(_sizes(one) == _sizes(other) for one, other in zip(in_torch, found, strict=True))
            yield row | compared(wanted, found) | {"same_decisions_as_torch": same} | _policy_time(found)


def _of_torch(name: str) -> dict[str, Any]:
    """The policy that a file was exported from."""
    if name == "forecast_truncate":
        return {"name": "forecast", "truncate": True}
    return {"name": name}


def _generated(
    decoder: SpeculativeDecoder, policy: dict[str, Any], prompts: list[str], options: dict[str, Any]
) -> list[Generation]:
    return decoder.with_policy(policy).generate(prompts, batch_size=1, **options)


def _sizes(made: Generation) -> list[tuple[int, int]]:
    """What was decided at each step."""
    return [(int(step.block_size), int(step.verify_length)) for step in made.steps]


def _policy_time(found: list[Generation]) -> Row:
    steps = [step.seconds for made in found for step in made.steps]
    return {"policy_ms": 1e3 * sum(step.policy for step in steps) / max(1, len(steps))}
