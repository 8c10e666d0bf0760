"""`bpkit train target` and `bpkit train drafter`: the recipes of the shipped pair, for anyone to run again.

Any other name after `bpkit train` is a policy: `bpkit.cli.train_policy`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit.cli import train_policy
from bpkit.cli.command import Group, dressed
from bpkit.cli.errors import checkpoint_in, require, when_interrupted
from bpkit.cli.terminal import say
from bpkit.installation.distribution import install_command
from bpkit.learn.training.trainable import refuse_untrainable, trainable_entries
from bpkit.registry.class_file import names_file, split_file
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION

if TYPE_CHECKING:
    from bpkit.learn.training.run import RunOptions

HELP = f"""Train a policy, a target or a drafter.

Needs `{install_command("train")}`. A policy is trained on traces, `bpkit train POLICY TRACE --out FOLDER --cost COST`,
and used as `--policy FOLDER`. POLICY is one of those below, with options if you like (`name:key=value`), or a class of
yours, `./file.py:ClassName`. `bpkit train POLICY --help` lists the options.

`bpkit train forecast TRACE --out runs/forecast --cost cost.json`
"""


class TrainGroup(Group):
    """`target`, `drafter`, and every policy that can be trained as a command of its own."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *trainable_entries()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or policy_command(cmd_name, beside=super().list_commands(ctx))


def policy_command(spec: str, *, beside: Sequence[str] = ()) -> Any:
    """The command that trains a policy, named by its spec.

    Args:
        beside: what else can be trained.

    Raises:
        PolicyError: the policy cannot be trained.
    """
    name = split_file(spec)[0] if names_file(spec) else spec.partition(":")[0]
    refuse_untrainable(name, beside=beside)
    entry = trainable_entries().get(name)
    alone = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    doc = inspect.cleandoc(train_policy.train_policy.__doc__ or "")
    alone.command(
        spec, help=f"{entry.summary}\n\n{doc}" if entry else doc, short_help=entry.summary if entry else None
    )(train_policy.train_policy)
    return dressed(typer.main.get_command(alone))


app = typer.Typer(help=HELP, cls=TrainGroup, no_args_is_help=True)


class DrafterKind(StrEnum):
    """What `bpkit train drafter` can make, by the name of its kind in `bpkit drafters`."""

    BLOCK_DIFFUSION = BLOCK_DIFFUSION
    AUTOREGRESSIVE = AUTOREGRESSIVE


_BUDGET = "Budget and devices"
_Out = Annotated[Path, typer.Option(help="Folder for the result, its checkpoints and logs.", metavar="FOLDER")]
_Maths = Annotated[
    Path | None,
    typer.Option(
        help="JSONL with `question` and `answer` (the layout of GSM8K); without it that domain is left out.",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    ),
]
_Minutes = Annotated[
    float, typer.Option(help="Training time; the learning rate ends at zero then.", min=0.01, rich_help_panel=_BUDGET)
]
_Steps = Annotated[
    int | None,
    typer.Option(help="Optimizer steps at most, if fewer than the minutes allow.", min=1, rich_help_panel=_BUDGET),
]
_Devices = Annotated[
    int, typer.Option(help="Processes: GPUs, or on a CPU one for each core or two.", min=1, rich_help_panel=_BUDGET)
]
_Accelerator = Annotated[str, typer.Option(help="`auto`, `cpu` or `gpu`.", rich_help_panel=_BUDGET)]
_Strategy = Annotated[
    str, typer.Option(help="Of Lightning, with more than one device, such as `ddp`.", rich_help_panel=_BUDGET)
]
_Compile = Annotated[
    bool, typer.Option(help="Run through torch.compile; pays off after a few minutes.", rich_help_panel=_BUDGET)
]
_Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in the folder.", rich_help_panel=_BUDGET)]
_Seed = Annotated[int, typer.Option(help="Of data and initial weights.", rich_help_panel=_BUDGET)]


@app.command("target")
def train_target(
    out: _Out,
    maths: _Maths = None,
    layers: Annotated[int, typer.Option(help="Transformer layers.", min=1)] = 12,
    hidden_size: Annotated[int, typer.Option(help="Width; a multiple of 64.", min=64)] = 256,
    vocab_size: Annotated[int, typer.Option(help="Entries of the BPE tokenizer.", min=300)] = 4096,
    length: Annotated[int, typer.Option(help="Tokens in a training window.", min=2)] = 384,
    batch_size: Annotated[int, typer.Option(help="Windows a step on each device.", min=1)] = 20,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an earlier target to go on from, with its tokenizer.",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    minutes: _Minutes = 30.0,
    steps: _Steps = None,
    devices: _Devices = 1,
    accelerator: _Accelerator = "auto",
    strategy: _Strategy = "auto",
    compile: _Compile = False,
    resume: _Resume = True,
    seed: _Seed = 0,
) -> None:
    """Train tokenizer and target from scratch.

    On maths, Python's standard library and generated structured text. Writes a folder; the same command goes on where
    it was interrupted.

    `bpkit train target --out runs/target --maths gsm8k_train.jsonl --minutes 75 --devices 2 --strategy ddp --compile`
    """
    require("lightning", extra="train", purpose="Training")
    from bpkit.cli.models import quiet_libraries
    from bpkit.learn.training import target as recipe

    quiet_libraries()
    with when_interrupted(checkpoint_in(out)):
        recipe.train_target(
            out,
            maths=maths,
            options=_run_options(minutes, steps, devices, accelerator, strategy, compile, resume, seed),
            layers=layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            length=length,
            batch_size=batch_size,
            start_from=start_from,
        )
    _wrote(out, f"bpkit train drafter --target {out} --out FOLDER")


@app.command("drafter")
def drafter(
    target: Annotated[
        str, typer.Option(help="Folder or Hub name of the target; its tokenizer needs a mask token.", metavar="MODEL")
    ],
    out: _Out,
    maths: _Maths = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL with `prompt`, instead of openings of the target's training text.", metavar="FILE"),
    ] = None,
    kind: Annotated[
        DrafterKind,
        typer.Option(help="`block-diffusion` drafts a block in one pass, `autoregressive` token after token."),
    ] = DrafterKind.BLOCK_DIFFUSION,
    layers: Annotated[int, typer.Option(help="Drafter layers.", min=1)] = 2,
    block_size: Annotated[
        int, typer.Option(help="Trained block size, the anchor included (block-diffusion).", min=2)
    ] = 16,
    target_layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A target layer that gives features; repeat. By default three, spread out (block-diffusion).", min=0
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Answers of the target to train on.", min=65)] = 6000,
    new_tokens: Annotated[int, typer.Option(help="Tokens that the target generates for each.", min=2)] = 160,
    batch_size: Annotated[int, typer.Option(help="Sequences a step on each device.", min=1)] = 8,
    per_domain: Annotated[int, typer.Option(help="Different openings of each domain.", min=1)] = 2000,
    minutes: _Minutes = 30.0,
    steps: _Steps = None,
    devices: _Devices = 1,
    accelerator: _Accelerator = "auto",
    strategy: _Strategy = "auto",
    compile: _Compile = False,
    resume: _Resume = True,
    seed: _Seed = 0,
) -> None:
    """Let a target answer prompts, and train a drafter on the answers.

    Writes a folder; the same command goes on where it was interrupted.
    A block-diffusion drafter is DFlash's; an autoregressive one is cut from the target's first layers and distilled.

    `bpkit train drafter --target runs/target --out runs/drafter --maths gsm8k_train.jsonl --minutes 60 --devices 2`

    `bpkit train drafter --target Qwen/Qwen3-4B --out runs/drafter --prompts my_prompts.jsonl --accelerator gpu`

    Next: `bpkit bench --target ... --drafter ...`
    """
    require("lightning", extra="train", purpose="Training")
    from bpkit.cli.models import quiet_libraries
    from bpkit.learn.training.assistant import train_assistant
    from bpkit.learn.training.corpus import training_prompts
    from bpkit.learn.training.drafter import train_drafter
    from bpkit.prompts import read_prompts

    recipe = (
        train_assistant
        if kind is DrafterKind.AUTOREGRESSIVE
        else partial(train_drafter, block_size=block_size, target_layer_ids=target_layer)
    )
    quiet_libraries()
    texts = [p.text for p in read_prompts(prompts)] if prompts else None
    with when_interrupted(checkpoint_in(out)):
        recipe(
            target,
            out,
            prompts=texts or training_prompts(maths, per_domain=per_domain, seed=seed),
            options=_run_options(minutes, steps, devices, accelerator, strategy, compile, resume, seed),
            layers=layers,
            sequences=sequences,
            new_tokens=new_tokens,
            batch_size=batch_size,
        )
    _wrote(out, f"bpkit bench --target {target} --drafter {out}")


def _wrote(out: Path, following: str) -> None:
    """Say what came of it, once, and what to do with it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning starts further processes by the same command
        say(f"wrote {out}")
        say(f"Next: {following}")


def _run_options(
    minutes: float,
    steps: int | None,
    devices: int,
    accelerator: str,
    strategy: str,
    compile: bool,
    resume: bool,
    seed: int,
) -> RunOptions:
    from bpkit.learn.training.run import RunOptions

    return RunOptions(
        max_steps=steps or RunOptions.max_steps,
        max_minutes=minutes,
        devices=devices,
        accelerator=accelerator,
        strategy=strategy,
        compile=compile,
        resume=resume,
        seed=seed,
    )
