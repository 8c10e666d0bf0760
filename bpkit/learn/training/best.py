"""Keeps the weights with the most validation tokens per second, and ends training when more no longer come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch

from bpkit.files import write_at_once
from bpkit.learn.training.policy_module import PolicyModule
from bpkit.progress import Progress

RATE = "val_tokens_per_second"


class BestByReplay(L.Callback):
    """Early stopping on tokens/s rather than loss: a forecast may go on improving where it changes no decision.

    Its state is in every checkpoint, so that a run that was interrupted stops, and ends, where it would have.

    Attributes:
        file: of the best weights so far.
        epochs: figures of each epoch: `epoch`, `train_loss`, and of epochs with a validation `val_loss` and
            `val_tokens_per_second`.
        best: epoch and tokens/s of the best weights; of equal ones the earlier.
    """

    def __init__(self, folder: Path, *, patience: int, epochs: int, progress: Progress) -> None:
        self.file, self.patience, self.total, self.progress = folder / "best.safetensors", patience, epochs, progress
        self.epochs: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.waited = 0

    @property
    def stopped_early(self) -> bool:
        return self.waited >= self.patience

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch_is_over(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        validated = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0
        names = ("train_loss", "val_loss") if validated else ("train_loss",)
        figures = {"epoch": trainer.current_epoch, **{name: metrics[name] for name in names if name in metrics}}
        if validated and pl_module.rate is not None:
            figures[RATE] = pl_module.rate
        self.epochs.append(figures)
        if RATE in figures:
            self._compare(trainer, pl_module, figures)
        self._epoch_is_over(trainer)

    def _compare(self, trainer: L.Trainer, module: PolicyModule, figures: dict[str, float]) -> None:
        if self.best and figures[RATE] <= self.best[RATE]:
            self.waited += 1
            return
        self.waited = 0
        self.best = {"epoch": figures["epoch"], RATE: figures[RATE]}
        if trainer.is_global_zero:
            weights = module.networks.state_dict()
            tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
            write_at_once(self.file, safetensors.torch.save(tensors))

    def restore(self, module: PolicyModule) -> None:
        """Put the best weights back."""
        module.networks.load_state_dict(safetensors.torch.load_file(self.file))

    def _epoch_is_over(self, trainer: L.Trainer) -> None:
        best = f", best {self.best[RATE]:.4g} tokens/s in epoch {self.best['epoch']:.0f}" if self.best else ""
        self.progress.start(f"training{best}", self.total)
        for _ in self.epochs:
            self.progress.tick()
        if self.stopped_early:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.best, self.waited = state_dict["epochs"], state_dict["best"], state_dict["waited"]
