"""Sessions of exported policies: quiet, bounded, on the device that was asked for, without copies."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bpkit.export import sandbox, session
from bpkit.export.session import Session, open_session
from bpkit.policy import PolicyError

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or "CUDAExecutionProvider" not in session._runtime().get_available_providers(),
    reason="needs CUDA and onnxruntime-gpu",
)
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def network() -> bytes:
    """float32 [batch, 4], int64 [batch] -> float32 [batch, 3], int64 [batch], bool [batch]."""
    nodes = [
        helper.make_node("MatMul", ["hidden", "weights"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        helper.make_node("Add", ["best", "length"], ["place"]),
        helper.make_node("Greater", ["place", "length"], ["go_on"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "policy",
        [value("hidden", TensorProto.FLOAT, ["batch", 4]), value("length", TensorProto.INT64, ["batch"])],
        [
            value("scores", TensorProto.FLOAT, ["batch", 3]),
            value("place", TensorProto.INT64, ["batch"]),
            value("go_on", TensorProto.BOOL, ["batch"]),
        ],
        [numpy_helper.from_array(WEIGHTS, "weights")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data


def given(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "hidden": torch.randn(rows, 4, generator=generator),
        "length": torch.randint(0, 9, (rows,), generator=generator),
    }


def assert_right(inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
    scores = inputs["hidden"].cpu() @ torch.from_numpy(WEIGHTS)
    place = scores.argmax(1) + inputs["length"].cpu()
    torch.testing.assert_close(outputs["scores"].cpu(), scores)
    assert outputs["place"].tolist() == place.tolist()
    assert outputs["go_on"].dtype == torch.bool
    assert outputs["go_on"].tolist() == (place > inputs["length"].cpu()).tolist()


@pytest.mark.parametrize("way", ["run_torch", "run_bound"])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_tensors_go_in_and_come_out(way: str, rows: int) -> None:
    opened = open_session(network())
    inputs = given(rows)
    assert_right(inputs, getattr(opened, way)(inputs))


@pytest.mark.parametrize("way", ["run_torch", "run_bound"])
def test_odd_memory_is_fine(way: str) -> None:
    """Slices, transposes and tensors with gradients."""
    opened = open_session(network())
    whole = torch.randn(4, 12, requires_grad=True)
    inputs = {"hidden": whole.T[::2], "length": torch.arange(12)[1::2]}
    assert_right({name: value.detach() for name, value in inputs.items()}, getattr(opened, way)(inputs))


@pytest.mark.parametrize("way", ["run_torch", "run_bound"])
def test_outputs_outlive_later_runs(way: str) -> None:
    opened = open_session(network())
    first, second = given(5), given(6)
    outputs = getattr(opened, way)(first)
    for _ in range(20):
        getattr(opened, way)(second)
    del opened
    assert_right(first, outputs)


def test_inputs_on_the_cpu_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_session(network())
    inputs = given(3)
    seen: dict[str, int] = {}
    run = opened.run
    monkeypatch.setattr(
        opened, "run", lambda arrays: (seen.update({n: a.ctypes.data for n, a in arrays.items()}), run(arrays))[1]
    )
    opened.run_torch(inputs)
    assert seen == {name: value.data_ptr() for name, value in inputs.items()}


def test_other_types_are_refused() -> None:
    opened = open_session(network())
    with pytest.raises(PolicyError, match=r"'hidden' is torch.bfloat16: inputs are float32"):
        opened.run_torch({**given(2), "hidden": torch.zeros(2, 4, dtype=torch.bfloat16)})


def test_arrays_go_in_and_come_out() -> None:
    opened = open_session(network())
    assert (opened.inputs, opened.outputs) == (["hidden", "length"], ["scores", "place", "go_on"])
    inputs = given(4)
    outputs = opened.run({name: value.numpy() for name, value in inputs.items()})
    assert_right(inputs, {name: torch.from_numpy(value) for name, value in outputs.items()})


def test_bytes_are_read_as_onnx_whatever_they_look_like() -> None:
    """Letters at the fifth byte would make onnxruntime read the file as another format than the one checked."""
    data = b"\x12\x08xxORTMxx" + network()
    assert_right(given(2), open_session(data).run_torch(given(2)))


def test_a_file_that_does_not_open_is_an_error() -> None:
    with pytest.raises(PolicyError, match="onnxruntime cannot open the model"):
        open_session(b"\x00\x01")


def test_later_runs_are_bounded_too() -> None:
    """A graph may ask for any amount at any run: beyond the bound the run fails, and the next one is fine."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["large"]), helper.make_node("ReduceMax", ["large"], ["y"])],
        "policy",
        [value("x", TensorProto.FLOAT, [1]), value("shape", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    opened = open_session(made.SerializeToString())

    def ask(size: int) -> None:
        opened.run({"x": np.ones(1, np.float32), "shape": np.array([size])})

    ask(1000)
    with pytest.raises(Exception, match="memory"):
        ask(sandbox.MEMORY // 4 + 1)
    ask(1000)


def test_one_thread_that_sleeps_between_runs() -> None:
    options = sandbox.session_options(session._runtime())
    assert (options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level) == (1, 1, 3)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


# Providers


def test_an_unknown_provider() -> None:
    with pytest.raises(PolicyError, match="no provider 'tpu': choose cpu or cuda"):
        open_session(network(), "tpu")


@pytest.mark.skipif("CUDAExecutionProvider" in session._runtime().get_available_providers(), reason="CUDA is there")
def test_cuda_that_is_not_there_is_an_error() -> None:
    version = metadata.version("onnxruntime")
    with pytest.raises(PolicyError, match=rf"installed: onnxruntime {version}.*pip install 'block-policy-kit\[gpu\]'"):
        open_session(network(), "cuda")


def test_two_packages_that_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "1.2.3")
    assert session._installed() == "installed: onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3, which overwrite each other"


def test_cuda_never_becomes_the_cpu_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime gives a CPU session if the libraries of CUDA do not load."""
    monkeypatch.setattr(session, "_cuda", lambda runtime: ("cuda:0", None, ["CPUExecutionProvider"]))
    with pytest.raises(PolicyError, match=r"would compute on the CPU .*pip install 'block-policy-kit\[gpu\]'"):
        open_session(network(), "cuda")


class Stream:
    """Stands in for a stream of CUDA: says in which order others waited."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, "cuda:0"

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_work_is_put_between_that_of_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("torch", log))
    opened = open_session(network())
    opened = Session(opened._session, "cpu", Stream("policy", log))
    ordinary = opened._session

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(ordinary, name)

        def run_with_iobinding(self, *args: Any) -> None:
            log.append("run")
            ordinary.run_with_iobinding(*args)

    opened._session = Spy()
    assert_right(given(2), opened.run_torch(given(2)))
    assert log == ["policy waits for torch", "run", "torch waits for policy"]


@needs_cuda
@pytest.mark.parametrize("default", [True, False])
def test_cuda_computes_on_the_device_in_the_order_of_the_current_stream(default: bool) -> None:
    opened = open_session(network(), "cuda")
    stream: Any = torch.cuda.current_stream() if default else torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for rows in (1, 7, 64, 4096):
            inputs = {name: value.cuda() for name, value in given(rows).items()}
            busy = torch.randn(2000, 2000, device="cuda")
            for _ in range(20):
                busy = busy @ busy / 2000
            inputs["hidden"] = inputs["hidden"] + 0 * busy.nan_to_num().mean().clamp(-1, 1)
            outputs = opened.run_torch(inputs)
            assert all(value.device.type == "cuda" for value in outputs.values())
            assert_right(inputs, outputs)


# Quiet

QUIET = """
import os, sys
FORBIDDEN = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.")
def hook(event, args):
    if event.startswith(FORBIDDEN):
        raise SystemExit(f"forbidden: {event} {args}")
sys.addaudithook(hook)

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime" and os.environ.get("ORT_DISABLE_TELEMETRY") != "1":
            raise SystemExit("onnxruntime is imported with telemetry on")
sys.meta_path.insert(0, Watch())

import numpy as np
from bpkit.export.session import open_session
assert "onnxruntime" not in sys.modules
session = open_session(open(sys.argv[1], "rb").read())
session.run({"hidden": np.zeros((2, 4), np.float32), "length": np.zeros(2, np.int64)})
assert "torch" not in sys.modules, "torch was imported"
if os.path.isdir("/proc/self/fd"):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    open_now = [os.readlink(link) for link in links if os.path.lexists(link)]
    assert not any(name.startswith("socket") for name in open_now), open_now
print("quiet")
"""


def test_nothing_opens_a_socket_or_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Telemetry is off before onnxruntime is imported; neither python nor the library opens a socket."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    (tmp_path / "network.onnx").write_bytes(network())
    command = [sys.executable, "-c", QUIET, str(tmp_path / "network.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "quiet\n"
