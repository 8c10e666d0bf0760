"""Presets of GPUs: formulas from data sheets and the shapes of published models, and from what was measured."""

from __future__ import annotations

from typing import Any

from bpkit.trace.cost.roofline import DeviceSpeed, DraftPass, Experts, ModelPass, Roofline

VOCABULARY, HEADS, HEAD = 151936, 32, 128
"""Of all Qwen3 models here: tokens, attention heads, and the width of one."""
DRAFTER_LAYERS = FEATURES = 5
"""Layers of the drafter, and layers of the target that it reads, as published for Qwen3-4B."""
BYTES = 2
"""Of a weight, a key or a value in bfloat16. A token takes as many FLOPs with a weight."""


def _layers(count: int, width: int, inner: int, kv_heads: int) -> int:
    """Weights of layers: attention, and a gated feed-forward network of `inner` if there is one."""
    return count * (2 * width * HEAD * (HEADS + kv_heads) + 3 * width * inner)


def _passes(weights: int, layers: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """Arguments of a `ModelPass` of so many weights that every token meets."""
    return {
        "weights": float(BYTES * weights),
        "flops": float(2 * weights),
        "context": float(BYTES * 2 * layers * kv_heads * HEAD),
        "attention": float(4 * layers * HEADS * HEAD),
        **more,
    }


def _drafter(width: int, inner: int, kv_heads: int, overhead: float) -> DraftPass:
    """A DFlash drafter of layers as wide as the target's, with the target's output layer."""
    fused = FEATURES * width * width  # of features, which positions that wait go through, and keys and values
    drafted = _layers(DRAFTER_LAYERS, width, inner, kv_heads) + width * VOCABULARY
    shape = _passes(drafted, DRAFTER_LAYERS, kv_heads, overhead=overhead)
    return DraftPass(
        **{**shape, "weights": float(BYTES * (drafted + fused))},
        waiting=float(2 * (fused + DRAFTER_LAYERS * 2 * width * kv_heads * HEAD)),
        scores=2.0 * 4 * VOCABULARY,  # float32 scores, read twice
    )


_H100 = DeviceSpeed(bandwidth=3.35e12, peak=989e12, bandwidth_share=0.8, peak_share=0.6)
_OF_H100 = "H100 SXM: 3.35 TB/s, 989 TFLOPS in bfloat16 without sparsity (NVIDIA's data sheet)."
_OF_DFLASH = "Five layers of a drafter: DFlash, arXiv 2602.06036."
_IN_AN_ENGINE = (
    "in an engine that packs rows of any width. Derived from bandwidth, peak and the sizes of the models; nothing of "
    "it was measured. "
)
_ASSUMED = (
    "Assumed: kernels achieve 80% of the bandwidth and 60% of the peak; 0.5 ms a pass and 0.5 ms a step for all "
    "else; a DFlash drafter of five layers with the target's width and output layer. "
)
_NOT_KNOWN = (
    "Not known: what kernels achieve at each size, the numbers of tokens that captured passes are filled up to, and "
    "what an engine does for each row."
)

H200_4B = Roofline(
    name="h200-4b",
    description=(
        "Qwen3-4B in bfloat16 with its DFlash drafter on an H200, passes captured, one row. Measured: 8.04 GB at "
        "4.19 TB/s; a target pass 8.2 ms at width 1, 9.6 at 16, 9.8 at 32 (priced 8.2, 9.7, 9.7); a draft 1.5 to 1.6 "
        "ms; 0.8 to 1.0 ms a step for policy and bookkeeping. Assumed: 60% of the peak. Not known: several rows, "
        "which are priced with an attention that reads what is there, while a padded pass over 8 rows of 8 took 15.5 "
        "ms; prompts, which were read without capture in 31 ms or more; probabilities of drafts."
    ),
    source=(
        "Random weights, torch 2.11, transformers 5.23, batch 1, context 512. H200 SXM: 989 TFLOPS in bfloat16 "
        f"without sparsity (NVIDIA's data sheet). {_OF_DFLASH}"
    ),
    device=DeviceSpeed(bandwidth=4.19e12, peak=989e12, peak_share=0.6),
    target=ModelPass(
        **_passes(_layers(36, 2560, 9728, 8) + 2560 * VOCABULARY, 36, 8, overhead=6.26e-3, several=1.5e-3)
    ),
    draft=_drafter(2560, 9728, 8, overhead=1.1e-3),
    rest=0.9e-3,
    context_length=512,
)
H100_8B = Roofline(
    name="h100-8b",
    description=(f"Qwen3-8B in bfloat16 on an H100 SXM, {_IN_AN_ENGINE}{_ASSUMED}{_NOT_KNOWN}"),
    source=(
        f"{_OF_H100} Qwen3-8B's configuration: 36 layers of width 4096, 32 heads of 128 and 8 of keys and values, "
        f"feed-forward width 12288, 151936 tokens, output layer apart from the embedding. {_OF_DFLASH}"
    ),
    device=_H100,
    target=ModelPass(**_passes(_layers(36, 4096, 12288, 8) + 4096 * VOCABULARY, 36, 8, overhead=0.5e-3)),
    draft=_drafter(4096, 12288, 8, overhead=0.5e-3),
    rest=0.5e-3,
)
_EXPERTS = 48 * 128 * 3 * 2048 * 768
H100_MOE = Roofline(
    name="h100-moe",
    description=(
        f"Qwen3-30B-A3B in bfloat16, 8 of 128 experts a token, on an H100 SXM, {_IN_AN_ENGINE}{_ASSUMED}Tokens choose "
        "experts evenly and independently, as in MoESD; those of one text share more, so that small passes are "
        f"cheaper than here. {_NOT_KNOWN}"
    ),
    source=(
        f"{_OF_H100} Qwen3-30B-A3B's configuration: 48 layers of width 2048, 32 heads of 128 and 4 of keys and "
        "values, experts of width 768, 151936 tokens, output layer apart from the embedding. Experts that are "
        f"touched: MoESD, arXiv 2505.19645. {_OF_DFLASH}"
    ),
    device=_H100,
    target=ModelPass(
        **_passes(_layers(48, 2048, 0, 4) + 48 * 2048 * 128 + 2048 * VOCABULARY, 48, 4, overhead=0.5e-3),
        experts=Experts(total=128, active=8, weights=float(BYTES * _EXPERTS), flops=2.0 * _EXPERTS * 8 / 128),
    ),
    draft=_drafter(2048, 6144, 4, overhead=0.5e-3),
    rest=0.5e-3,
)
