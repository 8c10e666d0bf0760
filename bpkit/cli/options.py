"""Options that several commands share, and how they become a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpkit.cli import completion
from bpkit.config import Config, Runtime, Sampling, settle


def settled(context: typer.Context) -> Config:
    """The config of a command: the file of its `--config`, overridden by those of its flags that the config knows.

    Raises ConfigError, or FileNotFoundError.
    """
    given = context.params
    flags = {name: given.get(name) for name in ("target", "drafter")}
    if isinstance(given.get("policy"), str):  # in `bench` it is a list of contestants
        flags["policy"] = given["policy"]
    flags["observers"] = given.get("observe") or None
    flags["sampling"] = {name: given.get(name) for name in Sampling.model_fields}
    flags["runtime"] = {name: given.get(name) for name in Runtime.model_fields}
    return settle(given.get("config"), flags)


POLICY_HELP = "As `bpkit policies` lists them: a name, `name:value`, `name:key=value,...`, or `./file.py:ClassName`."
_MODELS, _SAMPLING, _RUNTIME, _COMPARISON = "Models and policy", "Sampling", "Runtime", "Comparison"
PROMPTS = "Prompts"

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
        autocompletion=completion.drafters,
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
        autocompletion=completion.policies,
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
        autocompletion=completion.policies,
        rich_help_panel=_MODELS,
    ),
]
Observe = Annotated[
    list[str] | None,
    typer.Option(
        help="Tell this observer of every step, as `bpkit observers` lists them: `jsonl:path=steps.jsonl`; repeat.",
        metavar="SPEC",
        autocompletion=completion.observers,
        rich_help_panel=_RUNTIME,
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
        autocompletion=completion.rules,
        rich_help_panel=_RUNTIME,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Such as `cpu` or `cuda`; by default a GPU if there is one.", metavar="DEVICE", rich_help_panel=_RUNTIME
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="`float32`, `bfloat16`, `float16` or `auto`; by default float32 on a CPU, the checkpoint's own on a GPU.",
        metavar="DTYPE",
        autocompletion=completion.dtypes,
        rich_help_panel=_RUNTIME,
    ),
]
Threads = Annotated[
    str | None,
    typer.Option(
        help="Threads of torch on a CPU; `auto` is torch's own choice, and in `bench` and `demo` the fastest for each.",
        metavar="N",
        rich_help_panel=_RUNTIME,
    ),
]
Cost = Annotated[
    str | None,
    typer.Option(
        help="What steps cost here, for policies that weigh it: a file of `bpkit calibrate`, or a preset "
        "(`bpkit calibrate --list-presets`).",
        metavar="FILE|PRESET",
        autocompletion=completion.presets,
        rich_help_panel=_RUNTIME,
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        help="Also run this decoder: `transformers-dflash`.",
        metavar="NAME",
        autocompletion=lambda: ["transformers-dflash"],
        rich_help_panel=_COMPARISON,
    ),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        help="Only prompts of this domain; repeat for more.",
        metavar="NAME",
        autocompletion=completion.domains,
        rich_help_panel=PROMPTS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Prompts of each domain; by default 20 of the shipped ones, and all of a file.",
        min=1,
        rich_help_panel=PROMPTS,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="JSONL with `prompt`, and `id` and `domain` if you like, instead of the shipped prompts.",
        metavar="FILE",
        rich_help_panel=PROMPTS,
    ),
]
Repeats = Annotated[
    int, typer.Option(help="Runs of each contestant on each prompt.", min=1, rich_help_panel=_COMPARISON)
]
