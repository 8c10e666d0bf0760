"""What reports say of the decoder, and of policies as they were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpkit.registry.resolve import PolicyLike
from bpkit.types import DecoderSpec


def describe_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The models, as plain JSON values."""
    return {name: getattr(spec, name) for name in ("target", "drafter", "drafter_kind", "trained_block_size")}


def describe_policies(policies: Mapping[str, PolicyLike]) -> dict[str, Any]:
    """Those that were given as text or mapping, as plain JSON values."""
    return {
        name: policy if isinstance(policy, str) else dict(policy)
        for name, policy in policies.items()
        if isinstance(policy, (str, Mapping))
    }
