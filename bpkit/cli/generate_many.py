"""`bpkit generate --prompts`: the texts of many prompts, decoded side by side, as a file that can be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bpkit.files import check_writable, write_at_once
from bpkit.progress import Progress
from bpkit.prompts import Prompt

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.decode.result import Generation


class TextFile:
    """JSONL with one text a line. Lines are added as texts end; when all are there, the file has the prompts' order.

    Each line has a key of the prompt and of everything that decides its text, so that lines of another run are noticed.

    Args:
        settings: what decides the texts beside the prompts.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> None:
        check_writable(path)
        self.path = path
        self.keys = {prompt.id: _key(prompt, settings) for prompt in prompts}
        self.lines: dict[str, str] = {}
        """By prompt id, those without an error."""
        if path.exists():
            self._read()

    def _read(self) -> None:
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                name, key = row["id"], row["key"]
            except (ValueError, TypeError, KeyError):
                if not self.lines or number < len(self.lines) + 1:
                    raise ValueError(self._other(f"line {number} is no text of this command")) from None
                continue  # cut off where the run was
            if self.keys.get(name) != key:
                raise ValueError(self._other(f"line {number} ({name}) is of another prompt or of other settings"))
            if "error" not in row:
                self.lines[name] = line

    def _other(self, why: str) -> str:
        return f"{self.path}: {why}; name another file, or delete this one"

    def add(self, file: TextIO, prompt: Prompt, result: Generation) -> None:
        """Note down a text that ended."""
        row: dict[str, Any] = {"id": prompt.id, "domain": prompt.domain, "text": result.text or ""}
        row |= {"tokens": result.tokens.shape[1], "steps": max(len(result.records) - 1, 0), "seed": result.seed}
        row |= {"near_ties": result.near_ties, "fallbacks": result.fallbacks, "key": self.keys[prompt.id]}
        if result.error is not None:
            row["error"] = _why(result.error)
        self.lines[prompt.id] = json.dumps(row, ensure_ascii=False)
        file.write(self.lines[prompt.id] + "\n")
        file.flush()

    def sort(self, prompts: Sequence[Prompt]) -> None:
        """Put the lines into the order of the prompts."""
        lines = [self.lines[prompt.id] for prompt in prompts if prompt.id in self.lines]
        write_at_once(self.path, "".join(f"{line}\n" for line in lines))


def _key(prompt: Prompt, settings: Mapping[str, Any]) -> str:
    what = json.dumps([prompt.text, dict(prompt.options), dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _why(error: Exception) -> str:
    """What ended a row, without its place among the prompts of this run."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"


def generate_all(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    ready: Mapping[str, str],
    file: TextFile,
    progress: Progress,
    **wanted: Any,
) -> dict[str, str]:
    """Decode what the file does not hold yet. Returns what failed, by prompt id.

    Args:
        ready: by prompt id, what the target is handed.
        wanted: of `SpeculativeDecoder.run_many`.
    """
    waiting = [(place, prompt) for place, prompt in enumerate(prompts) if prompt.id not in file.lines]
    progress.start("texts", len(prompts))
    for _ in range(len(prompts) - len(waiting)):
        progress.tick()
    failed: dict[str, str] = {}
    # A prompt's stream of noise is its place in the file, wherever the run goes on.
    rows = [{"prompt": ready[prompt.id], "stream_id": place, **prompt.options} for place, prompt in waiting]
    with file.path.open("a", encoding="utf-8") as out, decoder.run_many(rows, **wanted) as runs:

        def note() -> None:
            for place, result in runs.ended():
                prompt = waiting[place][1]
                file.add(out, prompt, result)
                if result.error is not None:
                    failed[prompt.id] = _why(result.error)
                progress.tick()

        for _ in runs:
            note()
        note()
    file.sort(prompts)
    return failed
