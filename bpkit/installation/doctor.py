"""What is installed, whether it works together, and what to do where it does not. Importing this imports no torch."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bpkit import __version__
from bpkit.installation.distribution import DISTRIBUTION, extras, install_command, installed, missing, onnxruntimes

State = Literal["ok", "missing", "warning", "broken"]
TELEMETRY = "ORT_DISABLE_TELEMETRY"
OTHER = "bpkit"
"""On PyPI another project, whose package is called `bpkit`, too; earlier copies of this one had the name as well."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: `missing` is optional and not there; `warning` works, but not as it should; `broken` does not work.
        advice: what to do, often a command; empty if there is nothing to do.
    """

    section: str
    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything. An examination that fails is a finding, not an error."""
    found: list[Finding] = []
    for section, look in _SECTIONS.items():
        try:
            for finding in look():
                found.append(finding)  # so that those before an error stay
        except Exception as error:  # whatever a broken installation raises
            found.append(Finding(section, "all of it", f"{type(error).__name__}: {error}", "broken"))
    return found


def broken(findings: list[Finding]) -> bool:
    """Whether something does not work."""
    return any(finding.state == "broken" for finding in findings)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """`broken`, and section -> name -> value, state, advice."""
    sections: dict[str, dict[str, Any]] = {}
    for finding in findings:
        entry = {"value": finding.value, "state": finding.state, "advice": finding.advice}
        sections.setdefault(finding.section, {})[finding.name] = entry
    return {"schema_version": 1, "broken": broken(findings), "sections": sections}


def as_markdown(findings: list[Finding]) -> str:
    """A block for a bug report: versions, and what is not as it should be, without the user's own paths."""
    lines = []
    for finding in findings:
        stated = [] if finding.state == "ok" else [finding.state.upper()]
        lines.append(f"{finding.section:12} {finding.name:14} {' '.join([*stated, *finding.value.split()])}".rstrip())
    variables = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("BPKIT_")]
    block = "\n".join([*lines, *(f"{'environment':12} {variable}" for variable in variables)])
    return (
        "Command: `bpkit ...` (the one that failed)\n\n"
        "What I expected, and what happened instead:\n\n"
        f"```text\n{without_home(block)}\n```\n\n"
        "Traceback of the same command with `--debug`:\n\n```text\n\n```"
    )


def without_home(text: str) -> str:
    """The text with `~` for the home folder, which holds a name.

    >>> without_home(f"{Path.home()}/models/target")
    '~/models/target'
    """
    home = str(Path.home())
    return text if home == Path.home().anchor else re.sub(rf"{re.escape(home)}(?![\w-])", "~", text)


# Sections


def _python() -> Iterator[Finding]:
    yield Finding("python", "version", platform.python_version())
    yield Finding("python", "platform", platform.platform())


def _bpkit() -> Iterator[Finding]:
    from bpkit.assets import shipped
    from bpkit.registry.discovery import registry

    yield Finding("bpkit", "version", __version__)
    yield _distribution()
    try:
        shipped("target"), shipped("drafter")
        yield Finding("bpkit", "shipped pair", "there")
    except FileNotFoundError as error:
        yield Finding("bpkit", "shipped pair", str(error), "warning", "name models with --target and --drafter")
    known = registry()
    names = sorted(set(known.plugins) - set(known.failures) - set(known.disabled))
    yield Finding("bpkit", "plug-ins", ", ".join(names) or "none")
    for name, how in sorted(known.disabled.items()):
        yield Finding("bpkit", f"plug-in {name}", f"disabled by {how}", "missing")
    for (kind, name), claimed in sorted(known.conflicts.items()):
        advice = " or ".join(f"bpkit --plugin no:{entry.plugin} ..." for entry in claimed)
        who = " and ".join(entry.whose for entry in claimed)
        yield Finding("bpkit", f"{kind} {name}", f"registered by {who}; nobody has it", "broken", advice)
    for name, reason in sorted(known.failures.items()):
        advice = f"reinstall or uninstall its distribution, or bpkit --plugin no:{name} ..."
        yield Finding("bpkit", f"plug-in {name}", reason, "broken", advice)


def _models() -> Iterator[Finding]:
    """Which models of `bpkit models` are here, and whether their drafters are."""
    from bpkit.assets.known import KNOWN

    for model in KNOWN.values():
        if not model.is_there:
            how = f"bpkit models fetch {model.name}"
            yield Finding("models", model.name, "not fetched", "missing", how)
            continue
        try:
            model.own_drafter("drafter"), model.own_drafter("assistant")
            yield Finding("models", model.name, f"fetched, with its drafters: {model.folder}")
        except FileNotFoundError as error:
            yield Finding("models", model.name, f"fetched: {model.folder}", "missing", str(error))


def _distribution() -> Finding:
    """Whether pip knows bpkit by its own name, and no other distribution lays claim to its files."""
    version = installed(OTHER)
    if version is not None:
        reason = f"{OTHER!r} {version} is there, another project or an earlier copy: its files may have replaced ours"
        advice = f"pip uninstall -y {OTHER}, then install {DISTRIBUTION} anew from its copy"
        return Finding("bpkit", "distribution", reason, "warning", advice)
    if installed(DISTRIBUTION) is None:
        advice = "pip install -e . in the folder of its pyproject.toml"
        return Finding("bpkit", "distribution", f"{DISTRIBUTION!r} is not installed", "broken", advice)
    return Finding("bpkit", "distribution", DISTRIBUTION)


def _packages() -> Iterator[Finding]:
    for name, extra in (("torch", ""), ("transformers", ""), ("lightning", "train"), ("onnx", "onnx")):
        yield _package(name, extra)


def _package(name: str, extra: str) -> Finding:
    """Whether it can be imported. `extra`: of bpkit, that brings it; empty for what bpkit cannot do without."""
    version = installed(name)
    how = install_command(extra) if extra else f"pip install --force-reinstall {name}"
    if version is None:
        return Finding("packages", name, "not installed", "missing" if extra else "broken", how)
    try:
        importlib.import_module(name)
    except Exception as error:  # such as an OSError for a shared library that is not there
        reason = f"{version}, which cannot be imported: {type(error).__name__}: {error}"
        return Finding("packages", name, reason, "broken", f"pip install --force-reinstall {name}")
    return Finding("packages", name, version)


def _cuda() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("cuda", "devices", ", ".join(names))
        yield Finding("cuda", "version", f"{built} (of torch)")
    elif shutil.which("nvidia-smi"):
        reason = f"none that torch sees, though there is a driver (torch is built for CUDA {built or '- not at all'})"
        yield Finding("cuda", "devices", reason, "warning", "install the torch for your CUDA: https://pytorch.org")
    else:
        yield Finding("cuda", "devices", "none: everything runs on the CPU")


def _onnxruntime() -> Iterator[Finding]:
    found = onnxruntimes()
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        yield Finding("onnxruntime", "distribution", "not installed", "missing", install_command("onnx"))
        return
    if len(found) > 1:
        reason = f"{said}: they install the same files, and whichever came last overwrote the other"
        yield Finding("onnxruntime", "distribution", reason, "warning", reinstall(found))
    else:
        yield Finding("onnxruntime", "distribution", said)
    yield _telemetry()
    yield from _runtime(found)


def reinstall(found: dict[str, str]) -> str:
    """Commands after which exactly one is installed: the one for CUDA, if there is a driver."""
    remove = f"pip uninstall -y {' '.join(found)}"
    return f"{remove} && {install_command('gpu' if shutil.which('nvidia-smi') else 'onnx')}"


def _telemetry() -> Finding:
    if os.environ.get(TELEMETRY) == "1":
        return Finding("onnxruntime", "telemetry", f"off ({TELEMETRY}=1)")
    advice = f"export {TELEMETRY}=1"
    return Finding("onnxruntime", "telemetry", "off in bpkit; as it comes, in other programs", advice=advice)


def _runtime(found: dict[str, str]) -> Iterator[Finding]:
    """Version and providers, as the imported package says."""
    os.environ[TELEMETRY] = "1"  # onnxruntime reads it when it is imported
    try:
        runtime = importlib.import_module("onnxruntime")
        version, providers = str(runtime.__version__), list(runtime.get_available_providers())
    except Exception as error:  # files that the other distribution took along leave any kind of ruin
        reason = f"cannot be imported: {type(error).__name__}: {error}"
        yield Finding("onnxruntime", "version", reason, "broken", reinstall(found))
        return
    yield Finding("onnxruntime", "version", version)
    lacks = "onnxruntime-gpu" in found and "CUDAExecutionProvider" not in providers
    advice = reinstall(found) if lacks else ""
    yield Finding("onnxruntime", "providers", ", ".join(providers), "warning" if lacks else "ok", advice)


def _extras() -> Iterator[Finding]:
    for extra in extras():
        lacking = missing(extra)
        if not lacking:
            yield Finding("extras", extra, "installed")
            continue
        how = install_command(extra)
        if extra == "gpu" and installed("onnxruntime"):
            how = f"pip uninstall -y onnxruntime && {how}"
        yield Finding("extras", extra, f"lacks {', '.join(lacking)}", "missing", how)


_SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _python,
    "bpkit": _bpkit,
    "models": _models,
    "packages": _packages,
    "cuda": _cuda,
    "onnxruntime": _onnxruntime,
    "extras": _extras,
}
