r"""bpkit's policies inside vLLM: scheduler classes that ask them, and a worker that shows them the models' outputs.

    vllm serve MODEL --speculative-config '{...}' --scheduler-cls bpkit_vllm.AsyncPolicyScheduler \
        --additional-config '{"bpkit": {"policy": "turbospec"}}'

Importing this imports neither vLLM nor torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from bpkit.registry.hookspecs import Register, hookimpl

_PLACES = {
    "PolicyScheduler": "bpkit_vllm.scheduler",
    "AsyncPolicyScheduler": "bpkit_vllm.scheduler",
    "FeatureWorker": "bpkit_vllm.worker",
}

__all__ = ["AsyncPolicyScheduler", "FeatureWorker", "PolicyScheduler"]


@hookimpl
def bpkit_register_engines(register: Register) -> None:
    register("vllm", "bpkit_vllm.calibrate:calibrate", summary="vLLM, in this process, as it is installed here.")


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
