"""An autoregressive drafter for any target: a few of the target's own layers, distilled on its answers.

The drafter starts as the target's embedding, its first layers, its final norm and its head, and learns to give the
target's distribution after every token of the target's own answers: forward KL on data of the target, as in DistillSpec
(Zhou et al. 2023, 2310.08461).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.own_layers import leave_out_embeddings, shares_embeddings
from bpkit.learn.training.answers import DrafterRun, learned_from, load_target, target_answers
from bpkit.learn.training.model import autocast, train_model


class DistillationLoss(nn.Module):
    """Mean KL(target || drafter) of the next token over a batch of sequences, in nats."""

    def __init__(self, drafter: PreTrainedModel, target: PreTrainedModel) -> None:
        super().__init__()
        self.drafter = drafter
        self._frozen = (target.eval().requires_grad_(False),)  # in a tuple, to stay out of checkpoints and DDP

    def forward(self, ids: Tensor, prompt_length: Tensor, length: Tensor) -> Tensor:
        """ids: int64 [batch, time], right-padded; prompt_length, length: int64 [batch]. Returns a scalar."""
        target = self._frozen[0].to(ids.device)
        with autocast(ids.device):
            with torch.no_grad():
                wanted = target(ids, use_cache=False).logits
            given = self.drafter(ids, use_cache=False).logits
        real = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
        each = F.kl_div(
            given.float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="none", log_target=True
        )
        mean: Tensor = (each.sum(-1) * real).sum() / real.sum()
        return mean


def first_layers(target: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of a causal language model that keeps its first `layers` transformer layers, in float32.

    Raises:
        ValueError: the target has fewer layers, or does not keep them in `model.layers`.
    """
    body = getattr(target, "model", None)
    depth = target.config.get_text_config().num_hidden_layers
    if not isinstance(getattr(body, "layers", None), nn.ModuleList) or not 1 <= layers < depth:
        raise ValueError(
            f"an autoregressive drafter is cut from a target that keeps its {depth} layers in `model.layers`, and has "
            f"fewer of them; {type(target).__name__} with {layers} layers cannot be cut so"
        )
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    drafter = type(target)(config)
    kept = drafter.state_dict()
    drafter.load_state_dict({name: value for name, value in target.state_dict().items() if name in kept})
    return drafter.float()


def train_assistant(target_path: str, out: Path, *, prompts: list[str], run: DrafterRun) -> None:
    """Let the target answer prompts, train an autoregressive drafter on the answers and write it to the folder `out`.

    Embedding and head stay the target's, so they are neither trained nor written (`bpkit.draft.own_layers`), unless it
    goes on from a drafter that has its own.

    Raises:
        ValueError: the target cannot be cut (`first_layers`), or there is a drafter to start from that does not fit.
    """
    tokenizer, target = load_target(target_path, run)
    drafter = first_layers(target, run.layers) if run.start_from is None else _earlier(run.start_from, target)
    if run.start_from is None or shares_embeddings(drafter):
        leave_out_embeddings(drafter)
    answers = target_answers(target, tokenizer, prompts, out, run)
    loss, texts = DistillationLoss(drafter, target), learned_from(prompts, run)
    layers = drafter.config.get_text_config().num_hidden_layers
    train_model("train_assistant", drafter, loss, answers, out, run, texts=texts, layers=layers)


def _earlier(path: Path, target: PreTrainedModel) -> PreTrainedModel:
    """A drafter that was trained before, in float32. Raises ValueError if it does not fit."""
    # A copy: embedding and head may be the target's own.
    return copy.deepcopy(AutoregressiveDrafter.load(str(path), target).model).float()
