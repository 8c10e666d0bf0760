"""`bpkit export`: trained policies as ONNX files that any runtime can load."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit import __version__
from bpkit.cli import completion, options
from bpkit.cli.errors import require, when_interrupted
from bpkit.cli.evaluate import DEFAULT_SPLIT, parse_split
from bpkit.cli.outputs import portable
from bpkit.cli.terminal import progress_bar, say
from bpkit.config import Config
from bpkit.policy import Policy, PolicyError
from bpkit.registry.class_file import names_file
from bpkit.registry.resolve import name_of
from bpkit.types import Feature

if TYPE_CHECKING:
    from bpkit.export.schema import ExportedPolicy
    from bpkit.learn.training.prompts import Part
    from bpkit.progress import Progress
    from bpkit.registry.resolve import PolicyLike
    from bpkit.trace.cost import NamedCost
    from bpkit.trace.records import PromptTrace
    from bpkit.trace.store.joined import AnyTrace


@options.takes(config=options.settings(options.MODELS | options.PLACE))
def export(
    trace: Annotated[
        Path, typer.Option(help="Trace whose validation prompts the files are tried on.", metavar="TRACE")
    ],
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders of trained policies, names whose weights ship, with options if you like "
            "(`forecast:truncate=true`), or `./file.py:ClassName:FOLDER`. By default the policy of `--config`.",
            metavar="POLICY",
            autocompletion=completion.policies,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Each policy gets a folder of its name in it.", metavar="FOLDER")] = Path(
        "exported"
    ),
    cost: Annotated[
        str | None,
        typer.Option(
            help="What steps cost, for policies that weigh it; by default what they did where the policy was trained.",
            metavar="FILE|PRESET",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the exported policy, if there is one; by default the policy's.")
    ] = None,
    opset: Annotated[int, typer.Option(help="Of ONNX: 20, or 18 for older runtimes.")] = 20,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="Fold the first layer of a policy on raw logits into the target's head, so that it reads the hidden "
            "state.",
        ),
    ] = False,
    split: Annotated[
        str,
        typer.Option(
            help="Shares of train, validation and test prompts, as in `bpkit evaluate`.", metavar="A,B,C|FILE"
        ),
    ] = DEFAULT_SPLIT,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Validation prompts, the first ones.", min=1)] = None,
    recompute: options.Recompute = False,
    *,
    config: Config,
) -> None:
    """Write trained policies as ONNX files, for any runtime.

    The files decide without bpkit. Everything that decides is in the files: networks, calibration, table of sizes.
    onnxruntime must decide as the policy does on every position of the validation prompts, or nothing is written.

    `bpkit export runs/forecast --trace TRACE`

    `bpkit export ./my_policy.py:MyPolicy:runs/mine --trace TRACE`

    `bpkit export forecast blockpilot ldlp --trace TRACE --recompute --out exported`

    Next: `bpkit generate --policy onnx:exported/forecast ...`, and `bpkit bench policy` to see what a decision takes.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="export", purpose="Exporting")
    require("pyarrow", extra="traces", purpose="A trace")
    from bpkit.cli.models import load_decoder, quiet_libraries
    from bpkit.judge.evaluation.splits import split_prompts
    from bpkit.learn.training.prompts import Part
    from bpkit.trace.collect.recompute import Recompute
    from bpkit.trace.cost import read_cost
    from bpkit.trace.store.joined import open_trace

    quiet_libraries()
    specs = options.named_policies(list(dict.fromkeys(policies or [])), config)
    if not specs:
        raise ValueError("name a policy to export, such as runs/forecast, or one in a file for --config")
    chosen = {shown: exportable(spec) for shown, spec in specs.items()}
    names = {shown: export_name(shown, policy, name if len(chosen) == 1 else None) for shown, policy in chosen.items()}
    opened = open_trace(trace)
    held = split_prompts(opened.ids, opened.domains, seed=seed, rule=parse_split(split)).validation[:limit]
    costs = read_cost(cost) if cost else None
    fill = Recompute(load_decoder(config, "fixed"), opened.manifest) if recompute else None
    model = load_decoder(config, "fixed").target if fold else None
    for spec, policy in chosen.items():
        with when_interrupted("Policies that were said to be written are; the others are not."), progress_bar() as bar:
            made = policy if model is None else folded(policy, model, opened, costs)
            prompts = Part(opened, held, fill=fill, features=policy.wants | policy.wants_optional)
            found = write(made, prompts, out / names[spec], cost=costs, opset=opset, progress=bar)
        report(found, out / names[spec])


def exportable(spec: PolicyLike) -> Policy:
    """The policy that a spec names. Raises PolicyError if it has nothing to export."""
    from bpkit.export.core import Exportable
    from bpkit.learn.trained import TrainedPolicy
    from bpkit.registry.resolve import resolve_policy, written

    policy = resolve_policy(spec)
    if not isinstance(policy, (TrainedPolicy, Exportable)):
        raise PolicyError(
            f"policy {written(spec)!r} has no trained weights and no `export(self)`, so there is nothing to export: "
            "name a folder that `bpkit train` made or a policy whose weights ship, derive yours from "
            "bpkit.learn.LearnedPolicy, or define `export` (bpkit.export.core)"
        )
    return policy


def export_name(spec: str, policy: Policy, given: str | None) -> str:
    """The name of the exported policy. Raises ValueError if it cannot be one."""
    head, own = spec.partition(":")[0], name_of(type(policy))
    name = given or (own if head == own or names_file(spec) else Path(head).name)
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise ValueError(f"{name!r} cannot be the name of an exported policy: use small letters, digits and _ (--name)")
    return name


def write(
    policy: Policy, prompts: Part, out: Path, *, cost: NamedCost | None, opset: int, progress: Progress
) -> ExportedPolicy:
    """Export one policy to the folder `out`, whose name is its own, and try it on prompts."""
    from importlib.metadata import version

    from bpkit.export.write import export_policy

    progress.start(f"{out.name}: comparing", len(prompts))
    manifest = prompts.trace.manifest
    models = (("target", manifest.target), ("drafter", manifest.drafter))
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    return export_policy(
        policy,
        read(prompts, policy),
        manifest.spec,
        out,
        name=out.name,
        summary=summary_of(policy),
        cost=cost,
        opset=opset,
        fingerprints={kind: facts.fingerprint for kind, facts in models if facts.fingerprint},
        evaluation=beside(policy, "evaluation.json"),
        provenance={
            "command": portable(sys.argv[1:]),
            "training": beside(policy, "provenance.json"),
            "versions": {"bpkit": __version__, **{package: version(package) for package in packages}},
        },
        progress=progress.tick,
    )


def read(prompts: Part, policy: Policy) -> list[PromptTrace]:
    """The prompts, with all features that the policy wants. Raises PolicyError for one that is not there."""
    from bpkit.trace.replay import offered

    found = list(prompts)
    missing = sorted(frozenset[Feature]().union(*(policy.wants - offered(prompt) for prompt in found)))
    if missing:
        flags = " ".join(f"--features {feature}" for feature in missing)
        raise PolicyError(
            f"policy {name_of(type(policy))!r} reads {', '.join(missing)}, which the trace does not hold: "
            f"trace into a new folder with `{flags}`, or let them be computed again with `--recompute`"
        )
    return found


def folded(policy: Policy, model: Any, trace: AnyTrace, costs: NamedCost | None) -> Policy:
    """The policy with the target's head in its first layer. Raises PolicyError."""
    from bpkit.export.core import Foldable

    if not isinstance(policy, Foldable):
        name = name_of(type(policy))
        raise PolicyError(f"--fold is for policies on raw logits, such as blockpilot; {name!r} is none")
    policy.bind(trace.spec, costs)
    return policy.folded(model.get_output_embeddings(), config=model.config)


def summary_of(policy: Policy) -> str:
    """What the plug-in says of the policy."""
    from bpkit.registry.discovery import registry

    name = name_of(type(policy))
    entry = registry().policies.get(name)
    return entry.summary if entry else (type(policy).__doc__ or name).strip().splitlines()[0]


def beside(policy: Policy, file: str) -> dict[str, Any]:
    """What lies beside the weights under that name; empty if nothing does."""
    from bpkit.learn.trained import TrainedPolicy

    folder = policy.folder if isinstance(policy, TrainedPolicy) else None
    if folder is None or not (folder / file).is_file():
        return {}
    found: dict[str, Any] = json.loads((folder / file).read_bytes())
    return found


def report(found: ExportedPolicy, folder: Path) -> None:
    """Say what was written."""
    for file, agreement in found.validation.items():
        ties = f", {agreement.within_tolerance} near ties apart" if agreement.within_tolerance else ""
        say(
            f"{file}: onnxruntime decides as the policy on {agreement.agree:,} of {agreement.rows:,} rows{ties}; "
            f"largest difference {agreement.largest_difference:.2g}; {found.networks[file].bytes:,} bytes"
        )
    say(f"wrote {folder}; use it with --policy onnx:{folder}")
