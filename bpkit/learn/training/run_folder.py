"""The folder of a policy's training: one run, which the same call goes on with, and what is said of it in the end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpkit.files import write_json
from bpkit.learn.training.fit import first_process
from bpkit.learn.training.policy_module import PolicyModule
from bpkit.registry.class_file import file_of
from bpkit.registry.policy_folder import POLICY, TrainedFor, is_policy_folder
from bpkit.types import CostModel


def run_facts(module: PolicyModule, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run this run. A class in a file is being worked on: with another text it is another policy."""
    file = file_of(type(module.policy))
    code = {"policy file": hashlib.sha256(file.read_bytes()).hexdigest()[:16]} if file is not None else {}
    return {
        **code,
        "policy": module.policy.name,
        "policy options": module.policy.config.model_dump(mode="json", exclude={"weights"}),
        "training options": module.options.model_dump(mode="json"),
        "cost model": cost_label(module.cost),
        "decoder": TrainedFor.of(module.spec).model_dump(),
        "prompts": dict(fingerprints),
    }


def cost_label(cost: CostModel) -> str:
    """Name of a cost model, and a fingerprint of its figures where it has any."""
    name = str(getattr(cost, "name", type(cost).__name__))
    if not hasattr(cost, "model_dump_json"):
        return name
    return f"{name} {hashlib.sha256(cost.model_dump_json(exclude={'spread'}).encode()).hexdigest()[:16]}"


def claim(out: Path, facts: dict[str, Any], *, resume: bool) -> bool:
    """Claim the folder for a run. True if that run is finished.

    Raises:
        ValueError: it holds another run, or something else.
    """
    path = out / "run.json"
    if path.is_file() and not resume and first_process():
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (out / POLICY).unlink(missing_ok=True)
    elif path.is_file():
        try:
            known = json.loads(path.read_bytes())
        except ValueError:
            raise ValueError(f"{path} is damaged: train into a new folder, or begin anew with --no-resume") from None
        different = [
            f"{key}: {known.get(key)} there, {facts[key]} here" for key in facts if known.get(key) != facts[key]
        ]
        if different:
            raise ValueError(
                f"{out} holds another run ({'; '.join(different)}): name a new folder, or begin anew with --no-resume"
            )
        return is_policy_folder(out)
    elif out.exists() and any(entry.name not in ("examples", "logs") for entry in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run of `bpkit train`: name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
    return False
