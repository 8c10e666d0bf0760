"""Usual cases decoded once more, with the same decisions: by another policy, by one restored, by exported files."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import cast

from bpkit.export.core import Exportable
from bpkit.installation.distribution import install_command
from bpkit.learn.trained import TrainedPolicy
from bpkit.registry.resolve import resolve_policy
from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import LATER, CheckedPolicy
from bpkit.testing.checks.recorder import CallRecorder, first_difference, raised
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.setup import AGREEABLE, COST, SOURCES

OTHER = 12345
"""Seed of the global generators in the second generation; in the first it is 0."""
AGAIN = 3
"""Usual cases that are decoded once more."""
NEEDED = ("onnx", "onnxruntime", "onnxscript")
"""To export a policy."""


def determinism(policy: CheckedPolicy, out: Findings) -> None:
    """All that a policy decides follows from what it is handed: the seed of its generator and the clock included."""
    compared = 0
    for drafter, usual in policy.ends().items():
        recorder = policy.recorder(drafter)
        for first in usual[:AGAIN]:
            parted = first_difference(first, recorder.record(first.case, surroundings=OTHER))
            if parted is not None:
                out.fail(
                    f"decoded twice with {first}: two fresh policies, the same seed, every step priced by the same "
                    "cost model",
                    f"{policy.name} decides the same both times: random numbers come from `context.generator`, time "
                    "from `step.seconds`",
                    f"{parted.where} was {parted.one} the first time and {parted.other} the second",
                    drafter=drafter,
                )
                break
            compared += len(first.decisions)
    out.said = f"{compared} decisions twice, same seed, steps priced by the same cost model"


def memory(policy: CheckedPolicy, out: Findings) -> None:
    """What a policy keeps across requests can be saved as JSON, and a fresh policy goes on with it as the first did."""
    clean = policy.clean()
    drafter = AGREEABLE if AGREEABLE in clean else next(iter(clean))
    saved, later = policy.saved[drafter], clean[drafter][-LATER:]
    before = len(clean[drafter]) - LATER
    did = f"decoded {before} request{'s' if before > 1 else ''} (drafter {drafter})"
    if isinstance(saved, str):
        out.fail(
            f"{did}, then called {policy.name}.state_dict()",
            f"{policy.name}.state_dict returns a dict of plain JSON values: text, finite numbers, true, false, null, "
            "lists",
            saved,
        )
        return
    restored = policy.recorder(drafter)
    restored.decoder.requests = before  # so that requests to come are of the same number
    fresh, advice = (
        "a fresh policy",
        "it remembers something, and state_dict() is empty: return it there, or keep it in `state`",
    )
    if saved:
        fresh = "a fresh policy that was given its memory"
        advice = "state_dict lacks something that decisions go by"
        try:
            restored.policy.load_state_dict(saved)
        except Exception as error:
            out.fail(
                f"{did}, then handed what state_dict() gave, read back from JSON, to load_state_dict of a fresh policy",
                f"{policy.name}.load_state_dict takes what {policy.name}.state_dict gave",
                raised(error),
            )
            return
    for first in later:
        parted = first_difference(first, restored.record(first.case))
        if parted is not None:
            out.fail(
                f"{did}, then one more with the same policy and with {fresh}: {first.case}",
                f"{policy.name} decides the same in both: all that outlives a request is in state_dict()",
                f"{parted.where} was {parted.one} in the one and {parted.other} in the other: {advice}",
            )
            return
    kept = f"a memory of {len(json.dumps(saved))} bytes" if saved else "no memory"
    out.said = f"{kept}; {sum(len(first.decisions) for first in later)} later decisions the same"


def export(policy: CheckedPolicy, out: Findings) -> None:
    """What an exportable policy writes decides as the policy does: on every row of a trace, and in decoding."""
    drafter, usual = next(iter(policy.clean().items()))
    if drafter == SOURCES:
        raise Skip("policies that need several sources of drafts are not exported")
    fresh = policy.fresh(drafter)
    if not isinstance(fresh, Exportable):
        raise Skip(f"{policy.name} defines no `export`, which says what its networks take and give")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} not installed: {install_command('export')}")
    from bpkit.export.write import export_policy

    spec = setup.decoder(drafter, "fixed:1").spec
    traces = setup.traces(drafter, frozenset(fresh.wants | fresh.wants_optional))
    exportable = cast("TrainedPolicy", fresh)  # any exportable one that has a name
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "exported"
        try:
            made = export_policy(
                exportable, traces, spec, folder, name="checked", summary="Written to be checked.", cost=COST
            )
        except Exception as error:
            out.fail(
                f"exported {policy.name} as `bpkit export` does, for drafter {drafter}, and compared its files with it "
                f"on every row of {len(traces)} traced prompts",
                "files that decide in onnxruntime as the policy does",
                f"{type(error).__name__}: {error}",
            )
            return
        loaded = resolve_policy({"name": "onnx", "path": str(folder)})
        recorder = CallRecorder(setup.decoder(drafter, loaded), drafter)
        for first in usual:
            parted = first_difference(first, recorder.record(first.case), {method for method, _ in first.decisions})
            if parted is not None:
                out.fail(
                    f"exported {policy.name} and decoded with the files, policy `onnx`, {first}",
                    "onnxruntime decides as the policy does",
                    f"{parted.where} was {parted.one} by the policy and {parted.other} by onnxruntime",
                )
                return
    rows = sum(agreement.rows for agreement in made.validation.values())
    decisions = sum(len(first.decisions) for first in usual)
    out.said = f"{rows} rows of a trace and {decisions} decisions while decoding the same in onnxruntime"
