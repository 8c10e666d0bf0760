"""`bpkit export`: a trained policy becomes a folder of ONNX files that decide without bpkit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bpkit.export import schema
from bpkit.export.convert import OPSETS, to_onnx
from bpkit.export.core import KNOWN, Core, Export, Exportable, features_of
from bpkit.export.curves import TYPICAL_CONTEXT, Curves
from bpkit.export.inputs import Inputs, JointInputs
from bpkit.export.load import DESCRIPTION
from bpkit.export.readme import readme
from bpkit.export.session import open_session
from bpkit.export.validate import Comparison, compare
from bpkit.files import write_at_once, write_json
from bpkit.policy import Policy, PolicyError
from bpkit.registry.policy_folder import TrainedFor
from bpkit.registry.resolve import name_of
from bpkit.trace.records import PromptTrace
from bpkit.types import OF_THE_DISTRIBUTION, CostModel, DecoderSpec


def export_policy(
    policy: Policy,
    prompts: Sequence[PromptTrace],
    spec: DecoderSpec,
    out: Path,
    *,
    name: str,
    summary: str,
    cost: CostModel | None = None,
    opset: int = OPSETS[0],
    fingerprints: Mapping[str, str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> schema.ExportedPolicy:
    """Write `policy.json`, its ONNX files and a README to the folder `out`; nothing, unless every row agrees.

    Args:
        policy: not yet bound. prompts: of a validation trace, with the features that it wants.
        cost: of steps, for policies that weigh them; without it, what steps cost where the policy was trained.
        fingerprints: of the weights of `target` and `drafter`.

    Raises:
        PolicyError: the policy is not exportable, or onnxruntime does not decide as it does.
    """
    if not isinstance(policy, Exportable):
        raise PolicyError(
            f"policy {name_of(type(policy))!r} cannot be exported: its class defines no `export(self)`, which says "
            "what its networks take and give (bpkit.export.core)"
        )
    policy.bind(spec, cost)
    what = policy.export()
    cores, curves = what.cores, what.curves or (lambda context_length: Curves([], []))
    data = {f"{stem}.onnx": to_onnx(core, opset=opset) for stem, core in cores.items()}
    runs = {stem: open_session(data[f"{stem}.onnx"]).run for stem in cores}
    joint = joint_inputs(what, spec, cost)
    inputs = {stem: Inputs((port.name for port in core.inputs), curves, joint) for stem, core in cores.items()}
    found = compare(policy, what, runs, inputs, prompts, spec, progress)
    described = description(
        what,
        data,
        spec,
        opset,
        {stem: golden(core, found[stem], runs[stem]) for stem, core in cores.items()},
        name=name,
        policy=name_of(type(policy)),
        summary=summary,
        fingerprints=dict(fingerprints or {}),
        options=policy.config.model_dump(mode="json", exclude={"weights"}),
        validation={
            f"{stem}.onnx": schema.Agreement.model_validate(comparison, from_attributes=True)
            for stem, comparison in found.items()
        },
        evaluation=dict(evaluation or {}),
        provenance=dict(provenance or {}),
    )
    # The description last: a folder that has one is whole.
    for file, content in data.items():
        write_at_once(out / file, content)
    write_at_once(out / "README.md", readme(described))
    write_json(out / DESCRIPTION, described)
    return described


def joint_inputs(what: Export, spec: DecoderSpec, cost: CostModel | None) -> JointInputs | None:
    """What makes costs of all rows together, if the policy reads them."""
    if what.slope is None:
        return None
    features = bool(features_of(what.cores.values()) & OF_THE_DISTRIBUTION)
    return JointInputs(cost, what.block_sizes[1:], spec.work, features=features, slope=what.slope)


def description(
    what: Export,
    data: Mapping[str, bytes],
    spec: DecoderSpec,
    opset: int,
    rows: Mapping[str, schema.Golden],
    **others: Any,
) -> schema.ExportedPolicy:
    """What `policy.json` says.

    Args:
        data: the ONNX files by name. rows: golden ones, by file stem. others: fields that neither of these tells.
    """
    typical = what.curves(TYPICAL_CONTEXT) if what.curves is not None else None
    return schema.ExportedPolicy(
        block_sizes=what.block_sizes,
        drafts=what.drafts,
        branches=what.branches,
        slope=what.slope,
        default_block_size=spec.trained_block_size,
        decoder=TrainedFor.of(spec),
        networks={
            f"{stem}.onnx": schema.Network(
                method=core.method,
                sha256=hashlib.sha256(data[f"{stem}.onnx"]).hexdigest(),
                bytes=len(data[f"{stem}.onnx"]),
                opset=opset,
                inputs=[schema.Tensor.model_validate(port, from_attributes=True) for port in core.inputs],
                outputs=[schema.Tensor.model_validate(port, from_attributes=True) for port in core.outputs],
                margin=core.margin,
                tolerance=core.tolerance,
                golden=rows[stem],
            )
            for stem, core in what.cores.items()
        },
        features=sorted(features_of(what.cores.values())),
        state=sorted({port.name for core in what.cores.values() for port in core.inputs} - KNOWN),
        curves=None if typical is None else schema.Default(**dataclasses.asdict(typical)),
        **others,
    )


def golden(core: Core, comparison: Comparison, run: Callable[[Any], dict[str, NDArray[Any]]]) -> schema.Golden:
    """A few clear rows with what they give. Raises PolicyError if no row was clear."""
    if comparison.golden is None:
        raise PolicyError(f"every {core.method} decision of the trace is a near tie: there is no row to try files by")
    # Through their decimal form, so that whoever reads the file computes from the very same numbers.
    inputs = {name: plain(value.numpy()) for name, value in comparison.golden.items()}
    outputs = run({port.name: np.array(inputs[port.name], port.dtype) for port in core.inputs})
    return schema.Golden(inputs=inputs, outputs={name: plain(value) for name, value in outputs.items()})


def plain(value: NDArray[Any]) -> list[Any]:
    """Nested lists; floats in the shortest decimal form that is the same float32."""
    if value.dtype == np.float32:
        return cast("list[Any]", np.vectorize(lambda x: float(str(x)), otypes=[object])(value).tolist())
    return cast("list[Any]", value.tolist())
