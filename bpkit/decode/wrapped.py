"""Targets that are wrapped: compiled, with adapters of PEFT, in data parallelism."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


def inside(model: Any) -> PreTrainedModel:
    """The model of transformers that a wrapper holds: of `torch.compile`, PEFT, `DataParallel` and the like.

    Raises:
        TypeError: there is none inside.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        held = _held(inner)
        if held is None:
            return cast("PreTrainedModel", _if_it_decodes(inner, model))
        inner = held
    return inner


def _held(wrapper: Any) -> Any:
    """What a wrapper holds, or None if it is no wrapper that we know."""
    held = getattr(wrapper, "_orig_mod", None)  # torch.compile
    if held is None and callable(getattr(wrapper, "get_base_model", None)):  # PEFT
        held = wrapper.get_base_model()
    if held is None:
        held = getattr(wrapper, "module", None)  # data parallelism
    return held if isinstance(held, nn.Module) and held is not wrapper else None


def _if_it_decodes(inner: Any, model: Any) -> Any:
    """A model that is not transformers' own may do what one does."""
    if not all(hasattr(inner, name) for name in ("generate", "config", "get_input_embeddings")):
        raise TypeError(
            f"the target is a {type(model).__name__}, in which there is no model of transformers; pass one that "
            "AutoModelForCausalLM gives, compiled or with adapters as you like"
        )
    return inner


def refuse_virtual_tokens(model: Any) -> None:
    """Raise ValueError for adapters of PEFT that put virtual tokens before the input of every pass."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = getattr(config, "peft_type", "prompt learning")
        raise ValueError(
            f"the target's adapter ({getattr(kind, 'value', kind)}) puts virtual tokens before every input, which a "
            "pass over several tokens cannot have; use an adapter that lives in the layers, such as LoRA"
        )
