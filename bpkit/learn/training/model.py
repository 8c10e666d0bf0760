"""The training of a model to a budget of steps or minutes, whichever ends first. It is written to a folder.

The learning rate follows the share of the budget that is spent: a short warm-up, a plateau, then a linear decay to zero
over the second half. So a run that is given twenty minutes ends annealed after twenty minutes, whatever the machine did
meanwhile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from bpkit.draft.own_layers import own_weights
from bpkit.installation.machine import available_cores
from bpkit.learn.training.fit import FitOptions, fit
from bpkit.learn.training.provenance import fingerprint, write_provenance

HELD_OUT = 64
"""Examples that are validated on: the first ones."""
MUON_RATE, ADAMW_RATE = 6e-3, 2e-3
"""Learning rates at their peaks."""
WARMUP, DECAY_FROM = 0.03, 0.5


@dataclass(frozen=True, kw_only=True)
class ModelRun(FitOptions):
    """How to train a model.

    Attributes:
        max_steps, max_minutes: the budget; whichever is spent first ends the run, annealed.
        batch_size: examples a step on each device.
        rate: factor on the peaks of the learning rates; under 1 for a model that was trained before.
        keep_start: share of the result that is what the weights were at the start; the rest is what they were trained
            to. A mean of the two often generalises better than either (WiSE-FT, Wortsman et al. 2022, 2109.01903).
        compile: run the loss through `torch.compile`, worth its start-up time on runs over a few minutes.
    """

    max_steps: int = 1_000_000
    max_minutes: float = 30.0
    batch_size: int = 8
    rate: float = 1.0
    keep_start: float = 0.0
    compile: bool = False
    seed: int = 0


def learning_rate_factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1] through the budget."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)))


class BudgetedModule(L.LightningModule):
    """Trains `loss_module(*batch) -> loss` with Muon on matrices and AdamW on everything else.

    Muon is Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, as in `torch.optim.Muon`.
    """

    def __init__(self, loss_module: nn.Module, run: ModelRun) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss_module, self.run = loss_module, run
        self.seconds_before, self.started = 0.0, time.monotonic()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        named = [(n, p) for n, p in self.loss_module.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        others = [p for n, p in named if not any(p is m for m in matrices)]
        return [
            torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def on_train_start(self) -> None:
        self.started = time.monotonic()
        self.loss_module.train()

    def seconds(self) -> float:
        """Spent so far, those before an interruption included."""
        return self.seconds_before + time.monotonic() - self.started

    def progress(self) -> float:
        """Share of the budget that is spent, the same on every rank."""
        steps = self.global_step / 2  # Lightning counts the steps of both optimizers
        share = max(steps / self.run.max_steps, self.seconds() / (60 * self.run.max_minutes))
        return float(self.trainer.strategy.reduce(torch.tensor(share), reduce_op="mean"))

    def training_step(self, batch: Iterable[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = self.loss_module(*batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.loss_module.parameters(), 1.0)
        progress = self.progress()
        for optimizer, peak in zip(optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.run.rate * learning_rate_factor(progress)
            optimizer.step()
        self.log_dict({"train/loss": loss.detach(), "budget": progress}, prog_bar=True)
        if progress >= 1.0:
            self.trainer.should_stop = True

    def validation_step(self, batch: Iterable[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss_module(*batch), prog_bar=True, sync_dist=True)
        agreement = getattr(self.loss_module, "agreement", None)
        if agreement is not None:
            self.log("val/agreement", agreement(*batch), prog_bar=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds_before = checkpoint["seconds"]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 autocast, which both GPUs and recent CPUs run faster than float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def train_model(
    recipe: str,
    model: nn.Module,
    loss: nn.Module,
    columns: tuple[Tensor, ...],
    out: Path,
    run: ModelRun,
    *,
    texts: Mapping[str, Iterable[str]],
    save: Callable[[Path], None] | None = None,
    **arguments: Any,
) -> None:
    """Train `model` by `loss`, and write it to the folder `out` in bfloat16, with what made it.

    Args:
        save: writes it, where it is not a model of transformers.
        recipe, arguments, texts: function that was called, with what beside `run`, and on what, for the record.
        columns: the loss's arguments, examples first in each.
    """
    start = [value.detach().clone() for value in model.parameters()] if run.keep_start else []
    if run.compile:
        loss.compile(dynamic=False)
    data = [
        DataLoader(TensorDataset(*part), batch_size=run.batch_size, shuffle=shuffle, drop_last=True)
        for part, shuffle in (([c[HELD_OUT:] for c in columns], True), ([c[:HELD_OUT] for c in columns], False))
    ]
    # Lightning's progress bar goes to stdout.
    bars = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    with _threads_for(run.devices):
        is_first = fit(
            BudgetedModule(loss, run),
            data,
            out,
            run,
            max_epochs=-1,
            val_check_interval=250,
            check_val_every_n_epoch=None,
            log_every_n_steps=10,
            logger=CSVLogger(out, name="logs"),
            callbacks=[ModelCheckpoint(out / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=100)],
            enable_progress_bar=bars,
        )
    if is_first:
        with torch.no_grad():
            for value, before in zip(model.parameters(), start, strict=False):
                value.lerp_(before.to(value), run.keep_start)
        if save is not None:
            save(out)
        else:
            whole = cast("PreTrainedModel", model).to(torch.bfloat16)
            whole.save_pretrained(out, state_dict=own_weights(whole))
        data_of = {name: fingerprint(of_kind) for name, of_kind in texts.items()}
        write_provenance(out, recipe, {**asdict(run), **arguments}, data_of)


@contextmanager
def _threads_for(devices: int) -> Iterator[None]:
    """On CPUs: several ranks of one thread each beat one rank of several threads on small models and busy machines."""
    usual = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, available_cores() // devices))
    try:
        yield
    finally:
        torch.set_num_threads(usual)
