"""Rotary embeddings whose frequencies depend on how far a text has come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def refuse_changing_frequencies(model: PreTrainedModel, prompt_length: int, max_length: int) -> None:
    """Refuse a text in which the frequencies of positions would change after the prompt.

    A pass has one set of frequencies, that of its last position. Plain decoding would change them at another token
    than passes over several tokens do.

    Raises:
        ValueError: says up to which length the text would be right.
    """
    config = model.config.get_text_config(decoder=True)
    last = max_length - 1  # the text's last token is not read
    for kind, limit in _limits(config):
        changes = last > limit if kind == "dynamic" else prompt_length <= limit < last
        if changes:
            raise ValueError(
                f"the target's rotary embedding ({kind}) changes its frequencies beyond {limit} tokens, and the text "
                f"may have {max_length}: keep prompt and max_new_tokens within {limit + 1}, or use plain generate"
            )


def _limits(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Rope types that change, each with the longest text up to which they do not."""
    for parameters in _rope_parameters(config):
        kind = str(parameters.get("rope_type", ""))
        if "dynamic" in kind:
            yield "dynamic", int(config.max_position_embeddings)
        elif kind == "longrope":
            original = parameters.get("original_max_position_embeddings")
            yield kind, int(original or config.max_position_embeddings)


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Of all layer types where they differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters] if "rope_type" in parameters else [x for x in parameters.values() if isinstance(x, dict)]
