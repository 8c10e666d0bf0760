"""`bpkit doctor`: what it says of faked installations, and that help stays light."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bpkit.cli.main import build_app
from bpkit.installation import distribution, doctor
from bpkit.installation.distribution import DISTRIBUTION, onnxruntimes
from bpkit.installation.doctor import Finding, as_json, broken, examine, reinstall

Versions = dict[str, str]


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process."""
    return lambda *arguments: CliRunner().invoke(build_app(), list(arguments), prog_name="bpkit")


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Versions, Any], dict[str, Finding]]:
    """What is said where these distributions are installed, and this is what `import onnxruntime` gives."""

    def look(versions: Versions, module: Any) -> dict[str, Finding]:
        monkeypatch.setattr(distribution, "installed", versions.get)

        def load(name: str) -> Any:
            assert os.environ[doctor.TELEMETRY] == "1"
            if isinstance(module, Exception):
                raise module
            return module

        monkeypatch.setattr(importlib, "import_module", load)
        return {finding.name: finding for finding in doctor._onnxruntime()}

    monkeypatch.delenv(doctor.TELEMETRY, raising=False)
    monkeypatch.setenv(doctor.TELEMETRY, "0")  # so that what the look sets is undone
    monkeypatch.setattr(shutil, "which", lambda name: None)
    return look


def runtime(*providers: str) -> Any:
    return SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: list(providers))


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def test_one_distribution_is_fine(runtimes: Any) -> None:
    found = runtimes({"onnxruntime": "1.31.1"}, runtime(CPU))
    assert {name: finding.state for name, finding in found.items()} == dict.fromkeys(
        ("distribution", "telemetry", "version", "providers"), "ok"
    )
    assert found["providers"].value == CPU
    assert "off in bpkit" in found["telemetry"].value


def test_telemetry_that_is_off_for_all_is_said(runtimes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(doctor.TELEMETRY, "1")
    found = runtimes({"onnxruntime": "1.31.1"}, runtime(CPU))["telemetry"]
    assert found.value == "off (ORT_DISABLE_TELEMETRY=1)"
    assert not found.advice


def test_both_distributions_are_a_warning_with_the_commands(runtimes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    found = runtimes(both, runtime(CPU))
    assert found["distribution"].state == "warning"
    assert "onnxruntime 1.31.1, onnxruntime-gpu 1.30.0" in found["distribution"].value
    assert found["distribution"].advice == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'block-policy-kit[onnx]'"
    )
    assert found["providers"].state == "warning"  # the other one overwrote it
    assert not broken(list(found.values()))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert reinstall(both).endswith("pip install 'block-policy-kit[gpu]'")


def test_both_are_found_by_their_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-9.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert onnxruntimes() == {"onnxruntime": "9.9", "onnxruntime-gpu": "9.9"}


def test_what_an_uninstallation_left_behind_is_broken(runtimes: Any) -> None:
    found = runtimes({"onnxruntime": "1.31.1"}, SimpleNamespace())  # an empty namespace package
    assert found["version"].state == "broken"
    assert "pip uninstall -y onnxruntime && pip install" in found["version"].advice
    assert runtimes({"onnxruntime": "1.31.1"}, ImportError("no libonnx.so"))["version"].state == "broken"


def test_no_distribution_is_no_fault(runtimes: Any) -> None:
    found = runtimes({}, None)
    assert [finding.state for finding in found.values()] == ["missing"]
    assert found["distribution"].advice == "pip install 'block-policy-kit[onnx]'"


def test_a_runtime_for_cuda_without_its_provider_is_a_warning(runtimes: Any) -> None:
    assert runtimes({"onnxruntime-gpu": "1.31.1"}, runtime(CPU))["providers"].state == "warning"
    assert runtimes({"onnxruntime-gpu": "1.31.1"}, runtime(CUDA, CPU))["providers"].state == "ok"


# Other sections


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "installed", lambda name: "2.0")
    monkeypatch.setattr(importlib, "import_module", fail)
    found = doctor._package("torch", "")
    assert (found.state, "libcudart" in found.value) == ("broken", True)
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert doctor._package("torch", "").state == "broken"
    assert doctor._package("lightning", "train") == Finding(
        "packages", "lightning", "not installed", "missing", "pip install 'block-policy-kit[train]'"
    )


def test_a_plugin_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from bpkit.registry import discovery

    made = discovery.build([])
    made.failures["strange"] = "ImportError: no module named stranger"
    monkeypatch.setattr(discovery, "registry", lambda: made)
    found = {finding.name: finding for finding in doctor._bpkit()}
    assert found["plug-in strange"].state == "broken"


@pytest.mark.parametrize(
    ("have", "state", "advice"),
    [
        ({DISTRIBUTION: "0.1.0"}, "ok", ""),
        ({DISTRIBUTION: "0.1.0", "bpkit": "0.0.7"}, "warning", "pip uninstall -y bpkit, then install block-policy-kit"),
        ({"bpkit": "0.1.0"}, "warning", "pip uninstall -y bpkit, then install block-policy-kit"),  # an earlier copy
        ({}, "broken", "pip install -e ."),
    ],
)
def test_the_distribution_of_the_other_project_is_told_from_ours(
    monkeypatch: pytest.MonkeyPatch, have: Versions, state: str, advice: str
) -> None:
    monkeypatch.setattr(doctor, "installed", have.get)
    found = next(finding for finding in doctor._bpkit() if finding.name == "distribution")
    assert found.state == state
    assert found.advice.startswith(advice)
    assert bool(found.advice) == (state != "ok")


def test_extras_name_what_they_lack_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        "numpy>=1",
        'lightning>=2.5; extra == "train"',
        'onnxruntime>=1.20; extra == "onnx"',
        'onnxruntime-gpu[cuda]>=1.20; extra == "gpu"',
        'block-policy-kit[onnx,train]; extra == "export"',
        'pytest; extra == "dev"',
    ]
    have = {"numpy": "2.0", "lightning": "2.4", "onnxruntime": "1.31.1"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    names = SimpleNamespace(get_all=lambda key: ["train", "onnx", "gpu", "export", "dev"])
    monkeypatch.setattr(metadata, "metadata", lambda name: names)
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    monkeypatch.setattr(metadata, "version", version)
    found = {finding.name: finding for finding in doctor._extras()}
    assert set(found) == {"train", "onnx", "gpu", "export"}
    assert found["onnx"].value == "installed"
    assert found["train"].value == "lacks lightning>=2.5"
    assert found["train"].advice == "pip install 'block-policy-kit[train]'"
    assert found["export"].value == "lacks lightning>=2.5"
    assert found["gpu"].advice == "pip uninstall -y onnxruntime && pip install 'block-policy-kit[gpu]'"
    del have["onnxruntime"]
    have["onnxruntime-gpu"] = "1.31.1"
    assert distribution.missing("onnx") == distribution.missing("gpu") == []


# The command


def test_an_examination_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def half() -> Any:
        yield Finding("python", "version", "3")
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "_SECTIONS", {"python": half})
    found = examine()
    assert [finding.state for finding in found] == ["ok", "broken"]
    assert as_json(found)["sections"]["python"]["all of it"]["value"] == "RuntimeError: boom"


def test_this_installation_is_whole(run: Callable[..., Result]) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert not found["broken"]
    assert set(found["sections"]) == {"python", "bpkit", "models", "packages", "cuda", "onnxruntime", "extras"}
    assert "forecast" in found["sections"]["bpkit"]["plug-ins"]["value"]


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("missing", 0), ("warning", 0), ("broken", 1)])
def test_only_what_is_broken_fails(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, state: Any, code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("cuda", "devices", "[none]", state, "buy one")])
    result = run("doctor")
    assert result.exit_code == code
    assert "[none]" in result.stdout
    assert ("To mend it: buy one" in result.stdout) == (state in ("warning", "broken"))


def test_help_imports_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys, bpkit.cli.main, bpkit.installation.doctor\n"
        "for command in (['doctor'], ['bench'], ['bench', 'policy'], ['evaluate']):\n"
        "    sys.argv = ['bpkit', *command, '--help']\n"
        "    try: bpkit.cli.main.main()\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'lightning', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
