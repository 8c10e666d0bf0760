"""Autoregressive drafters that keep their own layers only: embedding and head are the target's.

In a small drafter these are most of the weights: 28 of 42 million of one with 4 layers of width 576 and a vocabulary of
49,152. Left out of its file and shared in memory they cost nothing. `target_embeddings` in its config.json says so.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from bpkit.decode.pretrained import load_causal_lm

FLAG = "target_embeddings"


def leave_out_embeddings(model: PreTrainedModel) -> None:
    """Freeze embedding and head, which are the target's, and leave them out of what is saved (`own_weights`)."""
    setattr(model.config, FLAG, True)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(False)


def shares_embeddings(model: PreTrainedModel) -> bool:
    """Whether its configuration says that embedding and head are the target's."""
    return bool(getattr(model.config, FLAG, False))


def own_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights to save: all, or of a drafter that leaves out its embeddings the others."""
    left_out = _left_out(model)
    return {name: value for name, value in model.state_dict().items() if name not in left_out}


def load_own_layers(path: str, target: PreTrainedModel) -> PreTrainedModel:
    """Load an autoregressive drafter, with the target's embedding and head where it has none.

    Raises:
        ValueError: as `load_causal_lm`, or the target's embedding has another size.
    """
    model = load_causal_lm(path, may_lack=_left_out, dtype=target.dtype)
    if shares_embeddings(model):
        ours, theirs = model.get_input_embeddings(), target.get_input_embeddings()
        if ours.weight.shape != theirs.weight.shape:
            raise ValueError(
                f"drafter {path} shares the embedding of its target, {tuple(ours.weight.shape)}, and this target's is "
                f"{tuple(theirs.weight.shape)}: name the target that it was trained for"
            )
        model.set_input_embeddings(theirs)
        model.set_output_embeddings(target.get_output_embeddings())
    return model


def _left_out(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the weights of embedding and head, if the model's configuration says that they are the target's."""
    if not shares_embeddings(model):
        return ()
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(f"{name}.weight" for name, module in model.named_modules() if any(module is part for part in parts))
