"""The process that opens and runs a file first, in bounded memory. Imports numpy and onnxruntime, and nothing of bpkit.

`bpkit.export.golden` starts it. Standard input: a line of JSON, then of each file its bytes and its inputs as numpy
writes arrays. Standard output: for each file a line of JSON, then the bytes of the outputs of its first case.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from typing import Any

MEMORY = 1 << 30
"""Bytes that one process may use for the tensors of exported policies, weights aside."""
PER_BYTE = 6
"""Further bytes for each of a file: as bytes, parsed, as weights, and weights once more as the processor likes them."""
MOST_RESULT = 64 << 20


def bound_arena(onnxruntime: Any) -> None:
    """Bound the memory of tensors on the CPU, of all sessions with `session_options`: beyond it, a run fails."""
    where = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    as_requested = 1
    limits = onnxruntime.OrtArenaCfg({"max_mem": MEMORY, "arena_extend_strategy": as_requested})
    onnxruntime.create_and_register_allocator(where, limits)


def session_options(onnxruntime: Any) -> Any:
    """One thread, which sleeps between runs; memory as bounded; always read as ONNX."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in (
        ("session.intra_op.allow_spinning", "0"),
        ("session.inter_op.allow_spinning", "0"),
        ("session.use_env_allocators", "1"),
        ("session.use_device_allocator_for_initializers", "1"),
        # Otherwise four letters in a file that was checked as ONNX make it another format, which was not.
        ("session.load_model_format", "ONNX"),
    ):
        options.add_session_config_entry(name, value)
    return options


def bound_process(memory: int, seconds: int) -> None:
    """Bound what this process maps and computes from now on, where the system has such limits (not on Windows)."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 1))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    except (OSError, ValueError):
        return  # macOS: the bound of the arena holds


def main() -> None:
    """Run every case of every file."""
    source, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whoever prints to standard output does not garble the results
    task = json.loads(source.readline())
    sys.path[:0] = task["paths"]
    import onnxruntime
    from numpy.lib.format import read_array

    bound_arena(onnxruntime)
    given = io.BytesIO(source.read())
    files = []
    for size, cases in task["files"]:
        data = given.read(size)
        files.append((data, [{name: read_array(given, allow_pickle=False) for name in case} for case in cases]))
    bound_process(MEMORY + PER_BYTE * max(len(data) for data, _ in files), task["seconds"])
    for data, cases in files:
        try:
            answer = _run(onnxruntime, data, cases)
        except Exception as error:
            answer = {"error": plain(error)}, b""
        results.write(json.dumps(answer[0]).encode() + b"\n" + answer[1])
        results.flush()


def plain(error: Exception) -> str:
    """What an error of onnxruntime says, without codes, and places in its own sources."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+:\d+ [^()]*\([^()]*\) ?", "", " ".join(str(error).split()))
    return text[:300] or type(error).__name__


def _run(onnxruntime: Any, data: bytes, cases: list[dict[str, Any]]) -> tuple[dict[str, Any], bytes]:
    session = onnxruntime.InferenceSession(data, session_options(onnxruntime), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    described, first = [], b""
    for place, case in enumerate(cases):
        outputs = session.run(names, case)
        described.append([[name, str(v.dtype), list(v.shape)] for name, v in zip(names, outputs, strict=True)])
        if sum(value.nbytes for value in outputs) > MOST_RESULT:
            raise MemoryError(f"the outputs take more than {MOST_RESULT:,} bytes")
        if place == 0:
            first = b"".join(value.tobytes() for value in outputs)
    return {"outputs": described}, first


if __name__ == "__main__":
    main()
