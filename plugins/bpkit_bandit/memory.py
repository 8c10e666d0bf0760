"""The memory of a bandit as plain JSON values, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bpkit.files import write_at_once
from bpkit.policy import PolicyError
from bpkit_bandit.arm import Arm


class Memory(BaseModel):
    """What a bandit keeps across requests and processes.

    Attributes:
        learned_with: names of target and drafter; speeds of another pair would mislead.
        arms: by block size.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    learned_with: dict[str, str] = {}
    arms: dict[int, Arm]


def parse(state: object) -> Memory:
    """Check plain JSON values. Raises PolicyError that names each fault."""
    try:
        return Memory.model_validate(state)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in error.errors())
        raise PolicyError(f"this is no memory of a bandit ({faults})") from None


def read(path: Path) -> Any:
    """The JSON values in a file. Raises PolicyError if it holds something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"this cannot be read as JSON ({error})") from None


def write(path: Path, state: dict[str, Any]) -> None:
    """Replace the file at once: whoever reads it sees the old memory or the new one, never half of one."""
    write_at_once(path, json.dumps(state, indent=1) + "\n")
