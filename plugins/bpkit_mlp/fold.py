"""Folds BlockPilot's first layer into the target's head: the same decisions from the hidden state.

Raw logits are `W h + c`, linear in the final hidden state h, and the first layer is linear in the logits. Their product
is a layer on h: 150 000 inputs become a few thousand, and the weights shrink alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpkit.learn.networks import Standard
from bpkit.policy import PolicyError
from bpkit_mlp.networks import ResidualMLP

COLUMNS_AT_ONCE = 8192
"""Tokens of the vocabulary whose weights are held in float64 at the same time."""

BENT = ("final_logit_softcapping", "logit_softcapping", "output_softcapping")
"""Settings of a target that put tanh behind its head."""
SCALED = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Settings of a target that multiply what its head gives; the head alone does not know them."""


def folded_mlp(mlp: ResidualMLP, normalisation: nn.Module, lm_head: nn.Linear) -> ResidualMLP:
    """What `mlp(normalisation(lm_head(hidden)))` gives, from hidden states: multiplied in float64, kept in float32."""
    weight, bias = folded_layer(mlp.layers[0], normalisation, lm_head)
    width, outputs = mlp.output.in_features, mlp.output.out_features
    with torch.random.fork_rng(devices=[]):
        made = ResidualMLP(weight.shape[1], width, outputs, depth=len(mlp.layers), dropout=mlp.dropout)
    made.load_state_dict({**mlp.state_dict(), "layers.0.weight": weight.float(), "layers.0.bias": bias.float()})
    return made


def folded_layer(layer: nn.Module, normalisation: nn.Module, lm_head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight [width, hidden] and bias [width] of the layer on hidden states, float64.

    With logits W h + c and x = (logits - m) / s, V x + b = (V/s W) h + (V/s (c - m) + b).
    """
    assert isinstance(layer, nn.Linear)
    head, first = lm_head.weight.detach(), layer.weight.detach()
    device = first.device
    offset = torch.zeros(head.shape[0], dtype=torch.float64, device=device)
    if lm_head.bias is not None:
        offset += lm_head.bias.detach().to(device)
    scale = torch.ones_like(offset)
    if isinstance(normalisation, Standard):
        offset -= normalisation.mean.to(device)
        scale = normalisation.scale.to(device).double()
    weight = torch.zeros(first.shape[0], head.shape[1], dtype=torch.float64, device=device)
    bias = layer.bias.detach().double()
    for start in range(0, head.shape[0], COLUMNS_AT_ONCE):
        tokens = slice(start, start + COLUMNS_AT_ONCE)
        part = first[:, tokens].double() / scale[tokens]
        weight += part @ head[tokens].to(device).double()
        bias = bias + part @ offset[tokens]
    return weight, bias


def refuse_what_is_not_affine(
    normalise: str, inputs: int, lm_head: nn.Module, config: Any, processors: Sequence[object]
) -> None:
    """Raise PolicyError unless the first layer's `inputs` logits are an affine function of the hidden state."""
    if normalise not in ("none", "standard"):
        raise PolicyError(
            f"normalise={normalise!r} is not affine: it depends on all logits of a prompt at once, which "
            "no layer on the hidden state can do. Train with normalise=none or normalise=standard to fold"
        )
    if processors:
        names = ", ".join(type(processor).__name__ for processor in processors)
        raise PolicyError(f"logits processors stand between head and policy ({names}): only raw logits fold")
    hooked = any(getattr(lm_head, name, None) for name in ("_forward_hooks", "_forward_pre_hooks", "parametrizations"))
    if type(lm_head) is not nn.Linear or hooked:
        kind = "a head with hooks or parametrizations" if hooked else f"a {type(lm_head).__name__}"
        raise PolicyError(f"only a plain torch.nn.Linear head folds, this is {kind}")
    if lm_head.out_features != inputs:
        raise PolicyError(f"the head has {lm_head.out_features} outputs, but the policy reads {inputs} logits")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in BENT:
        if getattr(text, name, None):
            raise PolicyError(f"the target soft-caps its logits ({name}={getattr(text, name)}): tanh does not fold")
    for name in SCALED:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise PolicyError(
                f"the target scales its logits ({name}={getattr(text, name)}): its head alone does not give what the "
                "policy was trained on. Hand over a linear layer that has the factor in its weights, without `config`"
            )
