"""Tracing by the actors of a Ray cluster. Traces come back to the driver, which writes: no shared file system."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bpkit.assets.known import KNOWN
from bpkit.trace.collect.tracer import IndexedPrompt, TraceOptions, Traces
from bpkit.trace.collect.workers import Models, Task, Worker, WorkerError, gone, share_out, tasks_of
from bpkit.trace.records import PromptTrace

LOCAL = "local"
START_SECONDS = 600
"""How long a cluster may take to start the first worker; one that grows on demand needs minutes."""


@dataclass(frozen=True)
class OnRay:
    """Traces on a Ray cluster, with `count` actors of one CPU each and, for models on a GPU, their share of one.

    Args:
        address: `local` starts Ray on this machine and stops it afterwards; `auto` or an address connects. What was
            started before, by whomever, is left running.
    """

    models: Models
    options: TraceOptions
    count: int
    address: str
    batch_size: int = 1

    def traces(self, prompts: Sequence[IndexedPrompt]) -> Traces:
        """Trace each (index, prompt), as they come. Raises WorkerError."""
        if not prompts:
            return
        tasks = tasks_of(prompts, self.batch_size, self.count)
        with _connected(self.address, self.count) as ray:
            actors = [_Actor(ray, self._started(ray)) for _ in tasks[: self.count]]
            try:
                if not ray.wait([actor.give(None) for actor in actors], timeout=START_SECONDS)[0]:
                    raise WorkerError(
                        f"no worker could start within {START_SECONDS // 60} minutes; the cluster has "
                        f"{ray.cluster_resources()}"
                    )
                yield from share_out(actors, tasks, lambda references: ray.wait(references)[0])
            finally:
                for actor in actors:
                    ray.kill(actor.actor)

    def _started(self, ray: Any) -> Any:
        wanted: dict[str, float] = {"num_cpus": 1}
        if (self.models.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"):
            gpus = int(ray.cluster_resources().get("GPU", 0))
            # As many actors on each GPU as it takes; from one without a share, Ray may hide the GPUs.
            wanted["num_gpus"] = 1 / math.ceil(self.count / gpus) if gpus else 1
        models = replace(self.models, target=_absolute(self.models.target), drafter=_absolute(self.models.drafter))
        return ray.remote(Worker).options(**wanted).remote(models, self.options, self.batch_size)


@dataclass(frozen=True)
class _Actor:
    """A worker on the cluster."""

    ray: Any
    actor: Any

    def give(self, task: Task | None) -> Any:
        return self.actor.run.remote(task)

    def take(self, given: Any, task: Task | None) -> list[PromptTrace]:
        try:
            found: list[PromptTrace] = self.ray.get(given)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if type(cause) is WorkerError else WorkerError(str(cause))) from None
        except self.ray.exceptions.RayError as error:
            raise gone("a Ray worker", task, str(error).strip().splitlines()[0]) from None
        return found


@contextmanager
def _connected(address: str, count: int) -> Iterator[Any]:
    """Ray, connected; disconnected and, if it was started here, stopped afterwards."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of what a later version will do
    import ray

    if ray.is_initialized():
        yield ray
        return
    own = {"num_cpus": count, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise WorkerError(
            f"cannot work on Ray at {address!r} ({said}); start a cluster with `ray start --head`, or use --ray local"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _absolute(name: Any) -> Any:
    """A folder by its whole path: workers have another working directory."""
    is_folder = isinstance(name, str) and name not in KNOWN and Path(name).is_dir()
    return str(Path(name).absolute()) if is_folder else name
