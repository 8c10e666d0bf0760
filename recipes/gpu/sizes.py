"""How much is measured: of a whole run on a GPU, and of one at tiny sizes that a CPU comes through in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
_SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 512}
_FEW = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Sizes:
    """What a run measures.

    Attributes:
        target: shape of the random target. drafter_layers: of its DFlash drafter, which has the same width.
        feature_layers: of the target, which the drafter reads.
        block_size: of drafts. widths: of verification, in positions.
        batch_sizes: rows. context: tokens that each row holds, about. long_context: of a single row, once more.
        repeats: calls of which a median is taken.
        prompts: of each domain. new_tokens: of each text.
        policies: by name; None for all that are installed and serve the pair. timed: those whose steps are timed.
        exported: names; None for all that ship.
    """

    target: dict[str, Any] = field(default_factory=lambda: QWEN3_4B)
    drafter_layers: int = 5
    feature_layers: tuple[int, ...] = (1, 9, 17, 25, 33)
    block_size: int = 16
    widths: tuple[int, ...] = (1, 8, 16)
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    context: int = 512
    long_context: int = 8192
    repeats: int = 15
    prompts: int = 3
    new_tokens: int = 48
    text_batch_sizes: tuple[int, ...] = (1, 8)
    policies: tuple[str, ...] | None = None
    timed: tuple[str, ...] = ("fixed:8", "threshold", "bandit")
    exported: tuple[str, ...] | None = None


TINY = Sizes(
    target={**_SMALL, **_FEW},
    drafter_layers=1,
    feature_layers=(0, 2),
    block_size=4,
    widths=(1, 3),
    batch_sizes=(1, 2),
    context=12,
    long_context=300,
    repeats=2,
    prompts=1,
    new_tokens=5,
    text_batch_sizes=(2,),
    policies=("fixed:4", "threshold"),
    timed=("fixed:4",),
    exported=("forecast",),
)
