"""`bpkit export`: trained policies as ONNX files that any runtime can load."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit.cli import options
from bpkit.cli.errors import require
from bpkit.cli.evaluate import DEFAULT_SPLIT, filler, parse_fractions
from bpkit.cli.terminal import progress_bar, say
from bpkit.cli.train_policy import portable
from bpkit.policy import PolicyError

if TYPE_CHECKING:
    from bpkit.bench.measure import Progress
    from bpkit.export.schema import ExportedPolicy
    from bpkit.traces.cost import CostTable
    from bpkit.traces.records import PromptTrace
    from bpkit.traces.replay import Fill
    from bpkit.traces.storage import Trace
    from bpkit.trained import TrainedPolicy

_RECOMPUTE = "Features that the trace lacks"


def export(
    context: typer.Context,
    policies: Annotated[
        list[str],
        typer.Argument(
            help="Folders of trained policies, or names whose weights ship, with options if you like "
            "(`forecast:truncate=true`).",
            metavar="POLICY...",
        ),
    ],
    trace: Annotated[
        Path, typer.Option(help="Trace whose validation prompts the files are tried on.", metavar="TRACE")
    ],
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
        str, typer.Option(help="Shares of train, validation and test prompts of the trace.", metavar="A,B,C")
    ] = DEFAULT_SPLIT,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Validation prompts, the first ones.", min=1)] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Run the models again for what policies want and the trace does not hold.",
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
    """Write trained policies as ONNX files, which decide without bpkit, in any runtime.

    Everything that decides is in the files: networks, calibration, table of sizes. onnxruntime must decide as the
    policy does on every position of the validation prompts, or nothing is written.

    `bpkit export runs/forecast --trace TRACE`

    `bpkit export forecast blockpilot ldlp --trace TRACE --recompute --out exported`
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="export", purpose="Exporting")
    require("pyarrow", extra="traces", purpose="A trace")
    from bpkit.bench.splits import split_prompts
    from bpkit.cli.models import load_decoder, quiet_libraries
    from bpkit.traces.cost import read_cost
    from bpkit.traces.storage import open_trace

    quiet_libraries()
    chosen = {spec: trained(spec) for spec in policies}
    names = {spec: name_of(spec, policy, name if len(policies) == 1 else None) for spec, policy in chosen.items()}
    opened = open_trace(trace)
    held = split_prompts(opened.ids, opened.domains, seed=seed, fractions=parse_fractions(split)).validation[:limit]
    work = _Work(opened, list(held), read_cost(cost) if cost else None, opset)
    if recompute:
        work.fill = filler(context, opened)
    if fold:
        work.model = load_decoder(options.settled(context), "fixed").target
    for spec, policy in chosen.items():
        with progress_bar() as bar:
            found = work.export(policy, out / names[spec], names[spec], bar)
        report(found, out / names[spec])


def trained(spec: str) -> TrainedPolicy:
    """The policy that a spec names. Raises PolicyError if it has no weights to export."""
    from bpkit.registry import resolve_policy
    from bpkit.trained import TrainedPolicy

    policy = resolve_policy(spec)
    if not isinstance(policy, TrainedPolicy):
        raise PolicyError(
            f"policy {spec!r} has no trained weights: name a folder that `bpkit train` made, or a policy whose weights "
            "ship"
        )
    return policy


def name_of(spec: str, policy: TrainedPolicy, given: str | None) -> str:
    """The name of the exported policy. Raises ValueError if it cannot be one."""
    name = given or (policy.name if spec.partition(":")[0] == policy.name else Path(spec.partition(":")[0]).name)
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise ValueError(f"{name!r} cannot be the name of an exported policy: use small letters, digits and _ (--name)")
    return name


class _Work:
    """What all exports of a command share."""

    def __init__(self, trace: Trace, places: list[int], cost: CostTable | None, opset: int) -> None:
        self.trace, self.places, self.cost, self.opset = trace, places, cost, opset
        self.fill: Fill | None = None
        self.model: Any = None

    def export(self, policy: TrainedPolicy, out: Path, name: str, progress: Progress) -> ExportedPolicy:
        from bpkit.export.write import export_policy

        spec = self.trace.spec
        if self.model is not None:
            policy = self._folded(policy)
        progress.start(f"{name}: comparing", len(self.places))
        manifest = self.trace.manifest
        return export_policy(
            policy,
            [self._prompt(place, policy) for place in self.places],
            spec,
            out,
            name=name,
            summary=summary_of(policy),
            cost=self.cost,
            opset=self.opset,
            fingerprints={
                kind: facts.fingerprint
                for kind, facts in (("target", manifest.target), ("drafter", manifest.drafter))
                if facts.fingerprint
            },
            evaluation=beside(policy, "evaluation.json"),
            provenance={
                "command": portable(sys.argv[1:]),
                "training": beside(policy, "provenance.json"),
                "versions": versions(),
            },
            progress=progress.tick,
        )

    def _prompt(self, place: int, policy: TrainedPolicy) -> PromptTrace:
        from bpkit.traces.replay import offered

        prompt = self.trace[place]
        missing = policy.wants - offered(prompt)
        if not missing:
            return prompt
        if self.fill is None:
            flags = " ".join(f"--features {feature}" for feature in sorted(missing))
            raise PolicyError(
                f"policy {policy.name!r} reads {', '.join(sorted(missing))}, which the trace does not hold: trace into "
                f"a new folder with `{flags}`, or let them be computed again with `--recompute`"
            )
        return self.fill(prompt, missing)

    def _folded(self, policy: TrainedPolicy) -> TrainedPolicy:
        from bpkit_mlp.blockpilot import BlockPilot
        from bpkit_mlp.fold import fold

        if not isinstance(policy, BlockPilot):
            raise PolicyError(f"--fold is for policies on raw logits, such as blockpilot; {policy.name!r} is none")
        policy.bind(self.trace.spec, self.cost)
        return fold(policy, self.model.get_output_embeddings(), config=self.model.config)


def summary_of(policy: TrainedPolicy) -> str:
    """What the plug-in says of the policy."""
    from bpkit.registry import registry

    entry = registry().policies.get(policy.name)
    return entry.summary if entry else (type(policy).__doc__ or policy.name).strip().splitlines()[0]


def beside(policy: TrainedPolicy, file: str) -> dict[str, Any]:
    """What lies beside the weights under that name; empty if nothing does."""
    path = policy.folder / file if policy.folder is not None else None
    if path is None or not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def versions() -> dict[str, str]:
    """Of the packages that decide what is in the files."""
    from importlib.metadata import version

    return {package: version(package) for package in ("bpkit", "torch", "onnx", "onnxscript", "onnxruntime")}


def report(found: ExportedPolicy, folder: Path) -> None:
    """Say what was written."""
    for file, agreement in found.validation.items():
        ties = f", {agreement.within_tolerance} near ties apart" if agreement.within_tolerance else ""
        say(
            f"{file}: onnxruntime decides as the policy on {agreement.agree:,} of {agreement.rows:,} rows{ties}; "
            f"largest difference {agreement.largest_difference:.2g}; {found.networks[file].bytes:,} bytes"
        )
    say(f"wrote {folder}; use it with --policy onnx:{folder}")
