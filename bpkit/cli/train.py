"""`bpkit train drafter`, `bpkit train exit`, and `bpkit train POLICY`, whose options `bpkit.cli.train_policy` has."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bpkit.cli import options, outputs, train_policy
from bpkit.cli.command import Group, dressed
from bpkit.cli.errors import checkpoint_in, require, when_interrupted
from bpkit.installation.distribution import install_command
from bpkit.learn.training.trainable import refuse_untrainable, trainable_entries
from bpkit.prompts import Prompt, read_prompts
from bpkit.registry.class_file import names_file, split_file
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION

HELP = f"""Train a policy or a drafter.

Needs `{install_command("train")}`. A policy is trained on traces, `bpkit train POLICY TRACE --out FOLDER --cost COST`,
and used as `--policy FOLDER`. POLICY is one of those below, with options if you like (`name:key=value`), or a class of
yours, `./file.py:ClassName`. `bpkit train POLICY --help` lists the options.

`bpkit train forecast TRACE --out runs/forecast --cost cost.json`
"""


class TrainGroup(Group):
    """`drafter`, `exit`, and every policy that can be trained as a command of its own."""

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


TargetModel = Annotated[
    str,
    typer.Option(help="Folder or Hub name of the target, or a name from `bpkit models`.", metavar="MODEL"),
]
AnsweredPrompts = Annotated[
    Path | None,
    typer.Option(
        help="What the target answers: JSONL with `prompt`, or text with a prompt on each line. This or --answers.",
        metavar="FILE",
    ),
]
Sequences = Annotated[int, typer.Option(help="Answers of the target to train on.", min=65)]
NewTokens = Annotated[int, typer.Option(help="Tokens that the target generates for each.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Sequences a step on each device.", min=1)]
Answers = Annotated[
    Path | None,
    typer.Option(
        help="`outputs.safetensors` of another run with this target: its answers again, instead of --prompts.",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    ),
]


class DrafterKind(StrEnum):
    """What `bpkit train drafter` can make, by the name of its kind in `bpkit drafters`."""

    BLOCK_DIFFUSION = BLOCK_DIFFUSION
    AUTOREGRESSIVE = AUTOREGRESSIVE


@app.command("drafter")
@options.takes(run=options.model_run)
def drafter(
    target: TargetModel,
    out: options.Out,
    prompts: AnsweredPrompts = None,
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
    mask_token: Annotated[
        int | None,
        typer.Option(
            help="Id of the token that stands for what is to be drafted; by default the tokenizer's mask token "
            "(block-diffusion).",
            metavar="ID",
            min=0,
        ),
    ] = None,
    sequences: Sequences = 6000,
    new_tokens: NewTokens = 160,
    batch_size: BatchSize = 8,
    answers: Answers = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="A drafter of the same kind and target to go on from, with its layers; see --rate.",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    *,
    run: dict[str, Any],
) -> None:
    """Let a target answer prompts, and train a drafter on the answers.

    Writes a folder; the same command goes on where it was interrupted.
    A block-diffusion drafter is DFlash's; an autoregressive one is cut from the target's first layers and distilled.

    `bpkit train drafter --target Qwen/Qwen3-4B --prompts my_prompts.jsonl --out runs/drafter --accelerator gpu`

    `bpkit train drafter --target runs/target --prompts my_prompts.jsonl --out runs/drafter --kind autoregressive`

    Next: `bpkit bench --target ... --drafter ...`
    """
    require_texts(prompts, answers)
    require("lightning", extra="train", purpose="Training")
    from bpkit.cli.models import quiet_libraries
    from bpkit.learn.training.answers import DrafterRun
    from bpkit.learn.training.assistant import train_assistant
    from bpkit.learn.training.drafter import train_drafter

    quiet_libraries()
    train = (
        train_assistant
        if kind is DrafterKind.AUTOREGRESSIVE
        else partial(train_drafter, block_size=block_size, target_layer_ids=target_layer, mask_token_id=mask_token)
    )
    texts = texts_for(target, read_prompts(prompts)) if prompts is not None else []
    with when_interrupted(checkpoint_in(out)):
        how = DrafterRun(
            layers=layers,
            sequences=sequences,
            new_tokens=new_tokens,
            answers=answers,
            start_from=start_from,
            batch_size=batch_size,
            **run,
        )
        train(target, out, prompts=texts, run=how)
    outputs.say_written(out, f"bpkit bench --target {target} --drafter {out}")


@app.command("exit")
@options.takes(run=options.model_run)
def train_an_exit(
    target: TargetModel,
    out: options.Out,
    prompts: AnsweredPrompts = None,
    layer: Annotated[
        int | None,
        typer.Option(help="How many of the target's layers are below the exit; by default a quarter.", min=1),
    ] = None,
    sequences: Sequences = 6000,
    new_tokens: NewTokens = 160,
    batch_size: BatchSize = 8,
    answers: Answers = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="An exit of the same target to go on from, at its place; see --rate.",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    *,
    run: dict[str, Any],
) -> None:
    """Let a target answer prompts, and train an early exit on the answers.

    Writes a folder with one layer; the same command goes on where it was interrupted. The exit drafts with the target's
    first layers, this one, and the target's norm and head (drafter `early-exit`).

    `bpkit train exit --target Qwen/Qwen3-4B --prompts my_prompts.jsonl --layer 6 --out runs/exit`

    Next: `bpkit bench --target ... --drafter ...`
    """
    require_texts(prompts, answers)
    require("lightning", extra="train", purpose="Training")
    from bpkit.cli.models import quiet_libraries
    from bpkit.learn.training.answers import DrafterRun
    from bpkit.learn.training.early_exit import train_exit

    quiet_libraries()
    texts = texts_for(target, read_prompts(prompts)) if prompts is not None else []
    with when_interrupted(checkpoint_in(out)):
        how = DrafterRun(
            layers=1,
            sequences=sequences,
            new_tokens=new_tokens,
            answers=answers,
            start_from=start_from,
            batch_size=batch_size,
            **run,
        )
        train_exit(target, out, prompts=texts, run=how, layer=layer)
    outputs.say_written(out, f"bpkit bench --target {target} --drafter {out}")


def require_texts(prompts: Path | None, answers: Path | None) -> None:
    """Raise ValueError unless there is something to learn from."""
    if prompts is None and answers is None:
        raise ValueError(
            "a drafter learns from the target's answers to prompts: give --prompts FILE with a few thousand of the "
            'kind that it will serve, one JSON object a line, such as {"prompt": "Once upon a time"}. Those that ship '
            "with bpkit are for judging."
        )


def texts_for(target: str, prompts: Sequence[Prompt]) -> list[str]:
    """What the target is to answer: users' messages by the chat template of its tokenizer, other texts as they are.

    Raises:
        ValueError: there is a message, and no chat template.
    """
    if not any(prompt.chat for prompt in prompts):
        return [prompt.text for prompt in prompts]
    from transformers import AutoTokenizer

    from bpkit.assets import model_path
    from bpkit.decode.chat import as_chat

    tokenizer = AutoTokenizer.from_pretrained(model_path(target))
    return [as_chat(tokenizer, prompt.text, target) if prompt.chat else prompt.text for prompt in prompts]
