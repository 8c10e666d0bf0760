"""The training of a model, which is written to a folder: budget, precision, checkpoints, logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from bpkit.learn.training.budget import BudgetedModule
from bpkit.learn.training.fit import FitOptions, fit
from bpkit.learn.training.provenance import write_provenance

HELD_OUT = 64
"""Examples that are validated on: the first ones."""


@dataclass(frozen=True, kw_only=True)
class ModelRun(FitOptions):
    """How to train a model.

    Attributes:
        max_steps, max_minutes: the budget; whichever is spent first ends the run, annealed.
        batch_size: examples a step on each device.
        compile: run the loss through `torch.compile`, worth its start-up time on runs over a few minutes.
    """

    max_steps: int = 1_000_000
    max_minutes: float = 30.0
    batch_size: int = 8
    compile: bool = False
    seed: int = 0


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 autocast, which both GPUs and recent CPUs run faster than float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def train_model(
    recipe: str,
    model: PreTrainedModel,
    loss: nn.Module,
    columns: tuple[Tensor, ...],
    out: Path,
    run: ModelRun,
    *,
    fingerprints: Mapping[str, str],
    **arguments: Any,
) -> None:
    """Train `model` by `loss`, and write it to the folder `out` in bfloat16, with what made it.

    Args:
        recipe: name of the function that was called, for the record. arguments: what it was called with beside `run`.
            fingerprints: of its texts.
        columns: the loss's arguments, examples first in each.
    """
    module = BudgetedModule(loss, max_steps=run.max_steps, max_minutes=run.max_minutes, muon_lr=6e-3, adamw_lr=2e-3)
    if run.compile:
        loss.compile(dynamic=False)
    data = [
        DataLoader(TensorDataset(*part), batch_size=run.batch_size, shuffle=shuffle, drop_last=True)
        for part, shuffle in (([c[HELD_OUT:] for c in columns], True), ([c[:HELD_OUT] for c in columns], False))
    ]
    with _threads_for(run.devices):
        is_first = fit(
            module,
            data,
            out,
            run,
            max_epochs=-1,
            val_check_interval=250,
            check_val_every_n_epoch=None,
            log_every_n_steps=10,
            logger=CSVLogger(out, name="logs"),
            callbacks=[ModelCheckpoint(out / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=100)],
            enable_progress_bar=_shows_bars(),
        )
    if is_first:
        model.to(torch.bfloat16).save_pretrained(out)
        write_provenance(out, recipe, {**asdict(run), **arguments}, fingerprints)


def _shows_bars() -> bool:
    """Whether Lightning's progress bar, which goes to stdout, can be moved there."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def _threads_for(devices: int) -> Iterator[None]:
    """On CPUs: several ranks of one thread each beat one rank of several threads on small models and busy machines."""
    usual = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // devices))
    try:
        yield
    finally:
        torch.set_num_threads(usual)
