"""Options that the trainings of policies and of models share, and how they become a run."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from bpkit.cli.terminal import say

if TYPE_CHECKING:
    from bpkit.learn.training.model import ModelRun

Run = TypeVar("Run", bound="ModelRun")
RUN, _BUDGET = "How to run", "Budget"

Out = Annotated[Path, typer.Option(help="Folder for the result, its checkpoints and logs.", metavar="FOLDER")]
Devices = Annotated[
    int, typer.Option(help="Processes: GPUs, or on a CPU one for each core or two.", min=1, rich_help_panel=RUN)
]
Accelerator = Annotated[str, typer.Option(help="`auto`, `cpu` or `gpu`.", rich_help_panel=RUN)]
Strategy = Annotated[
    str, typer.Option(help="Of Lightning, with more than one device, such as `ddp`.", rich_help_panel=RUN)
]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in the folder.", rich_help_panel=RUN)]

# Of models alone; `model_run` reads all but the folder from the context.

Minutes = Annotated[
    float, typer.Option(help="Training time; the learning rate ends at zero then.", min=0.01, rich_help_panel=_BUDGET)
]
Steps = Annotated[
    int | None,
    typer.Option(help="Optimizer steps at most, if fewer than the minutes allow.", min=1, rich_help_panel=_BUDGET),
]
Compile = Annotated[
    bool, typer.Option(help="Run through torch.compile; pays off after a few minutes.", rich_help_panel=RUN)
]
Seed = Annotated[int, typer.Option(help="Of data and initial weights.", rich_help_panel=RUN)]


def model_run(context: typer.Context, kind: type[Run]) -> Run:
    """How a model is trained, as the options of the command say it."""
    given = dict(context.params)
    given |= {"max_minutes": given["minutes"], "max_steps": given["steps"] or kind.max_steps}
    return kind(**{field.name: given[field.name] for field in fields(kind)})


def say_written(out: Path, following: str) -> None:
    """Say what came of it, once, and what to do with it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning starts further processes by the same command
        say(f"wrote {out}")
        say(f"Next: {following}")
