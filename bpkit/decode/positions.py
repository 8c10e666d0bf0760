"""How far a model can read."""

from __future__ import annotations

from transformers import PreTrainedModel


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions a model has, or None if reading on is only worse, not an error.

    Rotary positions are computed as far as needed, and states have none. What remains is looked up in a table (GPT-2,
    OPT, GPT-J) or made for one length (MPT).
    """
    config = model.config.get_text_config()
    if getattr(config, "rope_parameters", None) or getattr(model, "_is_stateful", False):
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
