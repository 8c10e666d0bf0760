"""An early exit for any target: one layer after its first ones, distilled on its own answers.

The layer begins as the target's last one, from which norm and head are used to read. It learns to give, through these,
the target's distribution after every token of the target's own answers: forward KL, as in
`bpkit.learn.training.assistant`. Of EESD (Liu et al. 2024, 2406.03853) the idea is taken: its layer, loss and settings
were not at hand, and may be others.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bpkit.decode.parts import layers_of, new_layer
from bpkit.draft.early_exit import EarlyExitDrafter, exit_model, refuse_unfit_layer, save_exit
from bpkit.learn.training.answers import DrafterRun, learned_from, load_target, target_answers
from bpkit.learn.training.model import autocast, train_model


class ExitLoss(nn.Module):
    """Mean KL(target || exit) of the next token over a batch of sequences, in nats."""

    def __init__(self, exit: nn.Module, target: PreTrainedModel, layer: int) -> None:
        super().__init__()
        self.exit = exit
        target = target.eval().requires_grad_(False)
        # In a tuple, to stay out of checkpoints and DDP; the exit itself is a part of this module.
        self._frozen = (target, exit_model(exit, target, layer))

    def forward(self, ids: Tensor, prompt_length: Tensor, length: Tensor) -> Tensor:
        """ids: int64 [batch, time], right-padded; prompt_length, length: int64 [batch]. Returns a scalar."""
        wanted, given = self._logits(ids)
        each = F.kl_div(
            given.float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="none", log_target=True
        )
        return _mean(each.sum(-1), length)

    @torch.no_grad()
    def agreement(self, ids: Tensor, prompt_length: Tensor, length: Tensor) -> Tensor:
        """Share of positions at which the likeliest next token is the target's: a first draft that is accepted."""
        wanted, given = self._logits(ids)
        return _mean((wanted.argmax(-1) == given.argmax(-1)).float(), length)

    def _logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of target and exit, [batch, time, vocab] each."""
        target, drafter = (model.to(ids.device) for model in self._frozen)
        with autocast(ids.device):
            with torch.no_grad():
                wanted = target(ids, use_cache=False).logits
            given = drafter(ids, use_cache=False).logits
        return wanted, given


def _mean(each: Tensor, length: Tensor) -> Tensor:
    """Over the positions [batch, time] that are no padding."""
    real = torch.arange(each.shape[1], device=each.device) < length[:, None]
    mean: Tensor = (each * real).sum() / real.sum()
    return mean


def train_exit(target_path: str, out: Path, *, prompts: list[str], run: DrafterRun, layer: int | None = None) -> None:
    """Let the target answer prompts, train an exit on the answers and write it to the folder `out`.

    Args:
        layer: how many of the target's layers are below the exit; by default a quarter.

    Raises:
        ValueError: the target's layers are not in a list, or there is an exit to start from that does not fit.
    """
    tokenizer, target = load_target(target_path, run)
    if run.start_from is not None:
        earlier = EarlyExitDrafter.load(str(run.start_from), target)
        exit, layer = earlier.exit.float(), earlier.layer
    else:
        layer = max(1, len(layers_of(target)) // 4) if layer is None else layer
        refuse_unfit_layer(target, layer)
        exit = new_layer(target, -1)
    answers = target_answers(target, tokenizer, prompts, out, run)
    train_model(
        "train_exit",
        exit,
        ExitLoss(exit, target, layer),
        answers,
        out,
        run,
        save=partial(save_exit, exit, target, layer),
        texts=learned_from(prompts, run),
        layer=layer,
    )
