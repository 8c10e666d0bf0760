"""A Lightning module that trains to a budget of steps or minutes, whichever ends first.

The learning rate follows the share of the budget that is spent: a short warm-up, a plateau, then a linear
decay to zero over the second half. So a run that is given twenty minutes ends annealed after twenty minutes,
whatever the machine did meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

WARMUP, DECAY_FROM = 0.03, 0.5


def learning_rate_factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1] through the budget."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)))


class BudgetedModule(L.LightningModule):
    """Trains `loss_module(*batch) -> loss` with Muon on matrices and AdamW on everything else.

    Muon is Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, as in `torch.optim.Muon`.

    Args:
        loss_module: maps a batch to a scalar loss.
        max_steps, max_minutes: the budget; whichever is spent first ends the run.
        muon_lr, adamw_lr: peak learning rates.
    """

    def __init__(
        self, loss_module: nn.Module, *, max_steps: int, max_minutes: float, muon_lr: float, adamw_lr: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss_module = loss_module
        self.max_steps, self.max_minutes = max_steps, max_minutes
        self.peak_lrs = (muon_lr, adamw_lr)
        self.seconds_before, self.started = 0.0, time.monotonic()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        named = [(n, p) for n, p in self.loss_module.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        others = [p for n, p in named if not any(p is m for m in matrices)]
        return [
            torch.optim.Muon(matrices, lr=self.peak_lrs[0], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.peak_lrs[1], betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def on_train_start(self) -> None:
        self.started = time.monotonic()
        self.loss_module.train()

    def progress(self) -> float:
        """Share of the budget that is spent, the same on every rank."""
        seconds = self.seconds_before + time.monotonic() - self.started
        steps = self.global_step / 2  # Lightning counts the steps of both optimizers
        share = max(steps / self.max_steps, seconds / (60 * self.max_minutes))
        return float(self.trainer.strategy.reduce(torch.tensor(share), reduce_op="mean"))

    def training_step(self, batch: Iterable[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = self.loss_module(*batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.loss_module.parameters(), 1.0)
        progress = self.progress()
        for optimizer, peak in zip(optimizers, self.peak_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate_factor(progress)
            optimizer.step()
        self.log_dict({"train/loss": loss.detach(), "budget": progress}, prog_bar=True)
        if progress >= 1.0:
            self.trainer.should_stop = True

    def validation_step(self, batch: Iterable[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss_module(*batch), prog_bar=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds_before + time.monotonic() - self.started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds_before = checkpoint["seconds"]
