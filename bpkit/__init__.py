"""bpkit: block-size policies for speculative decoding, as plug-ins.

Names are imported when first used, so that `import bpkit` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.policy import Policy, PolicyConfig, PolicyError
    from bpkit.registry.hookspecs import hookimpl
    from bpkit.registry.resolve import resolve_policy
    from bpkit.types import Context, DecoderSpec, Draft, Feature, Prefill, Step

__version__ = "0.1.0"

_HOME = {
    "Context": "types",
    "DecoderSpec": "types",
    "Draft": "types",
    "Feature": "types",
    "Policy": "policy",
    "PolicyConfig": "policy",
    "PolicyError": "policy",
    "Prefill": "types",
    "SpeculativeDecoder": "decode.decoder",
    "Step": "types",
    "hookimpl": "registry.hookspecs",
    "resolve_policy": "registry.resolve",
}
__all__ = [
    "Context",
    "DecoderSpec",
    "Draft",
    "Feature",
    "Policy",
    "PolicyConfig",
    "PolicyError",
    "Prefill",
    "SpeculativeDecoder",
    "Step",
    "hookimpl",
    "resolve_policy",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bpkit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bpkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
