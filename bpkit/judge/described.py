"""What reports say of the decoder, and of policies as they were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpkit.registry.resolve import PolicyLike
from bpkit.types import DecoderSpec


def describe_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The models, as plain JSON values; `sources` lists the drafters where there are several."""
    named = {name: getattr(spec, name) for name in ("target", "drafter", "drafter_kind", "trained_block_size")}
    if spec.branches > 1:
        named["branches"] = spec.branches
    if not spec.others:
        return named
    sources = [
        {"drafter": s.drafter, "drafter_kind": s.kind, "trained_block_size": s.trained_block_size} for s in spec.sources
    ]
    return {**named, "sources": sources}


def describe_policies(policies: Mapping[str, PolicyLike]) -> dict[str, Any]:
    """Those that were given as text or mapping, as plain JSON values."""
    return {
        name: policy if isinstance(policy, str) else dict(policy)
        for name, policy in policies.items()
        if isinstance(policy, (str, Mapping))
    }
