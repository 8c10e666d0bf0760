"""From a core to the bytes of an ONNX file: float32, one file, the same bytes every time, and nothing of this machine.

`torch.onnx.export(dynamo=True)` writes the graph; stack traces with local paths, module names and inferred shapes of
inner values are taken out, since they differ from machine to machine and inferred shapes trip up other runtimes.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from bpkit.export.core import Core, Port
from bpkit.policy import PolicyError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

OPSETS = (20, 18)
"""The first is the default; the other is for older runtimes."""
TRACED_AT = {"batch": 3, "width": 5, "positions": 7}
"""Lengths of the axes that vary while the graph is traced. Nothing in the file depends on them."""


def to_onnx(core: Core, *, opset: int = OPSETS[0]) -> bytes:
    """The serialized model of a core, checked in full by `onnx.checker`.

    Raises:
        PolicyError: torch cannot express the module as ONNX, or the result is not valid.
    """
    if opset not in OPSETS:
        raise PolicyError(f"opset {opset} is not supported: choose {' or '.join(map(str, OPSETS))}")
    import onnx

    axes, logger = {name: torch.export.Dim(name) for name in TRACED_AT}, logging.getLogger("torch.onnx")
    shapes: Any = tuple({i: axes[a] for i, a in enumerate(p.shape) if isinstance(a, str)} or None for p in core.inputs)
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(core.module.forward).parameters.values()):
        shapes = (shapes,)  # all inputs are one argument then
    try:
        with warnings.catch_warnings(), ExitStack() as restore:
            warnings.simplefilter("ignore")
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)  # it tells of packages that nobody asked for
            program = torch.onnx.export(
                core.module.eval(),
                tuple(example(port, TRACED_AT, seed) for seed, port in enumerate(core.inputs)),
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=[port.name for port in core.inputs],
                output_names=[port.name for port in core.outputs],
                dynamic_shapes=shapes,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch.onnx raises classes of its own, of several modules
        raise PolicyError(f"the {core.method} network cannot be written as ONNX: {_said(error)}") from error
    assert program is not None
    proto = stripped(program.model_proto)
    _name_axes(proto, core)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise PolicyError(f"the {core.method} network became no valid ONNX model: {error}") from error
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _said(error: BaseException) -> str:
    """The first line of what was wrong in the first place; what torch.onnx makes of it is advice on reports."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def example(port: Port, lengths: dict[str, int], seed: int) -> Tensor:
    """A random input: floats in (0, 1), integers 1 or 2."""
    generator = torch.Generator().manual_seed(seed)
    shape = [lengths[axis] if isinstance(axis, str) else axis for axis in port.shape]
    if port.dtype == "int64":
        return torch.randint(1, 3, shape, generator=generator)
    if port.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.5
    return torch.rand(shape, generator=generator).clamp(0.01, 0.99)


def stripped(proto: Any) -> Any:
    """The model without what says where it was made: stack traces, doc strings, metadata and inner shapes."""
    del proto.metadata_props[:]
    proto.doc_string, proto.producer_name, proto.producer_version = "", "bpkit", ""
    graph = proto.graph
    del graph.metadata_props[:], graph.value_info[:]
    graph.name, graph.doc_string = "policy", ""
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    return proto


def _name_axes(proto: Any, core: Core) -> None:
    """Write the axes as the ports have them; torch names those of outputs after inner sums."""
    for values, ports in ((proto.graph.input, core.inputs), (proto.graph.output, core.outputs)):
        for value, port in zip(values, ports, strict=True):
            dims = value.type.tensor_type.shape.dim
            if len(dims) != len(port.shape):
                raise PolicyError(f"{port.name!r} has {len(dims)} axes in the graph and {len(port.shape)} in its port")
            for dim, axis in zip(dims, port.shape, strict=True):
                if isinstance(axis, str):
                    dim.dim_param = axis
                elif dim.dim_value != axis:
                    dim.dim_value = axis
