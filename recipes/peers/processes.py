"""The processes of the contestants: one works while the others wait for a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from recipes.peers.contestants import Contestant

WORKER = Path(__file__).with_name("worker.py")


class WorkerProcess:
    """A process of `worker.py`. Its stderr goes to the file `errors`, for the message if it ends."""

    def __init__(self, interpreter: str, errors: Path) -> None:
        self.errors = errors
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [interpreter, "-P", str(WORKER)],  # -P: modules of this folder must not hide others
                env=environment(interpreter),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def tell(self, line: Mapping[str, Any]) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `hear` says why

    def hear(self) -> dict[str, Any]:
        """Wait for the reply. Raises RuntimeError with its last words if the process ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            words = self.errors.read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"its process ended (exit code {code}): {' '.join(' '.join(words).split())}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def environment(interpreter: str) -> dict[str, str]:
    """Our own interpreter finds what this process finds; another one only what is installed there."""
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**rest, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} if interpreter == sys.executable else rest


class Contest:
    """Contestants that are loaded, each in the process that it shares with others of its kind.

    Args:
        resources: what ends the processes.

    Attributes:
        left_out: what those said that are not there, by name.
        versions: of libraries, by process.
    """

    def __init__(self, resources: ExitStack) -> None:
        self.resources = resources
        self.folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        self.workers: dict[str, WorkerProcess] = {}
        self.process_of: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}

    @property
    def names(self) -> list[str]:
        """Those that take part, in the order that they were given."""
        return [name for name in self.process_of if name not in self.left_out]

    def load(self, target: str, contestants: Sequence[Contestant]) -> None:
        """Load all at once; those that cannot be loaded are left out."""
        groups: dict[str, list[Contestant]] = {}
        for one in contestants:
            groups.setdefault(one.process, []).append(one)
            self.process_of[one.name] = one.process
        for process, group in groups.items():
            settings = {one.name: dict(one.settings) for one in group}
            try:
                self.workers[process] = worker = WorkerProcess(group[0].interpreter, self.folder / process)
                self.resources.callback(worker.close)
            except OSError as error:
                self._leave_out(process, f"{error.filename}: {error.strerror}")
            else:
                worker.tell({"library": group[0].library, "target": target, "contestants": settings})
        for process, worker in self.workers.items():
            try:
                ready = worker.hear()
            except RuntimeError as error:
                self._leave_out(process, str(error))
            else:
                self.versions[process] = ready["versions"]
                self.left_out |= ready["failed"]

    def ask(self, name: str, **asked: Any) -> dict[str, Any] | None:
        """Let a contestant decode. None if it failed: then it is left out from here on."""
        worker = self.workers[self.process_of[name]]
        try:
            worker.tell({"contestant": name, **asked})
            reply = worker.hear()
        except RuntimeError as error:
            self._leave_out(self.process_of[name], str(error))
            return None
        if "error" in reply:
            self.left_out[name] = reply["error"]
            return None
        return reply

    def _leave_out(self, process: str, why: str) -> None:
        self.left_out |= {name: why for name, its in self.process_of.items() if its == process}


@contextmanager
def contest(target: str, contestants: Sequence[Contestant]) -> Iterator[Contest]:
    """Start the processes, and end them."""
    with ExitStack() as resources:
        made = Contest(resources)
        made.load(target, contestants)
        yield made
