"""Tracing by another checkout of bpkit, in a process of its own, which works when it is asked and waits otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVE = Path(__file__).with_name("serve.py")


class Earlier:
    """Prompt after prompt, by the other checkout."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def trace(self, index: int) -> float:
        """Trace a prompt: its seconds. Raises RuntimeError if the process ended."""
        seconds: float = self._ask(str(index))["seconds"]
        return seconds

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            said = self.process.stdout.readline()
        except BrokenPipeError:
            said = ""
        if not said:
            raise RuntimeError(f"the process of the other checkout ended (exit code {self.process.wait()}): see above")
        return json.loads(said)


@contextmanager
def earlier(checkout: Path, asked: Mapping[str, Any]) -> Iterator[Earlier]:
    """Start it, with what `serve.py` reads first; it has loaded its models when it is handed out.

    Raises:
        ValueError: no checkout of bpkit there.
    """
    if not (checkout / "bpkit" / "__init__.py").is_file():
        raise ValueError(
            f"--against {checkout}: there is no bpkit in this folder; give a checkout of an earlier commit"
        )
    folders = [str(checkout.absolute()), str(checkout.absolute() / "plugins")]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.read_text(encoding="utf-8")],  # as a file, its folder would come first
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        started = Earlier(process)
        started._ask(json.dumps(asked))
        yield started
    finally:
        process.kill()
        process.communicate()
