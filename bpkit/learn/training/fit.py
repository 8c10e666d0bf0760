"""A run of Lightning: devices, checkpoints, resumption."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to run, as opposed to what to train.

    Attributes:
        devices, accelerator, strategy: passed to `lightning.Trainer`; a strategy only with more than one device.
        resume: go on from `checkpoints/last.ckpt` if there is one.
    """

    devices: int = 1
    accelerator: str = "auto"
    strategy: str = "auto"
    resume: bool = True


def first_process() -> bool:
    """Whether this is the process that the user started; Lightning starts others for further devices."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def fit(module: L.LightningModule, data: Sequence[Any], out: Path, how: FitOptions, **options: Any) -> bool:
    """Train `module`, going on from `out/checkpoints/last.ckpt` where asked to.

    Args:
        data: what `Trainer.fit` takes after the module. options: of `Trainer`; its callbacks write the checkpoint.

    Returns:
        True on the one process that should write the result.

    Raises:
        KeyboardInterrupt: the user wants no more; the same call goes on later.
    """
    last = out / "checkpoints" / "last.ckpt"
    with ExitStack() as restore, warnings.catch_warnings():
        # Without Lightning's remarks on hardware and its advice; warnings of others are left alone.
        for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="lightning")
        trainer = L.Trainer(
            accelerator=how.accelerator,
            devices=how.devices,
            strategy=how.strategy if how.devices > 1 else "auto",
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        try:
            trainer.fit(module, *data, ckpt_path=str(last) if how.resume and last.is_file() else None)
        except SystemExit:  # what Lightning makes of Ctrl+C
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
    return bool(trainer.is_global_zero)
