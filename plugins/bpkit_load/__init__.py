"""Policies for many rows at once: what engines and papers do under load."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "batch_table",
        "bpkit_load.batch_table:BatchTable",
        summary="A block size for each number of running rows, from a table, as in vLLM.",
        config="bpkit_load.batch_table:BatchTableConfig",
    )
