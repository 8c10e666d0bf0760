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
    register(
        "batch_ema",
        "bpkit_load.batch_ema:BatchEma",
        summary="For all rows: a block size by one moving average of accepted tokens, as in SGLang.",
        config="bpkit_load.batch_ema:BatchEmaConfig",
    )
    register(
        "turbospec",
        "bpkit_load.turbospec:TurboSpec",
        summary="For all rows: the block size with the most tokens per second, from one acceptance rate (TurboSpec).",
        config="bpkit_load.turbospec:TurboSpecConfig",
    )
    register(
        "adaptive_verification",
        "bpkit_load.adaptive_verification:AdaptiveVerification",
        summary="After the draft: the tokens of all rows that are most likely to stand, as many as pay, as in vLLM.",
        config="bpkit_load.adaptive_verification:AdaptiveVerificationConfig",
    )
    register(
        "joint",
        "bpkit_load.joint:Joint",
        summary="One budget over all rows: widths by chances against the price of a step.",
        config="bpkit_load.joint:JointConfig",
    )
    register(
        "tree",
        "bpkit_load.tree:TreePolicy",
        summary="Of drafts that are trees: the nodes of all rows that pay, the likeliest first.",
        config="bpkit_load.tree:TreePolicyConfig",
    )
    register(
        "sequoia",
        "bpkit_load.sequoia:Sequoia",
        summary="Before every draft: the best tree that is the same in every step, of as many nodes as pay (Sequoia).",
        config="bpkit_load.sequoia:SequoiaConfig",
    )
