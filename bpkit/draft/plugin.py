"""The built-in drafters, registered through the same hook as anyone else's."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_drafters(register: Register) -> None:
    register(
        "block-diffusion",
        "bpkit.draft.block_diffusion:BlockDiffusionDrafter.load",
        summary="A DFlash checkpoint: the whole block in one forward.",
        config="bpkit.draft.config:BlockDiffusionConfig",
    )
    register(
        "autoregressive",
        "bpkit.draft.autoregressive:AutoregressiveDrafter.load",
        summary="Any causal language model with the target's tokenizer, token after token.",
        config="bpkit.draft.config:AutoregressiveConfig",
    )
    register(
        "ngram",
        "bpkit.draft.ngram:NgramDrafter.load",
        summary="Prompt lookup: copies what followed the latest n-gram before; no model.",
        config="bpkit.draft.config:NgramConfig",
    )
    register(
        "ensemble",
        "bpkit.draft.ensemble:EnsembleDrafter.load",
        summary="Several models draft the same positions; a weighted mixture of their distributions decides.",
        config="bpkit.draft.config:EnsembleConfig",
    )
    register(
        "last-pass",
        "bpkit.draft.last_pass:LastPassDrafter.load",
        summary="Jacobi: what the target's last pass said after its first wrong token; no model.",
        config="bpkit.draft.config:LastPassConfig",
    )
    register(
        "hierarchy",
        "bpkit.draft.hierarchy:HierarchyDrafter.load",
        summary="Three stores of n-grams, asked in order: the text, the target's answers, a corpus; no model.",
        config="bpkit.draft.config:HierarchyConfig",
    )
    register(
        "early-exit",
        "bpkit.draft.early_exit:EarlyExitDrafter.load",
        summary="The target's first layers and one trained layer, token after token.",
        config="bpkit.draft.config:EarlyExitConfig",
    )
