"""`threshold`, `confidence`, `svip`, `adaedl` and, trained, `specdecpp` stop at doubt; `schedule` follows steps."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "threshold",
        "bpkit_threshold.thresholds:Threshold",
        summary="Verifies a draft as far as the product of the drafter's probabilities stays above a threshold.",
        config="bpkit_threshold.thresholds:ThresholdConfig",
    )
    register(
        "svip",
        "bpkit_threshold.thresholds:Svip",
        summary="Verifies a draft up to the first position where the drafter's entropy is high.",
        config="bpkit_threshold.thresholds:SvipConfig",
    )
    register(
        "schedule",
        "bpkit_threshold.schedule:Schedule",
        summary="Before every draft: two tokens more if the last draft was accepted whole, else one less.",
        config="bpkit_threshold.schedule:ScheduleConfig",
    )
    register(
        "confidence",
        "bpkit_threshold.thresholds:Confidence",
        summary="Verifies a draft up to the first token of low probability, as transformers' dynamic speculation.",
        config="bpkit_threshold.thresholds:ConfidenceConfig",
    )
    register(
        "adaedl",
        "bpkit_threshold.thresholds:AdaEdl",
        summary="Verifies a draft while an entropy bound on acceptance stays above a threshold that adapts.",
        config="bpkit_threshold.thresholds:AdaEdlConfig",
    )
    register(
        "specdecpp",
        "bpkit_threshold.specdecpp:SpecDecPP",
        summary="Stops a draft once a trained head thinks that one of its tokens will be refused (SpecDec++).",
        config="bpkit_threshold.specdecpp:SpecDecPPConfig",
    )
