"""Golden rows: inputs of a few rows with the outputs that the exporter saw, run once before a file is trusted.

The first run in a process is in a child of bounded memory and time, so that a graph that allocates or computes without
end is an error and not the end of the host. Where the system bounds no memory (Windows, macOS) onnxruntime's own holds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.export import sandbox
from bpkit.export.schema import Network, Tensor
from bpkit.installation.distribution import install_command, requirement
from bpkit.policy import PolicyError

Array = NDArray[Any]
Rows = dict[str, Array]

SECONDS = 60
"""For the first run of all files of a policy, start of the process included (0.3 s on an idle machine)."""
MANY = 64
"""Rows of the largest batch that a file is tried with; the golden rows are repeated."""
MOST_INPUT = 64 << 20
RELATIVE = 1e-4
"""Floats may differ by this share, on top of the tolerance that the policy says."""

_passed: set[str] = set()


def check_golden(files: Mapping[str, tuple[bytes, Network]]) -> None:
    """Run each file that has not been run in this process: on its golden rows, on one of them, and on many.

    Args:
        files: by name for messages: the bytes, checked against their SHA-256, and what `policy.json` says of them.

    Raises:
        PolicyError: a file does not run in bounded memory and time, or gives other outputs than it should.
    """
    new = {file: given for file, given in files.items() if _key(given[1]) not in _passed}
    if not new:
        return
    wanted = {file: rows_of(file, network) for file, (_, network) in new.items()}
    cases = {file: _cases(network, wanted[file][0]) for file, (_, network) in new.items()}
    results = _in_child({file: (data, cases[file]) for file, (data, _) in new.items()})
    for file, (_, network) in new.items():
        shapes, got = results[file]
        for case, outputs in zip(cases[file], shapes, strict=True):
            _check_shapes(file, network, case, outputs)
        compare(file, network, wanted[file][1], got)
        _passed.add(_key(network))


def _key(network: Network) -> str:
    """Of the description, which has the SHA-256 of the file."""
    return hashlib.sha256(network.model_dump_json().encode()).hexdigest()


def rows_of(file: str, network: Network) -> tuple[Rows, Rows]:
    """Inputs and outputs of the golden rows as arrays. Raises PolicyError if they do not fit their description."""
    given, axes = network.golden, dict[str, int]()
    for kind, tensors, rows in (("input", network.inputs, given.inputs), ("output", network.outputs, given.outputs)):
        if {tensor.name for tensor in tensors} != set(rows):
            raise PolicyError(
                f"{file}: policy.json has golden rows for other {kind}s than it describes: export the policy again"
            )
    inputs = {t.name: _array(file, t, given.inputs[t.name], axes) for t in network.inputs}
    outputs = {t.name: _array(file, t, given.outputs[t.name], axes) for t in network.outputs}
    if not axes.get("batch"):
        raise PolicyError(f"{file} has no golden rows in policy.json: export the policy again")
    return inputs, outputs


def _array(file: str, tensor: Tensor, values: list[Any], axes: dict[str, int]) -> Array:
    """Nested lists as the type that the description says; no rounding, no ragged rows, no infinity."""
    try:
        made = np.array(values)
        if made.size and made.dtype.kind not in {"float32": "fi", "int64": "i", "bool": "b"}[tensor.dtype]:
            raise ValueError(f"they are no {tensor.dtype}")
        with np.errstate(over="raise"):
            made = np.ascontiguousarray(made, dtype=tensor.dtype)
        _fit(made.shape, tensor, axes)
    except (ValueError, OverflowError, FloatingPointError, RecursionError) as error:
        raise PolicyError(
            f"{file}: the golden rows of {tensor.name!r} in policy.json do not fit its description ({error}): export "
            "the policy again"
        ) from None
    return made


def _fit(shape: tuple[int, ...], tensor: Tensor, axes: dict[str, int]) -> None:
    """Match a shape with its description. `axes` has the lengths of the named ones seen so far, and takes new ones."""
    said = "x".join(map(str, shape)) or "one number"
    if len(shape) != len(tensor.shape):
        raise ValueError(f"shape {said} for {len(tensor.shape)} axes")
    for length, axis in zip(shape, tensor.shape, strict=True):
        if length != (axes.setdefault(axis, length) if isinstance(axis, str) else axis):
            raise ValueError(f"shape {said}, axis {axis} of another length")


def _cases(network: Network, rows: Rows) -> list[Rows]:
    batched = [tensor.name for tensor in network.inputs if tensor.shape[:1] == ["batch"]]
    if not batched:
        return [rows]
    count = len(rows[batched[0]])
    row_bytes = sum(rows[name].nbytes for name in batched) // count
    many = min(MANY, max(count, MOST_INPUT // max(row_bytes, 1)))
    places = (np.arange(1), np.arange(many) % count)
    return [rows, *({name: v[place] if name in batched else v for name, v in rows.items()} for place in places)]


def _check_shapes(file: str, network: Network, case: Rows, outputs: list[Any]) -> None:
    axes: dict[str, int] = {}
    for tensor in network.inputs:
        _fit(case[tensor.name].shape, tensor, axes)
    found = {name: (dtype, shape) for name, dtype, shape in outputs}
    for tensor in network.outputs:
        dtype, shape = found.get(tensor.name, ("none", []))
        try:
            _fit(tuple(shape), tensor, axes)
        except ValueError as error:
            raise PolicyError(
                f"{file} gives the output {tensor.name!r} another shape than policy.json says ({error}): export the "
                "policy again"
            ) from None
        if dtype != tensor.dtype:
            raise PolicyError(f"{file} gives the output {tensor.name!r} as {dtype}: export the policy again")


def compare(file: str, network: Network, wanted: Rows, got: Rows) -> None:
    """Integers must be equal, floats within the tolerance. Raises PolicyError."""
    for tensor in network.outputs:
        ours, theirs = got[tensor.name], wanted[tensor.name]
        if tensor.dtype == "float32":
            same = np.isclose(ours, theirs, rtol=RELATIVE, atol=network.tolerance)
        else:
            same = ours == theirs
        if not same.all():
            place = int(np.flatnonzero(~same.ravel())[0])
            raise PolicyError(
                f"{file}: this runtime computes otherwise than the one that exported it ({tensor.name} is "
                f"{ours.ravel()[place]:g} and should be {theirs.ravel()[place]:g}; {int((~same).sum())} of {same.size} "
                "golden values differ): use another version of onnxruntime, or export the policy again here"
            )


def _in_child(files: dict[str, tuple[bytes, list[Rows]]]) -> dict[str, tuple[list[Any], Rows]]:
    """Shapes of the outputs of every case, and the outputs of the first, of every file."""
    said: list[bytes] = []
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(_command(), input=_task(files), capture_output=True, timeout=SECONDS, env=environment)
        output, code = done.stdout, done.returncode
        said = done.stderr.splitlines()
    except subprocess.TimeoutExpired as error:
        output, code = error.stdout or b"", None
    except OSError as error:
        raise PolicyError(
            f"the process that tries exported policies cannot start ({error}): check {sys.executable}"
        ) from None
    source = io.BytesIO(output)
    results = {}
    for file in files:
        header = source.readline()
        if not header.endswith(b"\n"):
            raise PolicyError(_death(file, code, said))
        results[file] = _result(file, json.loads(header), source)
    return results


def _task(files: dict[str, tuple[bytes, list[Rows]]]) -> bytes:
    """What the child reads: a line of JSON, then of each file its bytes and its inputs as numpy writes arrays."""
    sizes = [(len(data), [list(case) for case in cases]) for data, cases in files.values()]
    header = {"paths": _homes("numpy", "onnxruntime"), "seconds": SECONDS, "files": sizes}
    task = io.BytesIO()
    task.write(json.dumps(header).encode() + b"\n")
    for data, cases in files.values():
        task.write(data)
        for array in (array for case in cases for array in case.values()):
            np.lib.format.write_array(task, array, allow_pickle=False)
    return task.getvalue()


def _result(file: str, answer: dict[str, Any], source: io.BytesIO) -> tuple[list[Any], Rows]:
    if "error" in answer:
        raise PolicyError(
            f"{file} does not run in onnxruntime within {sandbox.MEMORY >> 20:,} MiB ({answer['error']}): export a "
            "network that does"
        )
    first: Rows = {}
    for name, dtype, shape in answer["outputs"][0]:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        first[name] = np.frombuffer(source.read(size), dtype=dtype).reshape(shape)
    return answer["outputs"], first


def _death(file: str, code: int | None, said: list[bytes]) -> str:
    if code is None:
        return f"{file} did not finish its golden rows within {SECONDS:g} s: export a smaller network"
    last = said[-1].decode(errors="replace").strip()[:200] if said else "no word of why"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (
        f"{file} ended the process that tried it ({how}; {last}), which had {sandbox.MEMORY >> 20:,} MiB and "
        f"{SECONDS:g} s: export a smaller network"
    )


def _command() -> list[str]:
    """Isolated: neither the environment nor site hooks add code to the child."""
    return [sys.executable, "-I", "-S", str(Path(sandbox.__file__))]


def _homes(*packages: str) -> list[str]:
    """Folders that hold the packages, the same that this process takes them from."""
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise PolicyError(
                f"an exported policy needs {package}, which is not installed: {install_command('onnx')}, or "
                f"'{requirement('gpu')}' on CUDA"
            )
        found.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(found))
