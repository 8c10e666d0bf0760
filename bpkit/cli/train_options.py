"""Options that the trainings of policies and of models share, and how they become a run."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bpkit.cli.terminal import say

of_run = partial(typer.Option, rich_help_panel="How to run")
_budget = partial(typer.Option, rich_help_panel="Budget")

Out = Annotated[Path, typer.Option(help="Folder for the result, its checkpoints and logs.", metavar="FOLDER")]
Devices = Annotated[int, of_run(help="Processes: GPUs, or on a CPU one for each core or two.", min=1)]
Accelerator = Annotated[str, of_run(help="`auto`, `cpu` or `gpu`.")]
Strategy = Annotated[str, of_run(help="Of Lightning, with more than one device, such as `ddp`.")]
Resume = Annotated[bool, of_run(help="Go on from the last checkpoint in the folder.")]


def model_run(
    minutes: Annotated[float, _budget(help="Training time; the learning rate ends at zero then.", min=0.01)] = 30.0,
    steps: Annotated[
        int | None, _budget(help="Optimizer steps at most, if fewer than the minutes allow.", min=1)
    ] = None,
    devices: Devices = 1,
    accelerator: Accelerator = "auto",
    strategy: Strategy = "auto",
    compile: Annotated[bool, of_run(help="Run through torch.compile; pays off after a few minutes.")] = False,
    resume: Resume = True,
    seed: Annotated[int, of_run(help="Of data and initial weights.")] = 0,
) -> dict[str, Any]:
    """How a model is trained, for `ModelRun`, which needs Lightning: a group for `bpkit.cli.options.takes`."""
    how = {"devices": devices, "accelerator": accelerator, "strategy": strategy, "compile": compile}
    budget = {"max_minutes": minutes, **({"max_steps": steps} if steps is not None else {})}
    return {**budget, **how, "resume": resume, "seed": seed}


def say_written(out: Path, following: str) -> None:
    """Say what came of it, once, and what to do with it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning starts further processes by the same command
        say(f"wrote {out}")
        say(f"Next: {following}")
