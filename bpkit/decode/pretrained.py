"""Models of transformers: loading them strictly, what is inside a wrapper, where they work and how far they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging, output_capturing

Model = TypeVar("Model", bound=PreTrainedModel)
_COUNTS_EMBEDDINGS = hasattr(output_capturing, "resolve_hidden_states_indices")
"""Whether transformers is of 5.20 or later."""


def load_causal_lm(
    path: str, *, may_lack: Callable[[PreTrainedModel], Sequence[str]] | None = None, **options: Any
) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub, on the CPU unless `device_map` says otherwise.

    transformers fills what a checkpoint lacks with random numbers and drops what it does not know, with a log message.
    Here either is an error.

    Args:
        may_lack: names of the weights of a model that its checkpoint may lack, because the caller has them.
        options: of transformers' `from_pretrained`, such as `dtype`, `revision` or `local_files_only`.

    Raises:
        ValueError: the checkpoint is of an architecture that transformers does not have, such as a drafter's, or its
            weights are not those of the architecture.
    """
    config, _ = PreTrainedConfig.get_config_dict(path, **hub_options(options))
    refuse_unknown_architecture(path, config)
    with _unlogged():  # what is wrong is an error below
        model, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if may_lack is not None:
        info["missing_keys"] = set(info["missing_keys"]) - set(may_lack(model))
    refuse_other_weights(path, info, f"a {type(model).__name__}")
    return model


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without transformers' warnings."""
    usual = logging.get_verbosity()
    logging.set_verbosity(max(usual, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(usual)


def hidden_states_at(indices: Sequence[int]) -> Sequence[int] | bool:
    """What a model is given as `output_hidden_states` so that its `hidden_states` has something at these indices.

    transformers before 5.20 counts a list's indices without the embeddings; there all hidden states are kept.
    """
    return bool(indices) and (list(indices) if _COUNTS_EMBEDDINGS else True)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of `from_pretrained` that say which files to read."""
    names = ("revision", "subfolder", "local_files_only", "cache_dir", "token", "force_download", "proxies")
    return {name: options[name] for name in names if name in options}


def refuse_unknown_architecture(path: str, config: Mapping[str, Any]) -> None:
    """Raise unless all `architectures` of a config.json are classes of transformers that read tokens by themselves.

    Drafters of other layouts (EAGLE, Medusa, multi-token prediction, DSpark) often carry the `model_type` of their
    target, by which transformers would take them for a small model of that type.
    """
    for name in config.get("architectures") or ():
        if not hasattr(transformers, name) or name.endswith(("AssistantForCausalLM", "AssistantModel")):
            raise ValueError(
                f"{path} is a {name}, not a causal language model of transformers: bpkit drafts with DFlash "
                "checkpoints (DFlashDraftModel), with causal language models and with n-grams; use one of these"
            )


def refuse_other_weights(path: str, info: Mapping[str, Any], what: str) -> None:
    """Raise if transformers' loading information tells of weights that are missing, unexpected or of another shape."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[kind])
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(
                f"the weights of {path} are not those of {what}: {kind.replace('_', ' ')} {shown}; "
                "use a complete checkpoint of that architecture, or load the model yourself and hand that over"
            )


def inside(model: Any) -> PreTrainedModel:
    """The model of transformers that a wrapper holds: of `torch.compile`, PEFT, `DataParallel` and the like.

    Raises:
        TypeError: there is none inside.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        held = getattr(inner, "_orig_mod", None)  # torch.compile
        if held is None and callable(getattr(inner, "get_base_model", None)):  # PEFT
            held = inner.get_base_model()
        if held is None:
            held = getattr(inner, "module", None)  # data parallelism
        if not isinstance(held, nn.Module) or held is inner:
            break
        inner = held
    # A model that is not transformers' own may do what one does.
    able = all(hasattr(inner, name) for name in ("generate", "config", "get_input_embeddings"))
    if not isinstance(inner, PreTrainedModel) and not able:
        raise TypeError(
            f"the target is a {type(model).__name__}, in which there is no model of transformers; pass one that "
            "AutoModelForCausalLM gives, compiled or with adapters as you like"
        )
    return cast("PreTrainedModel", inner)


def move(model: Model, device: torch.device | str) -> Model:
    """Move a model to a device, but leave it where it is if it is quantised or split over several devices."""
    quantised = getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None
    if quantised or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return model
    moved: Model = model.to(device)
    return moved


def device_of(part: nn.Module | None, model: PreTrainedModel) -> torch.device:
    """The device that a part of a model takes its input on; without weights of its own, the model's.

    Weights that were offloaded lie on the meta device: their hook says where they are computed with.
    """
    execution = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
    if execution is not None:
        return torch.device(f"cuda:{execution}" if isinstance(execution, int) else execution)
    weight = getattr(part, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) and not weight.is_meta else model.device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes token ids."""
    return device_of(model.get_input_embeddings(), model)


def working_dtype(part: nn.Module | None, model: PreTrainedModel) -> torch.dtype:
    """The dtype of a part's input: its weight's, or the model's where that is packed or of 8 bits or fewer."""
    weight = getattr(part, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
        return weight.dtype
    dtype: torch.dtype = model.dtype
    return dtype


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
