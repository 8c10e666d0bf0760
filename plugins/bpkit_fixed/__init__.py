"""Policies that learn nothing: `fixed`, the same block size at every step, and `priority`, a fixed order of sources."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "fixed",
        "bpkit_fixed.policy:Fixed",
        summary="The same block size before every draft.",
        config="bpkit_fixed.policy:FixedConfig",
    )
    register(
        "priority",
        "bpkit_fixed.priority:Priority",
        summary="Of several sources, in an order, the first that has something to offer drafts.",
        config="bpkit_fixed.priority:PriorityConfig",
    )
