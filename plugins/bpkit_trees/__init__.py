"""Trees whose shape is chosen before the draft."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "delayed_tree",
        "bpkit_trees.delayed_tree:DelayedTreePolicy",
        summary="Chooses a trunk, branches and their length before each draft, by a network of hidden states; trained.",
        config="bpkit_trees.delayed_tree:DelayedTreeConfig",
    )
