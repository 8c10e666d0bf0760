"""The `fixed` policy: the same block size at every step, as engines do today."""

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
