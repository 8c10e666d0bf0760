"""`bpkit train POLICY TRACE`: train a policy on traces."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit.cli import options
from bpkit.cli.errors import checkpoint_in, require, when_interrupted
from bpkit.cli.evaluate import DEFAULT_SPLIT, parse_fractions
from bpkit.cli.terminal import progress_bar, say
from bpkit.registry.resolve import with_weights

if TYPE_CHECKING:
    from bpkit.config import Config
    from bpkit.learn.training.prompts import Part
    from bpkit.trace.cost import CostTable
    from bpkit.trace.store.storage import Trace

_PROMPTS, _TRAINING, _RUN, _RECOMPUTE = "Prompts", "Training", "How to run", "Features that the trace lacks"
LOGGERS = ("csv", "tensorboard")


def train_policy(
    context: typer.Context,
    traces: Annotated[list[Path], typer.Argument(help="Folders that `bpkit trace` made.", metavar="TRACE")],
    out: Annotated[Path, typer.Option(help="Folder for the policy, its checkpoints and logs.", metavar="FOLDER")],
    cost: Annotated[
        str,
        typer.Option(
            help="What steps cost: a file of `bpkit calibrate` or your own, or a preset.", metavar="FILE|PRESET"
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(
            help=f"Shares of train, validation and test prompts, as in `bpkit evaluate`; {DEFAULT_SPLIT} by default. "
            "Test prompts are left alone.",
            metavar="A,B,C",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, as in `bpkit evaluate`.", rich_help_panel=_PROMPTS)] = 0,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            help="Validate by all prompts of this trace, and train on all of the others; repeat for more.",
            metavar="TRACE",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Prompts of each domain and trace, after the split; all by default.", min=1, rich_help_panel=_PROMPTS
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the training or of the policy, such as `learning_rate=0.001` or `seed=1`; repeat for "
            "more. One that does not exist is answered with all that do.",
            metavar="KEY=VALUE",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the examples at most.", min=1, rich_help_panel=_TRAINING)
    ] = None,
    devices: Annotated[int, typer.Option(help="Of Lightning.", min=1, rich_help_panel=_RUN)] = 1,
    strategy: Annotated[str, typer.Option(help="Of Lightning, such as `ddp`.", rich_help_panel=_RUN)] = "auto",
    accelerator: Annotated[str, typer.Option(help="`auto`, `cpu` or `gpu`.", rich_help_panel=_RUN)] = "auto",
    logger: Annotated[
        str,
        typer.Option(help="Of the figures of each epoch, under `logs`: `csv` or `tensorboard`.", rich_help_panel=_RUN),
    ] = "csv",
    resume: Annotated[
        bool, typer.Option(help="Go on where an earlier run in the folder stopped.", rich_help_panel=_RUN)
    ] = True,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Run the models again for what the policy reads and the trace does not hold.",
            rich_help_panel=_RECOMPUTE,
        ),
    ] = False,
    # `options.settled` reads these from the context.
    target: options.Target = None,
    drafter: options.Drafter = None,
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
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
    if logger not in LOGGERS:
        raise ValueError(f"--logger {logger}: choose {' or '.join(LOGGERS)}")
    if logger == "tensorboard":
        require("tensorboard", extra="tensorboard", purpose="--logger tensorboard")
    if validation and split:
        raise ValueError("give --validation or --split, not both: with --validation nothing is split")
    given = parse_settings(settings or [])
    if epochs is not None:
        given["epochs"] = epochs
    from bpkit.cli.models import quiet_libraries

    quiet_libraries()
    from bpkit.learn.training.fit import first_process
    from bpkit.trace.cost import read_cost
    from bpkit.trace.store.storage import open_trace

    opened, held = [open_trace(path) for path in traces], [open_trace(path) for path in validation or []]
    policy = with_config(name, options.settled(context))
    work = _Work(context, policy, opened, held, read_cost(cost), given)
    parts = work.parts(parse_fractions(split or DEFAULT_SPLIT), seed, limit, recompute=recompute)
    how = {"devices": devices, "strategy": strategy, "accelerator": accelerator, "resume": resume, "logger": logger}
    folder = work.train(parts, out, how)
    if first_process():
        report(folder, name)


class _Work:
    """What a command names, opened."""

    def __init__(
        self,
        context: typer.Context,
        policy: str | dict[str, Any],
        traces: list[Trace],
        validation: list[Trace],
        cost: CostTable,
        settings: dict[str, Any],
    ) -> None:
        from bpkit.learn.training.prompts import check_alike
        from bpkit.learn.training.trainable import make_module

        self.context, self.policy, self.cost, self.settings = context, policy, cost, settings
        self.traces, self.validation = traces, validation
        check_alike([*traces, *validation])
        self.spec = traces[0].spec
        # Made here as well, so that a mistyped setting is told before any model is loaded.
        self.module = make_module(policy, self.spec, cost, settings)

    def parts(
        self, fractions: Sequence[float], seed: int, limit: int | None, *, recompute: bool
    ) -> tuple[list[Part], list[Part]]:
        """Prompts to train on and to validate by, trace by trace."""
        from bpkit.learn.training.prompts import Part, first_of_each

        train, validation = self.traces, self.validation
        if validation:
            places = [list(range(len(trace))) for trace in train], [list(range(len(trace))) for trace in validation]
        else:
            places, validation = split_places(train, seed, fractions), train
        fills = self._fills() if recompute else {}
        wanted = self.module.features | self.module.policy.wants

        def some(trace: Trace, of_trace: list[int]) -> Part:
            fill = fills.get(trace.path)
            optional = self.module.policy.wants_optional & fill.offers if fill is not None else frozenset()
            return Part(trace, first_of_each(trace, of_trace, limit), fill=fill, features=wanted | optional)

        return (
            [some(trace, of_trace) for trace, of_trace in zip(train, places[0], strict=True)],
            [some(trace, of_trace) for trace, of_trace in zip(validation, places[1], strict=True)],
        )

    def train(self, parts: tuple[list[Part], list[Part]], out: Path, how: dict[str, Any]) -> Path:
        """Train, with a progress bar."""
        from bpkit.learn.training.policies import PolicyRun, train_policy
        from bpkit.learn.training.prompts import fingerprint_part

        fingerprints = {
            f"{role} {number}: {part.trace.path.name}": fingerprint_part(part)
            for role, some in zip(("train", "validation"), parts, strict=True)
            for number, part in enumerate(some, 1)
        }
        run = PolicyRun(**how, command=portable(sys.argv[1:]), fingerprints=fingerprints)
        with when_interrupted(checkpoint_in(out)), progress_bar() as bar:
            return train_policy(
                self.policy,
                parts[0],
                self.spec,
                self.cost,
                out,
                validation=parts[1],
                options=self.settings,
                progress=bar,
                run=run,
            )

    def _fills(self) -> dict[Path, Any]:
        """What computes missing features, by trace; the models are loaded once."""
        from bpkit.cli.models import load_decoder
        from bpkit.trace.collect.recompute import Recompute

        decoder = load_decoder(options.settled(self.context), "fixed")
        return {trace.path: Recompute(decoder, trace.manifest) for trace in (*self.traces, *self.validation)}


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


def split_places(
    traces: Sequence[Trace], seed: int, fractions: Sequence[float]
) -> tuple[list[list[int]], list[list[int]]]:
    """Places of training and validation prompts in each trace.

    Each trace is split by itself, as `bpkit evaluate` does. A prompt id that several traces have belongs to the most
    protected part that it is in anywhere, so that no trace's test prompt is seen through another trace.
    """
    from bpkit.judge.evaluation.splits import split_prompts

    guard: dict[str, int] = {}
    ranks: list[dict[int, int]] = []
    for trace in traces:
        split = split_prompts(trace.ids, trace.domains, seed=seed, fractions=fractions)
        ranks.append({place: rank for rank, p in enumerate((split.train, split.validation, split.test)) for place in p})
        for place, rank in ranks[-1].items():
            guard[trace.ids[place]] = max(rank, guard.get(trace.ids[place], 0))
    train, validation = (
        [
            [place for place in sorted(of_trace) if guard[trace.ids[place]] == wanted]
            for trace, of_trace in zip(traces, ranks, strict=True)
        ]
        for wanted in (0, 1)
    )
    return train, validation


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


def portable(arguments: Sequence[str]) -> str:
    """A command as it is recorded: of absolute paths only the name is kept.

    >>> portable(["train", "mlp", "/home/me/runs/trace", "--out", "runs/mlp"])
    'bpkit train mlp trace --out runs/mlp'
    """
    return shlex.join(["bpkit", *(Path(a).name if a.startswith(("/", "~")) else a for a in arguments)])


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
