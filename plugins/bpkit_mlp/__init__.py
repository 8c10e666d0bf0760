"""Small perceptrons that pick sizes: `blockpilot` for each prompt, `ldlp` and `ldlp_threshold` for each draft."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "blockpilot",
        "bpkit_mlp.blockpilot:BlockPilot",
        summary="BlockPilot: one block size for each prompt, by an MLP on the logits after the prompt.",
        config="bpkit_mlp.blockpilot:BlockPilotConfig",
    )
    register(
        "ldlp",
        "bpkit_mlp.ldlp:Ldlp",
        summary="AdaEAGLE: before each draft an MLP forecasts how much of it will be accepted, and that is drafted.",
        config="bpkit_mlp.ldlp:LdlpConfig",
    )
    register(
        "ldlp_threshold",
        "bpkit_mlp.ldlp:LdlpThreshold",
        summary="AdaEAGLE's forecast together with a threshold on the drafter's probabilities.",
        config="bpkit_mlp.ldlp:LdlpThresholdConfig",
    )
