"""The built-in drafters, registered through the same hook as anyone else's."""

from __future__ import annotations

from bpkit.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_drafters(register: Register) -> None:
    register(
        "block-diffusion",
        "bpkit.drafters.block_diffusion:BlockDiffusionDrafter.load",
        summary="A DFlash checkpoint: the whole block in one forward.",
        config="bpkit.drafters.config:BlockDiffusionConfig",
    )
    register(
        "autoregressive",
        "bpkit.drafters.autoregressive:AutoregressiveDrafter.load",
        summary="Any causal language model with the target's tokenizer, token after token.",
        config="bpkit.drafters.config:AutoregressiveConfig",
    )
    register(
        "ngram",
        "bpkit.drafters.ngram:NgramDrafter.load",
        summary="Prompt lookup: copies what followed the latest n-gram before; no model.",
        config="bpkit.drafters.config:NgramConfig",
    )
