"""What a policy sees, made by hand."""

from __future__ import annotations

from typing import Any

import torch

from bpkit.types import Context, DecoderSpec, Draft, Feature, Seconds, Step


def decoder(trained: int = 8, largest: int = 16, target: str = "target") -> DecoderSpec:
    return DecoderSpec(target, "drafter", "block-diffusion", trained, largest, hidden_size=4, vocab_size=10)


def context(batch: int = 1, seed: int = 0, length: int = 40) -> Context:
    zeros = torch.zeros(batch, dtype=torch.long)
    return Context(decoder(), zeros, zeros + 100, zeros + length, torch.Generator().manual_seed(seed))


def draft(lengths: list[int] | None = None, **rows: list[list[float]]) -> Draft:
    """A draft with features by name; `lengths` says where the padding of each row begins."""
    features = {
        Feature(name): torch.tensor(values, dtype=torch.float32).reshape(len(values), -1)
        for name, values in rows.items()
    }
    batch, width = next(iter(features.values())).shape
    length = torch.tensor(lengths if lengths is not None else [width] * batch)
    return Draft(context(batch), length + 1, length, torch.zeros(batch, width, dtype=torch.long), features=features)


def step(
    verified: list[int],
    accepted: list[int],
    seconds: float = 0.1,
    *,
    drafted: list[int] | None = None,
    block_size: list[int] | None = None,
) -> Step:
    """A step of drafts that were verified whole, unless `drafted` or `block_size` says otherwise."""
    lengths, stood = torch.tensor(verified), torch.tensor(accepted)
    sizes = torch.tensor(block_size) if block_size is not None else torch.tensor(drafted or verified) + 1
    tokens = torch.zeros(len(verified), int(stood.max()) + 1, dtype=torch.long)
    half = seconds / 2
    return Step(sizes, sizes - 1, lengths, stood, tokens, torch.zeros_like(stood), Seconds(draft=half, verify=half))


def bound(policy: Any, spec: DecoderSpec | None = None, cost: Any = None) -> Any:
    policy.bind(spec or decoder(), cost)
    return policy
