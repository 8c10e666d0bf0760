"""The step log: JSON lines, flushed one by one, so that a log ends with the last step whatever ended the program."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from pathlib import Path
from typing import Any

from pydantic import Field

from bpkit.decode.observers import Ending, ObservedRequest, Observer, ObserverConfig, ObserverError
from bpkit.types import Prefill, Record, Step

SCHEMA_VERSION = 1


class JsonLinesConfig(ObserverConfig):
    """Options of `jsonl`."""

    path: Path = Field(description="file to append to; it is made, its folder is not")
    tokens: bool = Field(default=False, description="also log the token ids, and with them the text")


class JsonLines(Observer):
    """Appends to a file; generations that overlap, in one process or several, may share it.

    Raises:
        ObserverError: the file cannot be written.
    """

    Config = JsonLinesConfig
    config: JsonLinesConfig

    def __init__(self, config: ObserverConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        try:
            # Line by line: `buffering=1` flushes after each newline.
            self._file = self.config.path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ObserverError(f"observer 'jsonl': cannot append to {str(self.config.path)!r}: {error}") from error
        self.log = uuid.uuid4().hex[:12]
        """Tells apart the observers, and with them the processes, that append to one file."""
        self._steps: dict[int, int] = {}

    def begin(self, request: ObservedRequest) -> None:
        self._steps[request.number] = 0

    def record(self, request: ObservedRequest, record: Record) -> None:
        if isinstance(record, Prefill):
            about = dataclasses.asdict(request)
            del about["number"]
            self._write("prefill", request, {**about, **self._of_record(record, 0)})
            return
        number = self._steps[request.number]
        self._steps[request.number] += 1
        for row in range(record.tokens.shape[0]):
            self._write("step", request, {"step": number, **_of_step(record, row), **self._of_record(record, row)})

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        del self._steps[request.number]
        self._write("end", request, dataclasses.asdict(ending))

    def close(self) -> None:
        self._file.close()

    def _of_record(self, record: Record, row: int) -> dict[str, Any]:
        tokens = {"tokens": record.tokens[row].tolist()} if self.config.tokens else {}
        return {
            "seconds": dataclasses.asdict(record.seconds),
            "near_ties": sum(record.near_ties[row : row + 1]),
            **tokens,
        }

    def _write(self, event: str, request: ObservedRequest, rest: dict[str, Any]) -> None:
        place = {"event": event, "log": self.log, "request": request.number, "time": time.time()}
        self._file.write(json.dumps({"schema_version": SCHEMA_VERSION, **place, **rest}) + "\n")


def _of_step(step: Step, row: int) -> dict[str, Any]:
    lengths = {
        name: int(getattr(step, name)[row])
        for name in ("block_size", "draft_length", "verify_length", "num_accepted", "acceptance_length")
    }
    place = {"row": row, "position": int(step.position[row]), "source": int(step.source[row])}
    return {**place, **lengths, "fallbacks": step.fallbacks}
