"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from bpkit import __version__


def describe_machine(device: torch.device, drafter_device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, load and versions. A load above the number of threads means that others were at work.

    Args:
        drafter_device: of the drafter, if that is not the target's.
    """
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        **({} if drafter_device is None else _of_drafter(drafter_device)),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bpkit": __version__,
    }


def _of_drafter(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"drafter_device": str(device), "drafter_gpu": gpu}


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as it says itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
