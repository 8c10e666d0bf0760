"""What an exportable policy writes decides as the policy does."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import cast

from bpkit.export.core import Exportable
from bpkit.installation.distribution import install_command
from bpkit.learn.trained import TrainedPolicy
from bpkit.policy import Policy
from bpkit.testing.checks.determinism import first_difference
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.runs import Player
from bpkit.testing.checks.stage import COST, stage
from bpkit.testing.checks.subject import Subject

NEEDED = ("onnx", "onnxruntime", "onnxscript")


def export(subject: Subject, out: Findings) -> None:
    """Write the policy as ONNX files, compare on every row of a trace, and decode with the files."""
    drafter, runs = next(iter(subject.clean().items()))
    policy = subject.fresh(drafter)
    if not isinstance(policy, Exportable):
        raise Skip(f"{subject.name} defines no `export`, which says what its networks take and give")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} not installed: {install_command('export')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "exported"
        rows = _written(subject, policy, drafter, folder, out)
        if rows is None:
            return
        player = Player(_loaded(folder), drafter)
        decisions = 0
        for run in runs:
            again = player.play(run.case)
            parted = first_difference(run, again, {method for method, _ in run.decisions})
            if parted is not None:
                where, one, other = parted
                out.fail(
                    f"exported {subject.name} and decoded with the files, policy `onnx`, {run}",
                    "onnxruntime decides as the policy does",
                    f"{where} was {one} by the policy and {other} by onnxruntime",
                )
                return
            decisions += len(again.decisions)
    out.said = f"{rows} rows of a trace and {decisions} decisions while decoding the same in onnxruntime"


def _written(subject: Subject, policy: Policy, drafter: str, folder: Path, out: Findings) -> int | None:
    """Rows that were compared; None if the export failed."""
    from bpkit.export.write import export_policy

    spec = stage().decoder(drafter, "fixed:1").spec
    traces = stage().traces(drafter, frozenset(policy.wants | policy.wants_optional))
    try:
        made = export_policy(
            cast("TrainedPolicy", policy),  # any exportable one that has a name
            traces,
            spec,
            folder,
            name="checked",
            summary="Written to be checked.",
            cost=COST,
        )
    except Exception as error:
        out.fail(
            f"exported {subject.name} as `bpkit export` does, for drafter {drafter}, and compared its files with it on "
            f"every row of {len(traces)} traced prompts",
            "files that decide in onnxruntime as the policy does",
            f"{type(error).__name__}: {error}",
        )
        return None
    return sum(agreement.rows for agreement in made.validation.values())


def _loaded(folder: Path) -> Policy:
    from bpkit.registry.resolve import resolve_policy

    return resolve_policy({"name": "onnx", "path": str(folder)})
