"""The step log: JSON lines, flushed one by one, so that a log ends with the last step whatever ended the program."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from bpkit.decode.observers import Ending, ObservedRequest, Observer, ObserverConfig, ObserverError
from bpkit.types import Prefill, Record, Seconds, Step

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
        self.record_rows([request], record)

    def record_rows(self, requests: Sequence[ObservedRequest], record: Record) -> None:
        about = _of_steps(record) if isinstance(record, Step) else []
        for row, request in enumerate(requests):
            if isinstance(record, Prefill):
                said = dataclasses.asdict(request)
                del said["number"]
                self._write("prefill", request, {**said, **self._of_record(record, row)})
                continue
            number = self._steps[request.number]
            self._steps[request.number] += 1
            self._write("step", request, {"step": number, **about[row], **self._of_record(record, row)})

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        del self._steps[request.number]
        self._write("end", request, dataclasses.asdict(ending))

    def close(self) -> None:
        self._file.close()

    def _of_record(self, record: Record, row: int) -> dict[str, Any]:
        tokens = {}
        if self.config.tokens:
            count = int(record.num_accepted[row]) + 1 if isinstance(record, Step) else 1
            tokens = {"tokens": record.tokens[row, :count].tolist()}
        return {"seconds": _of_seconds(record.seconds), "near_ties": sum(record.near_ties[row : row + 1]), **tokens}

    def _write(self, event: str, request: ObservedRequest, rest: dict[str, Any]) -> None:
        place = {"event": event, "log": self.log, "request": request.number, "time": time.time()}
        self._file.write(json.dumps({"schema_version": SCHEMA_VERSION, **place, **rest}) + "\n")


def _of_steps(step: Step) -> list[dict[str, Any]]:
    """What the log says of each row."""
    names = ("position", "source", "block_size", "draft_length", "verify_length", "num_accepted", "acceptance_length")
    columns = [getattr(step, name).tolist() for name in names]
    return [
        {"row": 0, **dict(zip(names, row, strict=True)), "fallbacks": step.fallbacks}
        for row in zip(*columns, strict=True)
    ]


def _of_seconds(seconds: Seconds) -> dict[str, float]:
    return {"draft": seconds.draft, "verify": seconds.verify, "policy": seconds.policy, "rest": seconds.rest}
