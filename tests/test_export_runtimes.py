"""The exported files decide alike in every runtime, on the rows that come with them and on other lengths of the axes.

`make runtimes` installs the runtimes into build/runtimes and tries all of them; without it, those that are not there
are skipped. BPKIT_EXPORTED names another folder of exported policies to try.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bpkit.export.schema import ExportedPolicy, Network

ROOT = Path(__file__).parent.parent
EXAMPLES, HELPERS, INSTALLED = ROOT / "docs/examples/runtimes", ROOT / "tests/runtimes", ROOT / "build/runtimes"
EXPORTED = Path(os.environ.get("BPKIT_EXPORTED", ROOT / "exported")).resolve()
FOLDERS = sorted(path.parent for path in EXPORTED.glob("*/policy.json"))
FILES = [f"{file.parent.name}/{file.name}" for folder in FOLDERS for file in sorted(folder.glob("*.onnx"))]
PYTHON = INSTALLED / "venv/bin/python"

NEEDS = "needs onnx and onnxruntime: pip install 'block-policy-kit[onnx]'"

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """Inputs of one network, and what it must give."""

    what: str
    file: Path
    network: Network
    inputs: Values
    expected: Values


def described(folder: Path) -> ExportedPolicy:
    return ExportedPolicy.model_validate_json((folder / "policy.json").read_bytes())


def array(values: object, dtype: str) -> NDArray[Any]:
    return np.array(values, dtype=dtype)


@cache
def cases() -> list[Case]:
    """Of every file: its rows at once, twice, each alone, and drafts of other widths, as onnxruntime decides them."""
    found = []
    for folder in FOLDERS:
        for name, network in described(folder).networks.items():
            inputs = {t.name: array(network.golden.inputs[t.name], t.dtype) for t in network.inputs}
            expected = {t.name: array(network.golden.outputs[t.name], t.dtype) for t in network.outputs}
            shapes = {t.name: t.shape for t in (*network.inputs, *network.outputs)}
            file = folder / name
            found.append(Case("all rows", file, network, inputs, expected))
            twice = [
                {n: np.concatenate([v, v]) if shapes[n][0] == "batch" else v for n, v in values.items()}
                for values in (inputs, expected)
            ]
            found.append(Case("all rows twice", file, network, *twice))
            for row in range(len(next(iter(expected.values())))):
                one = [
                    {n: v[row : row + 1] if shapes[n][0] == "batch" else v for n, v in values.items()}
                    for values in (inputs, expected)
                ]
                found.append(Case(f"row {row} alone", file, network, *one))
            widths = {v.shape[i] for n, v in inputs.items() for i, axis in enumerate(shapes[n]) if axis == "width"}
            for width in (1, *(w - 1 for w in widths if w > 2)) if widths else ():
                narrow = {n: at_width(n, v, shapes[n], width) for n, v in inputs.items()}
                found.append(Case(f"width {width}", file, network, narrow, by_onnxruntime(file, narrow)))
    return found


def at_width(name: str, value: NDArray[Any], shape: list[int | str], width: int) -> NDArray[Any]:
    """An input of a draft of fewer tokens."""
    if name in ("draft_length", "block_size"):
        return value.clip(max=width + (name == "block_size"))
    return value[tuple(slice(width) if axis == "width" else slice(None) for axis in shape)]


@cache
def onnxruntime_session(file: Path) -> Any:
    session = pytest.importorskip("bpkit.export.session", reason=NEEDS)
    pytest.importorskip("onnxruntime", reason=NEEDS)
    return session.open_session(file.read_bytes())


def by_onnxruntime(file: Path, inputs: Values) -> Values:
    outputs: Values = onnxruntime_session(file).run(inputs)
    return outputs


def by_the_reference(file: Path, inputs: Values) -> Values:
    evaluators = pytest.importorskip("onnx.reference", reason=NEEDS)
    evaluator = evaluators.ReferenceEvaluator(str(file))
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def by_cpp(file: Path, inputs: Values) -> Values:
    """By the example in C++."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler: install g++")
    program = needed(INSTALLED / "network")
    lines = [
        f"{n} {'x'.join(map(str, v.shape))} {' '.join(map(str, v.astype(v.dtype).flat))}" for n, v in inputs.items()
    ]
    text = "\n".join(lines).replace("True", "1").replace("False", "0")
    answer = subprocess.run([program, file], input=text, capture_output=True, text=True, check=True).stdout
    outputs = {}
    for line in answer.splitlines():
        name, shape, *values = line.split()
        dtype = next(t.dtype for t in network_of(file).outputs if t.name == name)
        outputs[name] = np.array([*map(float, values)]).astype(dtype).reshape([*map(int, shape.split("x"))])
    return outputs


@cache
def network_of(file: Path) -> Network:
    return described(file.parent).networks[file.name]


def needed(path: Path, what: str = "") -> str:
    """A program, or skip; `make runtimes` must find all."""
    if not path.exists():
        message = f"{what or path.relative_to(ROOT)} is missing: `make runtimes` installs the runtimes and tries them"
        if os.environ.get("BPKIT_RUNTIMES") == "all":
            pytest.fail(message)
        pytest.skip(message)
    return str(path)


def node() -> str:
    needed(INSTALLED / "node/node_modules", "onnxruntime-node")
    return needed(Path(shutil.which("node") or INSTALLED / "node/bin/node"), "node")


@cache
def answers(*command: str) -> list[dict[str, Any]]:
    """What a runtime in another process says to all cases."""
    given = [
        {
            "file": str(case.file),
            "inputs": {
                n: {"dtype": str(v.dtype), "shape": v.shape, "values": v.ravel().tolist()}
                for n, v in case.inputs.items()
            },
            "outputs": [tensor.name for tensor in case.network.outputs],
        }
        for case in cases()
    ]
    where = INSTALLED / "node"
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, cwd=where, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def elsewhere(command: Callable[[], list[str]]) -> Callable[[Path, Values], Values]:
    """A runtime in another process, asked once for all cases."""

    def run(file: Path, inputs: Values) -> Values:
        place = next(i for i, case in enumerate(cases()) if case.file == file and case.inputs is inputs)
        answer = answers(*command())[place]
        assert "error" not in answer, answer["error"]
        return {n: array(t["values"], t["dtype"]).reshape(t["shape"]) for n, t in answer.items()}

    return run


RUNTIMES: dict[str, Callable[[Path, Values], Values]] = {
    "onnxruntime": by_onnxruntime,
    "onnx reference": by_the_reference,
    "onnxruntime-node": elsewhere(lambda: [node(), str(HELPERS / "run_cases.mjs"), "onnxruntime-node"]),
    "onnxruntime-web": elsewhere(lambda: [node(), str(HELPERS / "run_cases.mjs"), "onnxruntime-web"]),
    "openvino": elsewhere(lambda: [needed(PYTHON), str(HELPERS / "run_cases.py"), "openvino"]),
    "openvino in C++": by_cpp,
    "tract": elsewhere(lambda: [needed(PYTHON), str(HELPERS / "run_cases.py"), "tract"]),
}


@pytest.fixture(autouse=True)
def _something_to_try(request: pytest.FixtureRequest) -> None:
    if "folder" in request.fixturenames or "runtime" in request.fixturenames:
        if not EXPORTED.exists() and os.environ.get("BPKIT_RUNTIMES") != "all":
            pytest.skip(f"there is no {EXPORTED.name}/: `bpkit export` writes it")
        assert FOLDERS, f"{EXPORTED} has no exported policy"


@pytest.mark.parametrize("file", FILES or [""])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_decides_as_the_file_says(runtime: str, file: str) -> None:
    tried = [case for case in cases() if case.file == EXPORTED / file]
    assert len(tried) >= 3
    for case in tried:
        found = RUNTIMES[runtime](case.file, case.inputs)
        agree(case, found)


def agree(case: Case, found: Values) -> None:
    """Types, shapes and decisions are equal, floats within the tolerance of the file."""
    assert set(found) == set(case.expected)
    tolerance = case.network.tolerance
    # Golden rows are clear; others may not be.
    clear = case.expected[case.network.margin] >= tolerance
    for name, expected in case.expected.items():
        what, value = f"{case.what}: {name}", found[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), what
        if value.dtype == np.float32:
            np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance, err_msg=what)
        else:
            np.testing.assert_array_equal(value[clear], expected[clear], err_msg=what)


def in_python(folder: Path) -> subprocess.CompletedProcess[str]:
    """The example in Python."""
    pytest.importorskip("bpkit.export.session", reason=NEEDS)
    pytest.importorskip("onnxruntime", reason=NEEDS)
    command = [sys.executable, str(EXAMPLES / "policy.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def in_javascript(runtime: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The example in JavaScript."""
    command = [node(), str(EXAMPLES / "node.mjs"), runtime, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=INSTALLED / "node")


@pytest.mark.parametrize("folder", FOLDERS or [Path()], ids=lambda path: path.name)
def test_the_example_in_python_runs(folder: Path) -> None:
    said = in_python(folder)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"{described(folder).name}: every golden row agrees")
    assert "None" not in said.stdout


@pytest.mark.parametrize("folder", FOLDERS or [Path()], ids=lambda path: path.name)
@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_the_example_in_javascript_decides_as_the_one_in_python(runtime: str, folder: Path) -> None:
    said = in_javascript(runtime, folder)
    assert said.returncode == 0, said.stderr
    assert numbers(said.stdout) == numbers(in_python(folder).stdout)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.replace("True", "1").replace("False", "0"))]


@pytest.mark.parametrize("folder", FOLDERS[:1] or [Path()], ids=lambda path: path.name)
@pytest.mark.parametrize("language", ["python", "javascript"])
def test_the_examples_refuse_a_changed_file(language: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = next(copy.glob("*.onnx"))
    file.write_bytes(file.read_bytes() + b"\0")
    said = in_python(copy) if language == "python" else in_javascript("onnxruntime-node", copy)
    assert said.returncode == 1
    assert f"{file.name} is not the file that policy.json describes" in said.stderr


def test_the_page_shows_the_examples_as_they_are() -> None:
    page = (ROOT / "docs/other_runtimes.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^<!-- (examples/runtimes/\S+) -->\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    files = {str(path.relative_to(ROOT / "docs")): path for path in EXAMPLES.iterdir() if path.is_file()}
    assert set(shown) == set(files)
    for name, path in files.items():
        assert shown[name] == path.read_text(encoding="utf-8"), f"docs/other_runtimes.md shows another {name}"


def test_the_json_schema_is_that_of_the_classes() -> None:
    path = ROOT / "docs/policy.schema.json"
    made = subprocess.run([sys.executable, "-m", "bpkit.export.schema"], capture_output=True, text=True, check=True)
    message = "write it anew: python -m bpkit.export.schema > docs/policy.schema.json"
    assert path.read_text(encoding="utf-8") == made.stdout, message


@pytest.mark.parametrize("folder", FOLDERS or [Path()], ids=lambda path: path.name)
def test_a_description_is_valid_by_the_json_schema(folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install jsonschema")
    schema = json.loads((ROOT / "docs/policy.schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    description = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    validator(schema).validate(description)
    description["networks"] = {"../evil.onnx": next(iter(description["networks"].values()))}
    assert not validator(schema).is_valid(description)
