"""Parts of a decoder of transformers: its own layers, some of them or beside others, as a model that shares weights.

Modules are copied, their weights are not: a part is where its model is, and is what that becomes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from bpkit.decode.pretrained import hidden_states_at

Module = TypeVar("Module", bound=nn.Module)
NORMS = ("norm", "final_layernorm", "final_layer_norm")
"""How decoders call the norm after their last layer."""
TRIED = 6
"""Tokens that a part is tried with."""


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal language model.

    Raises:
        ValueError: it does not keep them in a list called `layers`, or it is of more than text.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or model.config.get_text_config(decoder=True) is not model.config:
        raise ValueError(
            f"{type(model).__name__} is no decoder of text that keeps its layers in a list `layers`, of which a part "
            "can be run: use another drafter"
        )
    return layers


def with_layers(model: PreTrainedModel, layers: Sequence[nn.Module], like: Sequence[int]) -> PreTrainedModel:
    """The same causal language model with other layers, which it numbers from 0 in its cache if they are `numbered`.

    Args:
        like: of each layer, the layer of the model whose kind of attention it has.

    Raises:
        ValueError: the configuration does not say of each layer what it is.
    """
    # Hooks that tell hidden states go with the layers; made twice, they would tell each twice.
    maybe_install_capturing_hooks(model.base_model)
    for layer, i in zip(layers, like, strict=True):
        if not layer._forward_hooks:
            layer._forward_hooks.update(layers_of(model)[i]._forward_hooks)
    made, base = copied(model), copied(model.base_model)
    base.layers = nn.ModuleList(layers)
    config = copy.deepcopy(model.config)
    kinds = getattr(config, "layer_types", None)
    try:
        config.num_hidden_layers = len(layers)
        if kinds:
            config.layer_types = [kinds[i] for i in like]
    except AttributeError as error:  # derived from something else
        raise ValueError(f"the configuration of {type(model).__name__} cannot be that of a part: {error}") from error
    made.config = base.config = config
    setattr(made, model.base_model_prefix, base)
    return made


def first_layers_of(model: PreTrainedModel, count: int) -> PreTrainedModel | None:
    """A model's decoder with its first layers alone, which gives what they give; None if its norm is not known."""
    layers = list(layers_of(model)[:count])
    base: PreTrainedModel = with_layers(model, layers, range(count)).base_model
    norm = next((name for name in NORMS if isinstance(getattr(base, name, None), nn.Module)), None)
    if norm is None:
        return None
    setattr(base, norm, nn.Identity())
    return base


def numbered(layer: Module, index: int) -> Module:
    """The same layer, with the same weights, at another place of a cache."""
    made = copied(layer)
    if hasattr(made, "layer_idx"):
        made.layer_idx = index  # type: ignore[assignment]
    for name, child in made.named_children():
        setattr(made, name, numbered(child, index))
    return made


def copied(module: Module) -> Module:
    """A module that may be given other parts than the first; weights and parts are shared."""
    made = copy.copy(module)
    vars(made)["_modules"] = dict(module._modules)
    return made


def new_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """A layer like one of the model's, with that one's weights, in float32.

    Args:
        index: of the layer; -1 is the last.

    Raises:
        ValueError: such layers are not made from a configuration and a number, or are not plain.
    """
    layers = layers_of(model)
    like = layers[index]
    kind: Any = type(like)
    try:
        made: nn.Module = kind(model.config, layer_idx=index % len(layers)).float()
        made.load_state_dict(like.state_dict())
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"a layer of {type(model).__name__} cannot be made again: {error}") from error
    return made.to(next(like.parameters()).device).eval()


@torch.inference_mode()
def reads_alike(model: PreTrainedModel, part: PreTrainedModel, layers: int) -> bool:
    """Whether a few tokens have the same hidden states after the first `layers` layers of a model and of its part."""
    tokens = some_tokens(model)
    found = [
        one(tokens, use_cache=False, output_hidden_states=hidden_states_at([layers])).hidden_states
        for one in (model, part)
    ]
    return alike(*(states[layers] for states in found))


def some_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids to try a part with, int64 [1, TRIED]."""
    weight = model.get_input_embeddings().weight
    return torch.arange(TRIED, device=weight.device)[None] * 7 % len(weight)


def alike(wanted: Tensor, found: Tensor) -> bool:
    """Whether two results of one computation differ by rounding alone."""
    allowed = 4 * torch.finfo(wanted.dtype).eps ** 0.5 * wanted.float().std()
    return bool((wanted.float() - found.float()).abs().max() <= allowed)
