"""bpkit: block-size policies for speculative decoding, as plug-ins.

Names are imported when first used, so that `import bpkit` costs nothing and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpkit.names import imported_late

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.policy import Policy, PolicyConfig, PolicyError
    from bpkit.registry.hookspecs import hookimpl
    from bpkit.registry.resolve import resolve_policy
    from bpkit.types import Context, DecoderSpec, Draft, Feature, Plan, Prefill, Step

__version__ = "0.1.0"

__all__ = [
    "Context",
    "DecoderSpec",
    "Draft",
    "Feature",
    "Plan",
    "Policy",
    "PolicyConfig",
    "PolicyError",
    "Prefill",
    "SpeculativeDecoder",
    "Step",
    "hookimpl",
    "resolve_policy",
]

__getattr__ = imported_late(
    __name__, __all__, "types", "policy", "registry.hookspecs", "registry.resolve", "decode.decoder"
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
