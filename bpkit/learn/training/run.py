"""One Lightning run: devices, precision, checkpoints, resumption, logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from bpkit.learn.training.budget import BudgetedModule
from bpkit.learn.training.fit import quiet
from bpkit.learn.training.provenance import write_provenance

HELD_OUT = 64
"""Examples that are validated on: the first ones."""


@dataclass(frozen=True)
class RunOptions:
    """What every recipe takes.

    Attributes:
        max_steps, max_minutes: the budget; whichever is spent first ends the run, annealed.
        devices, accelerator, strategy: passed to `lightning.Trainer`.
        compile: run the loss through `torch.compile`, worth its start-up time on runs over a few minutes.
        resume: continue from `out/checkpoints/last.ckpt` when it is there.
    """

    max_steps: int = 1_000_000
    max_minutes: float = 30.0
    devices: int = 1
    accelerator: str = "auto"
    strategy: str = "auto"
    compile: bool = False
    resume: bool = True
    seed: int = 0


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 autocast, which both GPUs and recent CPUs run faster than float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def run_recipe(
    recipe: str,
    model: PreTrainedModel,
    loss: nn.Module,
    columns: tuple[Tensor, ...],
    out: Path,
    *,
    batch_size: int,
    options: RunOptions,
    arguments: Mapping[str, Any],
    fingerprints: dict[str, str],
) -> None:
    """Train `model` by `loss`, and write it to the folder `out` in bfloat16, with what made it.

    Args:
        recipe: name of the function that was called, for the record. arguments: what it was called with beside
            `options` and `batch_size`. fingerprints: of its texts.
        columns: the loss's arguments, examples first in each.
    """
    module = BudgetedModule(
        loss, max_steps=options.max_steps, max_minutes=options.max_minutes, muon_lr=6e-3, adamw_lr=2e-3
    )
    held_out, training = tuple(c[:HELD_OUT] for c in columns), tuple(c[HELD_OUT:] for c in columns)
    if fit(module, training, held_out, out=out, batch_size=batch_size, options=options):
        model.to(torch.bfloat16).save_pretrained(out)
        write_provenance(out, recipe, {**asdict(options), **arguments, "batch_size": batch_size}, fingerprints)


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


def fit(
    module: BudgetedModule,
    training: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    *,
    out: Path,
    batch_size: int,
    options: RunOptions,
) -> bool:
    """Train `module`, keeping `out/checkpoints/last.ckpt` fresh, and resume from it when asked to.

    Returns:
        True on the one process that should write the result.

    Raises:
        KeyboardInterrupt: the user wants no more; the same call goes on later.
    """
    if options.compile:
        module.loss_module.compile(dynamic=False)
    last = out / "checkpoints" / "last.ckpt"
    with quiet(), _threads_for(options.devices):
        trainer = L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy=options.strategy if options.devices > 1 else "auto",
            max_epochs=-1,
            val_check_interval=250,
            check_val_every_n_epoch=None,
            log_every_n_steps=10,
            logger=CSVLogger(out, name="logs"),
            callbacks=[ModelCheckpoint(out / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=100)],
            enable_model_summary=False,
            enable_progress_bar=_shows_bars(),
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(
                module,
                _loader(training, batch_size, shuffle=True),
                _loader(held_out, batch_size, shuffle=False),
                ckpt_path=str(last) if options.resume and last.exists() else None,
            )
        except SystemExit:  # what Lightning makes of Ctrl+C
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
    return bool(trainer.is_global_zero)


def _loader(tensors: tuple[Tensor, ...], batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=shuffle, drop_last=True)
