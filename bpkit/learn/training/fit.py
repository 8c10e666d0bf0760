"""One Lightning run of a policy: checkpoints, resumption, logs, determinism."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from bpkit.installation.distribution import install_command
from bpkit.learn.training.best import BestByReplay
from bpkit.learn.training.example_data import ExampleData
from bpkit.learn.training.policy_module import PolicyModule

if TYPE_CHECKING:
    from bpkit.learn.training.policies import PolicyRun


def first_process() -> bool:
    """Whether this is the process that the user started; Lightning starts others for further devices."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def fit(module: PolicyModule, data: ExampleData, best: BestByReplay, out: Path, how: PolicyRun) -> bool:
    """Train `module`, and keep `out/checkpoints/last.ckpt` and the best weights fresh after every epoch.

    Returns:
        True on the one process that should write the result.

    Raises:
        KeyboardInterrupt: the user wants no more; the same call goes on later.
        ValueError: the logger is not installed.
    """
    last = out / "checkpoints" / "last.ckpt"
    with quiet(), _deterministic():
        trainer = L.Trainer(
            accelerator=how.accelerator,
            devices=how.devices,
            strategy=how.strategy,
            max_epochs=module.options.epochs,
            check_val_every_n_epoch=min(module.options.validate_every, module.options.epochs),
            gradient_clip_val=module.options.clip,
            deterministic="warn",
            inference_mode=False,  # what a validation makes, the policy, is used later
            use_distributed_sampler=False,
            logger=_logger(how, out),
            callbacks=[best, _last_checkpoint(out / "checkpoints")],
            log_every_n_steps=50,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=str(last) if how.resume and last.is_file() else None)
        except SystemExit:  # what Lightning makes of Ctrl+C
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
    return bool(trainer.is_global_zero)


def _last_checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder,
        filename="last",
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _logger(how: PolicyRun, out: Path) -> Logger:
    if how.logger == "csv":
        return CSVLogger(out, name="logs")
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            f"logger 'tensorboard' needs tensorboard, which is not installed: {install_command('tensorboard')}"
        )
    return TensorBoardLogger(out, name="logs")


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware and its advice; warnings of others are left alone."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Lightning sets it for the whole process; set it back."""
    before: tuple[Any, ...] = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
