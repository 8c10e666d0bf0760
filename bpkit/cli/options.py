"""Options that several commands share: declared once, and handed over as the one object that they settle.

`takes` gives a command the options of a group in place of one of its parameters:

    @takes(texts=prompts(), config=settings(MODELS | PLACE))
    def command(*, texts: list[Prompt], config: Config) -> None: ...
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from bpkit import assets
from bpkit.assets.known import KNOWN
from bpkit.cli import completion
from bpkit.config import Config, Runtime, Sampling, settle
from bpkit.prompts import DEFAULT_LIMIT, KINDS, Prompt, choose_prompts
from bpkit.registry.resolve import PolicyLike, resolve_policy, written

Command = TypeVar("Command", bound=Callable[..., None])
Group = Callable[..., Any]
"""A function whose parameters are options, as those of a command are; it returns what the command is handed."""


def takes(**groups: Group) -> Callable[[Command], Command]:
    """Decorate a command: its parameters of these names become the options of the groups, in their place in the help.

    Options of one name in two groups are one option.
    """

    def decorate(command: Command) -> Command:
        of_group = {name: _parameters(group) for name, group in groups.items()}
        shown: dict[str, inspect.Parameter] = {}
        for name, parameter in _parameters(command).items():
            shown.update(of_group.get(name, {name: parameter}))
        own = [name for name in inspect.signature(command).parameters if name not in groups]

        @wraps(command)
        def run(**given: Any) -> None:
            made = {n: group(**{option: given[option] for option in of_group[n]}) for n, group in groups.items()}
            command(**{name: given[name] for name in own}, **made)

        # What Typer reads.
        vars(run)["__signature__"] = inspect.Signature(list(shown.values()))
        run.__annotations__ = {name: option.annotation for name, option in shown.items()}
        return cast("Command", run)

    return decorate


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function with their types looked up."""
    found = inspect.signature(function, eval_str=True).parameters
    return {name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in found.items()}


# Options that the config knows, in sets for `settings`.

POLICY_HELP = "As `bpkit policies` lists them: a name, `name:value`, `name:key=value,...`, or `./file.py:ClassName`."
_MODELS = "Models and policy"
of_prompts = partial(typer.Option, rich_help_panel="Prompts")


def _option(panel: str | None, kind: Any, said: str, metavar: str, *names: str, completes: Any = None) -> Any:
    """An option that may be left out, where the config, or else a default, counts."""
    option = typer.Option(*names, help=said, metavar=metavar, rich_help_panel=panel, autocompletion=completes)
    return Annotated[kind | None, option]


_model, _sampling, _runtime = (partial(_option, panel) for panel in (_MODELS, "Sampling", "Runtime"))
POLICY = {"policy": _model(str, POLICY_HELP, "SPEC", "--policy", "-p", completes=completion.policies)}
MODELS = {
    "target": _model(
        str,
        "Folder or Hub name of the target, or a name from `bpkit models`; by default the one that ships with bpkit.",
        "MODEL",
        completes=lambda: list(KNOWN),
    ),
    "drafter": _model(
        str,
        "Folder or Hub name of a drafter for that target, or a name from `bpkit drafters`, such as `ngram`; or several "
        "such names with `+` between them, for policies that choose among sources of drafts.",
        "DRAFTER",
        completes=completion.drafters,
    ),
    "config": _option(None, Path, "YAML file with any of these settings; flags win over it.", "FILE", "--config", "-c"),
}
SAMPLING = {
    "max_new_tokens": _sampling(int, "Output tokens at most.", "N"),
    "temperature": _sampling(float, "0 is greedy decoding.", "T"),
    "top_p": _sampling(float, "Keep the likeliest tokens up to this probability.", "P"),
    "top_k": _sampling(int, "Keep the K likeliest tokens; 0 keeps all.", "K"),
    "repetition_penalty": _sampling(float, "Above 1, tokens already used become less likely.", "R"),
}
_RULE = "`coupled`: the text depends on prompt and seed alone. `rejection`: classic speculative sampling."
_DTYPE = "`float32`, `bfloat16`, `float16` or `auto`; by default float32 on a CPU, the checkpoint's own on a GPU."
_THREADS = "Threads of torch on a CPU; `auto` is torch's own choice, and in `bench` and `demo` the fastest for each."
_COST = (
    "What steps cost here, for policies that weigh it: a file of `bpkit calibrate`, or a preset "
    "(`bpkit calibrate --list-presets`)."
)
_CAPTURE = (
    "Capture passes in CUDA graphs: `auto`, where there is CUDA and the models allow it; `off`; or `on`, which is an "
    "error where they do not."
)
_PRODUCTS = (
    "What multiplies matrices in float32 on a CPU: `torch`; `onednn`, which keeps a second copy of the weights and is "
    "faster on AMD's processors; `auto`: oneDNN where it can."
)
_OBSERVE = "Tell this observer of every step, as `bpkit observers` lists them: `jsonl:path=steps.jsonl`; repeat."
RULE = {"rule": _runtime(str, _RULE, "RULE", completes=completion.rules)}
COST = {"cost": _runtime(str, _COST, "FILE|PRESET", completes=completion.presets)}
PLACE = {
    "device": _runtime(str, "Such as `cpu` or `cuda`; by default a GPU if there is one.", "DEVICE"),
    "drafter_device": _runtime(
        str, "Where drafters with a model work, if not with the target: `cpu`, `cuda:1`.", "DEVICE"
    ),
    "dtype": _runtime(str, _DTYPE, "DTYPE", completes=lambda: ["auto", "float32", "bfloat16", "float16"]),
}
PRODUCTS = {"products": _runtime(str, _PRODUCTS, "KIND", completes=lambda: ["torch", "onednn", "auto"])}
CAPTURE = {"capture": _runtime(str, _CAPTURE, "MODE", completes=lambda: ["auto", "off", "on"])}


def threads(said: str = _THREADS) -> dict[str, Any]:
    """The option of threads, with its help."""
    return {"threads": _runtime(str, said, "N")}


def seed(said: str) -> dict[str, Any]:
    """The option of a seed, with its help."""
    return {"seed": _option(None, int, said, "N")}


OBSERVE = {"observe": _runtime(list[str], _OBSERVE, "SPEC", completes=completion.observers)}
RUNTIME = RULE | PLACE | CAPTURE | PRODUCTS | threads() | COST | OBSERVE


# Options that commands name themselves.

PolicySpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help=f"A policy to compare; repeat for more. {POLICY_HELP}",
        metavar="SPEC",
        autocompletion=completion.policies,
        rich_help_panel=_MODELS,
    ),
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--recompute",
        help="Run the models again for what policies want and the trace does not hold.",
        rich_help_panel="Features that the trace lacks",
    ),
]
Domains = Annotated[
    list[str] | None,
    of_prompts(
        help="Only prompts of this domain; repeat for more.",
        metavar="NAME",
        autocompletion=lambda: list(dict.fromkeys([*assets.DOMAINS, *assets.EXTRA_DOMAINS, *KINDS])),
    ),
]
Prompts = Annotated[
    Path | None,
    of_prompts(
        help="JSONL with `prompt`, and `id` and `domain` if you like, instead of the shipped prompts; or "
        "`instructions`: those that ship for models that chat.",
        metavar="FILE",
    ),
]
Chat = Annotated[
    bool,
    of_prompts(
        "--chat",
        help="Hand each prompt to the target as a user's message, by the chat template of its tokenizer; without "
        "this, only prompts that say `chat` themselves.",
    ),
]


# Options that the trainings of policies and of models share.

of_run = partial(typer.Option, rich_help_panel="How to run")
_budget = partial(typer.Option, rich_help_panel="Budget")

Out = Annotated[Path, typer.Option(help="Folder for the result, its checkpoints and logs.", metavar="FOLDER")]
Devices = Annotated[int, of_run(help="Processes: GPUs, or on a CPU one for each core or two.", min=1)]
Accelerator = Annotated[str, of_run(help="`auto`, `cpu` or `gpu`.")]
Strategy = Annotated[str, of_run(help="Of Lightning, with more than one device, such as `ddp`.")]
Resume = Annotated[bool, of_run(help="Go on from the last checkpoint in the folder.")]


# Groups of them.


def model_run(
    minutes: Annotated[float, _budget(help="Training time; the learning rate ends at zero then.", min=0.01)] = 30.0,
    steps: Annotated[
        int | None, _budget(help="Optimizer steps at most, if fewer than the minutes allow.", min=1)
    ] = None,
    rate: Annotated[
        float, _budget(help="Factor on the learning rates; 0.1 or so for a model that was trained before.", min=0.0)
    ] = 1.0,
    keep_start: Annotated[
        float,
        _budget(
            help="Share of the weights it started from in the result, the rest is the trained one.", min=0.0, max=1.0
        ),
    ] = 0.0,
    devices: Devices = 1,
    accelerator: Accelerator = "auto",
    strategy: Strategy = "auto",
    compile: Annotated[bool, of_run(help="Run through torch.compile; pays off after a few minutes.")] = False,
    resume: Resume = True,
    seed: Annotated[int, of_run(help="Of data and initial weights.")] = 0,
) -> dict[str, Any]:
    """How a model is trained, for `ModelRun`, which needs Lightning."""
    how = {"devices": devices, "accelerator": accelerator, "strategy": strategy, "compile": compile}
    budget = {
        "max_minutes": minutes,
        "rate": rate,
        "keep_start": keep_start,
        **({"max_steps": steps} if steps is not None else {}),
    }
    return {**budget, **how, "resume": resume, "seed": seed}


def settings(options: Mapping[str, Any]) -> Group:
    """The group of options that the config knows, such as `MODELS | SAMPLING | seed("Of the noise.")`.

    It returns a Config: the file of `--config`, overridden by the options that were given. Raises ConfigError, or
    FileNotFoundError.
    """

    def settled(**given: Any) -> Config:
        flags = {name: given.get(name) for name in ("target", "drafter", "policy")}
        flags["observers"] = given.get("observe") or None
        flags["sampling"] = {name: given.get(name) for name in Sampling.model_fields}
        flags["runtime"] = {name: given.get(name) for name in Runtime.model_fields}
        return settle(given.get("config"), flags)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, keyword, default=None, annotation=kind) for n, kind in options.items()]
    vars(settled)["__signature__"] = inspect.Signature(parameters)
    return settled


def prompts(shipped: int = DEFAULT_LIMIT) -> Group:
    """The group of prompts: of some domains of a file, or else up to `shipped` of those that ship, of each domain."""
    said = f"Prompts of each domain; by default {shipped} of the shipped ones, and all of a file."

    def chosen(
        domain: Domains = None,
        limit: Annotated[int | None, of_prompts(help=said, min=1)] = None,
        prompts: Prompts = None,
        chat: Chat = False,
    ) -> list[Prompt]:
        return choose_prompts(prompts, domain or [], limit, shipped_limit=shipped, chat=chat)

    return chosen


def named_policies(
    given: Sequence[str], config: Config, specs: Mapping[str, str] | None = None
) -> dict[str, PolicyLike]:
    """Policies by what would be typed: those that were given, else the config's one, else none.

    Args:
        specs: of those that are typed with more than the policy.

    Raises:
        ValueError: one is given twice, or is no policy.
    """
    repeated = {name for name in given if given.count(name) > 1}
    if repeated:
        raise ValueError(f"policy {', '.join(sorted(repeated))} is given more than once")
    named: dict[str, PolicyLike] = {name: (specs or {}).get(name, name) for name in given}
    if not given and config.policy is not None:
        named = {written(config.policy): config.policy}
    for policy in named.values():
        resolve_policy(policy)  # a mistyped one is told before any weights are read
    return named
