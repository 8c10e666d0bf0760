"""What `generate` hands to a decoder beside token ids, and in which passes of the target it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# The session hands these to the model itself, or `refuse_what_we_cannot_do` has looked at them.
_OF_THE_SESSION = frozenset(
    {"input_ids", "past_key_values", "cache_params", "state", "use_cache", "logits_to_keep", "attention_mask"}
)
POSITIONS = "position_ids"
OF_TEXT, AS_BEFORE = ("mm_token_type_ids", "moe_mm_token_type_ids"), ("token_type_ids",)
"""Types of tokens. Generated tokens are text, type 0, or of the type of the token before, as in plain decoding."""


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of the target beside tokens.

    Attributes:
        prefill: what the pass over the prompt takes, such as images.
        following: what every later pass takes, here for the prompt's last token: tensors [..., 1].
        length: tokens of the prompt.
    """

    prefill: Mapping[str, Any]
    following: Mapping[str, Tensor]
    length: int

    def at(self, start: int, count: int) -> dict[str, Tensor]:
        """Inputs of a later pass over `count` tokens, of which the first follows `start` others: [..., count]."""
        made = {}
        for name, value in self.following.items():
            if name == POSITIONS:
                places = torch.arange(start, start + count, device=value.device, dtype=value.dtype)
                made[name] = value + 1 - self.length + places
            else:
                last = torch.zeros_like(value) if name in OF_TEXT else value
                made[name] = last.expand(*value.shape[:-1], count)
        return made


def model_inputs(model: PreTrainedModel, ids: Tensor, model_kwargs: Mapping[str, Any]) -> ModelInputs:
    """What the model's passes take beside tokens; nothing for plain text.

    Args:
        ids: the prompt, int64 [1, length].
        model_kwargs: as transformers' `generate` hands them over.

    Raises:
        ValueError: an input that the model would also read in later passes, where nobody knows its values.
    """
    length = ids.shape[1]
    given = {name: value for name, value in model_kwargs.items() if not _is_empty(value)}
    if POSITIONS in given and given[POSITIONS].tolist() == [[*range(length)]]:
        del given[POSITIONS]  # as the model counts by itself
    if given.keys() <= _OF_THE_SESSION:
        return ModelInputs({}, {}, length)
    first, later = (_prepared(model, ids, given, first=first) for first in (True, False))
    for name in later.keys() - {POSITIONS, *OF_TEXT, *AS_BEFORE}:
        raise ValueError(
            f"{name}: {type(model).__name__} reads it in every pass, and speculative decoding can hand on only what is "
            "read with the prompt; leave it out, or decode this prompt without custom_generate"
        )
    others = first.keys() - {POSITIONS, *OF_TEXT, *AS_BEFORE}
    config = model.config.get_text_config().to_dict()
    # Layers attend to an image: their part of the cache is no list of tokens.
    if others and any(value for name, value in config.items() if "cross_attention" in name):
        raise ValueError(
            f"{', '.join(sorted(others))}: {type(model).__name__} keeps what it makes of them in its cache, where it "
            "cannot be told from rejected tokens; decode this prompt without custom_generate"
        )
    return ModelInputs(first, {name: value[..., -1:] for name, value in later.items()}, length)


def _prepared(model: PreTrainedModel, ids: Tensor, given: Mapping[str, Any], *, first: bool) -> dict[str, Any]:
    """The model's own choice of inputs, for prefill or for a later pass over one token."""
    made = model.prepare_inputs_for_generation(
        ids, next_sequence_length=None if first else 1, is_first_iteration=first, **given
    )
    return {name: value for name, value in made.items() if name not in _OF_THE_SESSION and not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):  # outputs of encoders, by kind of input
        return all(_is_empty(item) for item in value.values())
    return value is None
