"""The engines that are compared, each in a process of its own that sleeps while another works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLAIN, TABLE, FEATURES = "plain", "vllm_table", "@features"
"""vLLM without a drafter, with its own table of draft lengths, and what marks a policy that reads features."""
POLICIES = "policies"
"""The engine of all other methods."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
SCHEDULERS = "bpkit_vllm.timed_scheduler"
WORKER = {"worker_cls": "bpkit_vllm.FeatureWorker"}
"""Of all engines with a drafter, so that all draft alike: it mends DFlash drafts on CPUs. Without policies that read
features it computes none."""


def engine_of(method: str) -> str:
    """The engine that a method runs in.

    >>> [engine_of(method) for method in ("plain", "fixed:4", "joint@features")]
    ['plain', 'policies', '@features']
    """
    if method in (PLAIN, TABLE):
        return method
    return FEATURES if method.endswith(FEATURES) else POLICIES


def policy_of(method: str) -> str | None:
    """The policy of a method; None where vLLM decides by itself."""
    return None if method in (PLAIN, TABLE) else method.removesuffix(FEATURES)


def arguments(
    engine: str, base: Mapping[str, Any], methods: Sequence[str], cost: str, table: Sequence[Sequence[int]] = ()
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`.

    Args:
        base: those that all share. methods: that run in this engine.
        table: of vLLM's own: first and last batch size of a range, and its draft length.
    """
    if engine == PLAIN:
        plain = without(without(base, "speculative_config"), "worker_cls")
        return {**plain, "scheduler_cls": f"{SCHEDULERS}.TimedScheduler"}
    if engine == TABLE:
        drafter = {**base["speculative_config"], "num_speculative_tokens_per_batch_size": table}
        return {**base, **WORKER, "speculative_config": drafter, "scheduler_cls": f"{SCHEDULERS}.TimedScheduler"}
    ours: dict[str, Any] = {"policy": "fixed:1", "cost": cost}
    if engine == FEATURES:
        ours["policies"] = [policy_of(method) for method in methods]
    return {
        **base,
        **WORKER,
        "scheduler_cls": f"{SCHEDULERS}.TimedPolicyScheduler",
        "additional_config": {"bpkit": ours},
    }


def without(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All arguments but one."""
    return {key: value for key, value in arguments.items() if key != name}


class EngineProcess:
    """A process of `worker.py`. Its stderr goes to the file `errors`, for the message if it ends."""

    def __init__(self, arguments: Mapping[str, Any], errors: Path) -> None:
        self.errors = errors
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path]))
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "recipes.vllm.worker"],
                env={**ONE_THREAD, **os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.ask({"arguments": dict(arguments)})

    def ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the reply. Raises RuntimeError if the process ended, ValueError if it refused."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
            said = self.process.stdout.readline()
        except BrokenPipeError:
            said = ""
        if not said:
            code = self.process.wait()
            words = self.errors.read_text(errors="replace").strip().splitlines()[-4:]
            raise RuntimeError(f"the engine's process ended (exit code {code}): {' '.join(' '.join(words).split())}")
        reply: dict[str, Any] = json.loads(said)
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Processes that start within this run on one core alone, with one thread."""
    before, bind = os.sched_getaffinity(0), os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    if core is not None:
        os.sched_setaffinity(0, {core})
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if bind is None:
            os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
