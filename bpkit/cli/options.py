"""Options that several commands share, and how they become a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpkit.config import Config, Runtime, Sampling, settle
from bpkit.registry import registry


def settled(context: typer.Context) -> Config:
    """The config of a command: the file of its `--config`, overridden by those of its flags that the config knows.

    Raises ConfigError, or FileNotFoundError.
    """
    given = context.params
    flags = {name: given.get(name) for name in ("target", "drafter")}
    if isinstance(given.get("policy"), str):  # in `bench` it is a list of contestants
        flags["policy"] = given["policy"]
    flags["sampling"] = {name: given.get(name) for name in Sampling.model_fields}
    flags["runtime"] = {name: given.get(name) for name in Runtime.model_fields}
    return settle(given.get("config"), flags)


def _policy_names() -> list[str]:
    return sorted(registry().policies)


POLICY_HELP = "As `bpkit policies` lists them: a name, `name:value`, `name:key=value,...`, or `./file.py:ClassName`."
_MODELS, _SAMPLING, _RUNTIME, _COMPARISON = "Models and policy", "Sampling", "Runtime", "Comparison"

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file with any of these settings; flags win over it.", metavar="FILE"),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub name of the target; by default the one that ships with bpkit.",
        metavar="MODEL",
        rich_help_panel=_MODELS,
    ),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub name of a drafter for that target, or a name from `bpkit drafters`, such as `ngram`.",
        metavar="DRAFTER",
        rich_help_panel=_MODELS,
    ),
]
PolicySpec = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "-p",
        help=POLICY_HELP,
        metavar="SPEC",
        autocompletion=_policy_names,
        rich_help_panel=_MODELS,
    ),
]
PolicySpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help=f"A contestant; repeat for more. {POLICY_HELP}",
        metavar="SPEC",
        autocompletion=_policy_names,
        rich_help_panel=_MODELS,
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Output tokens at most.", metavar="N", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy decoding.", metavar="T", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest tokens up to this probability.", metavar="P", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep the K likeliest tokens; 0 keeps all.", metavar="K", rich_help_panel=_SAMPLING)
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, tokens already used become less likely.", metavar="R", rich_help_panel=_SAMPLING),
]
Rule = Annotated[
    str | None,
    typer.Option(
        help="`coupled`: the text depends on prompt and seed alone. `rejection`: classic speculative sampling.",
        metavar="RULE",
        rich_help_panel=_RUNTIME,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Such as `cpu` or `cuda`; by default a GPU if there is one.", rich_help_panel=_RUNTIME),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="`float32`, `bfloat16`, `float16` or `auto`; by default float32 on a CPU, the checkpoint's own on a GPU.",
        rich_help_panel=_RUNTIME,
    ),
]
Threads = Annotated[
    str | None,
    typer.Option(
        help="Of torch on a CPU; `auto` is torch's own choice, and in `bench` and `demo` the fastest for each.",
        metavar="N",
        rich_help_panel=_RUNTIME,
    ),
]
Cost = Annotated[
    str | None,
    typer.Option(
        help="What steps cost here, for policies that weigh it: a file of `bpkit calibrate`, or a preset.",
        metavar="FILE|PRESET",
        rich_help_panel=_RUNTIME,
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(help="Also run this decoder: `transformers-dflash`.", metavar="NAME", rich_help_panel=_COMPARISON),
]
Domains = Annotated[
    list[str] | None, typer.Option(help="Only prompts of this domain; repeat for more.", rich_help_panel=_COMPARISON)
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Prompts of each domain; by default 20 of the shipped ones, and all of a file.",
        min=1,
        rich_help_panel=_COMPARISON,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="JSONL with `prompt`, and `id` and `domain` if you like, instead of the shipped prompts.",
        metavar="FILE",
        rich_help_panel=_COMPARISON,
    ),
]
Repeats = Annotated[
    int, typer.Option(help="Runs of each contestant on each prompt.", min=1, rich_help_panel=_COMPARISON)
]
