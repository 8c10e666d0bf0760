"""`bpkit train POLICY TRACE`: train a policy on traces."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from bpkit.cli import options
from bpkit.cli.errors import checkpoint_in, require, when_interrupted
from bpkit.cli.evaluate import DEFAULT_SPLIT, parse_split
from bpkit.cli.outputs import portable
from bpkit.cli.terminal import progress_bar, say
from bpkit.config import Config
from bpkit.registry.resolve import with_weights

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.judge.evaluation.splits import SplitRule
    from bpkit.learn.training.policy_module import PolicyModule
    from bpkit.learn.training.prompts import Part
    from bpkit.trace.store.joined import AnyTrace

_training = partial(typer.Option, rich_help_panel="Training")
Logger = Literal["csv", "tensorboard"]


@options.takes(config=options.settings(options.MODELS | options.PLACE))
def train_policy(
    context: typer.Context,
    traces: Annotated[list[Path], typer.Argument(help="Folders that `bpkit trace` made.", metavar="TRACE")],
    out: options.Out,
    cost: Annotated[
        str,
        typer.Option(
            help="What steps cost: a file of `bpkit calibrate` or your own, or a preset.", metavar="FILE|PRESET"
        ),
    ],
    split: Annotated[
        str | None,
        options.of_prompts(
            help=f"Shares of train, validation and test prompts, as in `bpkit evaluate`; {DEFAULT_SPLIT} by default. "
            "Test prompts are left alone.",
            metavar="A,B,C|FILE",
        ),
    ] = None,
    seed: Annotated[int, options.of_prompts(help="Of the split, as in `bpkit evaluate`.")] = 0,
    validation: Annotated[
        list[Path] | None,
        options.of_prompts(
            help="Validate by all prompts of this trace, and train on all of the others; repeat for more.",
            metavar="TRACE",
        ),
    ] = None,
    limit: Annotated[
        int | None, options.of_prompts(help="Prompts of each domain and trace, after the split; all by default.", min=1)
    ] = None,
    settings: Annotated[
        list[str] | None,
        _training(
            "--set",
            help="A setting of the training or of the policy, such as `learning_rate=0.001` or `seed=1`; repeat for "
            "more. One that does not exist is answered with all that do.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    epochs: Annotated[int | None, _training(help="Passes over the examples at most.", min=1)] = None,
    devices: options.Devices = 1,
    strategy: options.Strategy = "auto",
    accelerator: options.Accelerator = "auto",
    logger: Annotated[
        str, options.of_run(help="Of the figures of each epoch, under `logs`: `csv` or `tensorboard`.")
    ] = "csv",
    resume: options.Resume = True,
    recompute: options.Recompute = False,
    *,
    config: Config,
) -> None:
    """Train a policy on traces. The folder that comes of it is a policy: `--policy FOLDER`.

    After each epoch the policy is replayed over validation prompts; the weights with the most tokens per second by the
    cost model are kept. The same command goes on where it was interrupted.

    `bpkit train forecast TRACE --out runs/forecast --cost cost.json`

    `bpkit train ./my_policy.py:MyPolicy TRACE --out runs/mine --cost cost.json --epochs 20`

    Next: `bpkit evaluate TRACE --cost cost.json --policy runs/forecast`, and `bpkit export runs/forecast --trace TRACE`
    """
    name = str(context.info_name)
    require("lightning", extra="train", purpose="Training")
    require("pyarrow", extra="traces", purpose="A trace")
    if logger not in get_args(Logger):
        raise ValueError(f"--logger {logger}: choose {' or '.join(get_args(Logger))}")
    if logger == "tensorboard":
        require("tensorboard", extra="tensorboard", purpose="--logger tensorboard")
    if validation and split:
        raise ValueError("give --validation or --split, not both: with --validation nothing is split")
    given = parse_settings(settings or [])
    if epochs is not None:
        given["epochs"] = epochs
    from bpkit.cli.models import load_decoder, quiet_libraries

    quiet_libraries()
    from bpkit.learn.training.fit import first_process
    from bpkit.learn.training.policies import PolicyRun
    from bpkit.learn.training.policies import train_policy as train
    from bpkit.learn.training.prompts import check_alike, fingerprint_part
    from bpkit.learn.training.trainable import make_module
    from bpkit.trace.cost import read_cost
    from bpkit.trace.store.joined import open_trace

    opened, held = [open_trace(path) for path in traces], [open_trace(path) for path in validation or []]
    table, spec = read_cost(cost), opened[0].spec
    policy = with_config(name, config)
    check_alike([*opened, *held])
    # Made here as well, so that a mistyped setting is told before any model is loaded.
    module = make_module(policy, spec, table, given)
    roles = {"train": opened, "validation": held or opened}
    if held:
        places = {role: [list(range(len(trace))) for trace in some] for role, some in roles.items()}
    else:
        places = split_places(opened, seed, parse_split(split or DEFAULT_SPLIT))
    decoder = load_decoder(config, "fixed") if recompute else None
    parts = {
        role: [prompts_of(t, p, limit, module, decoder) for t, p in zip(some, places[role], strict=True)]
        for role, some in roles.items()
    }
    run = PolicyRun(
        devices=devices,
        strategy=strategy,
        accelerator=accelerator,
        resume=resume,
        logger=cast("Logger", logger),
        command=portable(sys.argv[1:]),
        fingerprints={
            f"{role} {number}: {part.trace.path.name}": fingerprint_part(part)
            for role, some in parts.items()
            for number, part in enumerate(some, 1)
        },
    )
    with when_interrupted(checkpoint_in(out)), progress_bar() as bar:
        held_out = parts["validation"]
        train(policy, parts["train"], spec, table, out, validation=held_out, options=given, progress=bar, run=run)
    if first_process():
        report(out, name)


def prompts_of(
    trace: AnyTrace, places: Sequence[int], limit: int | None, module: PolicyModule, decoder: SpeculativeDecoder | None
) -> Part:
    """Prompts of a trace with what the policy and its training read, and with a decoder also what it may read."""
    from bpkit.learn.training.prompts import Part
    from bpkit.trace.collect.recompute import Recompute

    features, fill = module.features | module.policy.wants, None
    if decoder is not None:
        fill = Recompute(decoder, trace.manifest)
        features |= module.policy.wants_optional & fill.offers
    return Part(trace, places, limit=limit, fill=fill, features=features)


def with_config(spec: str, config: Config) -> str | dict[str, Any]:
    """The policy to train, with the options that a config file gives for the same name; those of the spec win.

    Weights that the file names are what training makes, and are left out.
    """
    from bpkit.registry.resolve import parse_spec

    given, stated = parse_spec(spec), config.policy
    stated = parse_spec(stated) if isinstance(stated, str) else stated
    if stated is None or stated.get("name") != given["name"]:
        return spec
    return {**{key: value for key, value in stated.items() if key not in ("", "weights")}, **given}


def split_places(traces: Sequence[AnyTrace], seed: int, rule: SplitRule) -> dict[str, list[list[int]]]:
    """Places of training and validation prompts in each of the traces.

    Each trace is split by itself, as `bpkit evaluate` does. A prompt id that several traces have belongs to the most
    protected part that it is in anywhere, so that no trace's test prompt is seen through another trace.
    """
    from bpkit.judge.evaluation.splits import split_prompts

    protection: dict[str, int] = {}
    for trace in traces:
        split = split_prompts(trace.ids, trace.domains, seed=seed, rule=rule)
        for rank, places in enumerate((split.train, split.validation, split.test)):
            for place in places:
                protection[trace.ids[place]] = max(rank, protection.get(trace.ids[place], 0))
    return {
        role: [[i for i, name in enumerate(trace.ids) if protection.get(name) == rank] for trace in traces]
        for rank, role in enumerate(("train", "validation"))
    }


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings by name. Raises ValueError.

    >>> parse_settings(["epochs=3", "label=tokens_per_second"])
    {'epochs': '3', 'label': 'tokens_per_second'}
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text}: write it as KEY=VALUE, such as --set learning_rate=0.001")
        if key.strip() in found:
            raise ValueError(f"--set {key.strip()} is given twice")
        found[key.strip()] = value.strip()
    return found


def report(folder: Path, name: str) -> None:
    """Say what came of it, on stdout."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    judged, fixed = found["validation"], found["validation"]["best_fixed"]
    unit = "tokens/s" if judged["unit"] == "seconds" else f"tokens per {judged['unit'].removesuffix('s')}"
    ended = "stopped early" if found["stopped_early"] else "ended"
    typer.echo(
        f"{name}: {judged['tokens_per_second']:.4g} {unit} on {judged['prompts']} validation prompts; the best fixed "
        f"size, {fixed['block_size']}, has {fixed['tokens_per_second']:.4g} "
        f"({100 * judged['gain_over_best_fixed']:+.1f}%). Best epoch {found['best_epoch'] + 1} of "
        f"{len(found['epochs'])}, {ended}."
    )
    say(f"{found['note']}")
    say(f"wrote {folder}; use it with --policy {with_weights(name, folder)}")
