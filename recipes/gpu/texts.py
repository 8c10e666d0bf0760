"""Section `texts`: whether texts on this device, out of captured passes, are those of plain decoding on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bpkit import assets
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.result import Generation
from bpkit.policy import PolicyError
from bpkit.registry.discovery import registry
from recipes.gpu.clock import Deadline
from recipes.gpu.models import captured, shipped_pair
from recipes.gpu.sizes import Sizes

Row = dict[str, Any]
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0, "seed": 1}}


def texts(sizes: Sizes, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """A row for each dtype, kind of sampling, policy and batch size.

    `differ_at_near_ties`: texts whose first other token is one where plain decoding's best two scores were nearly
    equal, so that the order of additions decides. `differ`: all others, which must be none.
    """
    for dtype in (torch.float32, torch.bfloat16):
        plain = shipped_pair(device, dtype)
        ours = captured(plain)
        for name, sampling in SAMPLING.items():
            options = {**sampling, "max_new_tokens": sizes.new_tokens}
            prompts = some_prompts(sizes.prompts)
            wanted = plain.generate(prompts, batch_size=1, **options)
            for policy in served(sizes, ours):
                for batch in sizes.text_batch_sizes:
                    if not deadline:
                        return
                    row: Row = {"dtype": str(dtype).removeprefix("torch."), "sampling": name}
                    row |= {"policy": policy, "batch": batch}
                    try:
                        found = ours.generate(prompts, batch_size=batch, policy=policy, **options)
                        yield row | compared(wanted, found)
                    except Exception as error:  # strict decoders raise what a policy does wrong
                        yield row | {"error": f"{type(error).__name__}: {error}"}


def some_prompts(count: int) -> list[str]:
    """Of each domain of the shipped prompts."""
    return [prompt["prompt"] for prompt in assets.prompts(limit=count)]


def served(sizes: Sizes, decoder: SpeculativeDecoder) -> Iterator[str]:
    """Policies that were asked for, or all that are installed and decide for this pair."""
    for name in sizes.policies or sorted(registry().policies):
        if name == "onnx":
            continue
        try:
            decoder.with_policy(name)
        except PolicyError:
            continue
        yield name


def compared(wanted: Sequence[Generation], found: Sequence[Generation]) -> Row:
    """Texts counted; `wanted` are of plain decoding, which decides a token a step."""
    counts = {"texts": len(wanted), "equal": 0, "differ_at_near_ties": 0, "differ": 0}
    for plain, ours in zip(wanted, found, strict=True):
        one, other = plain.tokens[0].tolist(), ours.tokens[0].tolist()
        if one == other:
            counts["equal"] += 1
            continue
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        record, row = plain.records[min(at, len(plain.records) - 1)]
        counts["differ_at_near_ties" if record.near_ties[row] else "differ"] += 1
    accepted = [step for made in found for step in made.steps]
    yielded = sum(made.tokens.shape[1] - 1 for made in found)
    return {**counts, "acceptance_length": yielded / len(accepted) if accepted else None}
