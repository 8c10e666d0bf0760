"""`onnx`: any exported policy, run by onnxruntime."""

from __future__ import annotations

from bpkit.installation.distribution import requirement
from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "onnx",
        "bpkit.export.policy:Onnx",
        summary=f"A policy in a file: onnx:exported/NAME runs what `bpkit export` wrote. Needs {requirement('onnx')}.",
        config="bpkit.export.policy:OnnxConfig",
    )
