"""A trace on disk: written prompt by prompt, read prompt by prompt."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from bpkit.files import write_json
from bpkit.trace.fingerprint import fingerprint_values
from bpkit.trace.records import PromptTrace
from bpkit.trace.store.manifest import MANIFEST, Manifest, TraceError, read_manifest
from bpkit.trace.store.parquet import from_tables, to_tables
from bpkit.types import DecoderSpec

NAMES = ("prompts", "drafts")
UNFINISHED = ".tmp"
"""Suffix of files that are being written; those that are done have another name."""
COMPRESSION = "zstd"
LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, for as long as the context lasts or this process lives.

    Raises:
        TraceError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TraceError(
            f"{folder} is being traced by another run: two runs on one folder would get in each other's way. Wait for "
            "it, or name another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # some systems cannot remove what is open
            (folder / LOCK).unlink()  # before it is released: later it may be another run's
        lock.release()


@contextmanager
def _readable(what: str, remedy: str = "trace again into a new folder") -> Iterator[None]:
    """Raise TraceError for what goes wrong while `what` is read."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, IndexError, ValueError) as error:
        raise TraceError(f"{what} cannot be read ({error}); {remedy}") from error


class TraceWriter:
    """Writes a trace so that it can be killed at any moment: a prompt is there whole, or not at all.

    Each prompt goes into `parts/` first. When all are there, the parts become the two tables, a row group for each
    prompt, in the order of the prompts whatever order they came in. One writer at a time: see `claimed`.

    Raises:
        TraceError: the folder holds another trace.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.parts, self.manifest = folder, folder / "parts", manifest
        if (folder / MANIFEST).exists():
            self.manifest = read_manifest(folder)
            if different := self.manifest.differences(manifest):
                raise TraceError(
                    f"{folder} holds a trace of something else ({'; '.join(different)}); name a new folder, or give "
                    "the arguments of the trace that is there"
                )
        else:
            # Whoever was killed before the manifest was there left at most a hidden file.
            found = list(folder.iterdir()) if folder.exists() else []
            if any(path.suffix != UNFINISHED and path.name != LOCK for path in found):
                raise TraceError(f"{folder} is not empty and holds no trace; name a new folder")
            write_json(folder / MANIFEST, manifest)
        if self.manifest.complete:
            self._clear()
        else:
            self.parts.mkdir(exist_ok=True)

    def missing(self) -> list[int]:
        """Indices of prompts that are not written yet."""
        if self.manifest.complete:
            return []
        return [i for i in range(len(self.manifest.prompt_ids)) if not self._part(i, "prompts").exists()]

    def write(self, trace: PromptTrace) -> None:
        """Write one prompt. The row of the prompt comes last: where it is, the drafts are."""
        tables = dict(zip(NAMES, to_tables(trace), strict=True))
        for name in ("drafts", "prompts"):
            part = self._part(trace.index, name)
            partial = part.with_suffix(f".{os.getpid()}{UNFINISHED}")
            pq.write_table(tables[name], partial, compression=COMPRESSION)
            os.replace(partial, part)

    def finish(self) -> Manifest:
        """Join the parts and say that the trace is complete."""
        if self.manifest.complete:
            return self.manifest
        count = len(self.manifest.prompt_ids)
        partials = {name: self.folder / f".{name}.{os.getpid()}{UNFINISHED}" for name in NAMES}
        for name, partial in partials.items():
            _join([self._part(i, name) for i in range(count)], partial)
        for name, partial in partials.items():
            os.replace(partial, self.folder / f"{name}.parquet")
        rows = pq.read_table(self.folder / "prompts.parquet", columns=["near_ties", "output_tokens"])
        counts = {name: sum(len(chunk.flatten()) for chunk in rows.column(name).chunks) for name in rows.column_names}
        self.manifest = self.manifest.model_copy(update={"complete": True, **counts})
        write_json(self.folder / MANIFEST, self.manifest)
        self._clear()
        return self.manifest

    def _clear(self) -> None:
        """Remove the parts of a complete trace, and what runs that were killed left behind."""
        for path in self.folder.glob(f".*{UNFINISHED}"):
            path.unlink()
        if self.parts.is_dir():
            for part in self.parts.iterdir():
                part.unlink()
            self.parts.rmdir()

    def _part(self, index: int, name: str) -> Path:
        return self.parts / f"{index:06d}.{name}.parquet"


def _join(parts: Sequence[Path], out: Path) -> None:
    """Copy the parts into one file, a row group each, one in memory at a time."""
    with pq.ParquetWriter(out, pq.read_schema(parts[0]), compression=COMPRESSION) as writer:
        for part in parts:
            with _readable(str(part), "delete it and run the same command again"):
                table = pq.read_table(part)
            writer.write_table(table, row_group_size=max(1, len(table)))


class PromptTraces(Sequence[PromptTrace]):
    """Prompts that are read when they are asked for.

    Attributes:
        ids: of all prompts, in their order.
    """

    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> PromptTrace: ...
    @overload
    def __getitem__(self, place: slice) -> list[PromptTrace]: ...
    def __getitem__(self, place: int | slice) -> PromptTrace | list[PromptTrace]:
        found = range(len(self))[place]
        return self._read(found) if isinstance(found, int) else [self._read(i) for i in found]

    @abstractmethod
    def _read(self, index: int) -> PromptTrace:
        """One prompt by its place. Raises TraceError."""


class Trace(PromptTraces):
    """A complete trace. Prompts are read when they are asked for, so that memory stays flat.

    Args:
        branches: of drafts at most, where candidates were traced; by default all.
    """

    def __init__(self, folder: Path, branches: int | None = None) -> None:
        self.path, self.manifest = folder, read_manifest(folder)
        self.branches = self.manifest.branches if branches is None else branches
        if self.branches != self.manifest.branches and not (
            self.manifest.candidates and 1 <= self.branches < self.manifest.branches
        ):
            raise TraceError(
                f"{folder} cannot be read with {branches} branches: its drafts have {self.manifest.branches}; with "
                "fewer only traces of block diffusion are read"
            )
        if not self.manifest.complete:
            parts = len(list((folder / "parts").glob("*.prompts.parquet")))
            raise TraceError(
                f"{folder} is not complete ({parts} of {len(self.manifest.prompt_ids)} prompts): run the same "
                f"`bpkit trace --out {folder} ...` again, it goes on where it stopped"
            )
        with _readable(str(folder)):
            self._files = [pq.ParquetFile(folder / f"{name}.parquet") for name in NAMES]
            labels = self._files[0].read(columns=["id", "domain"])
            self.ids: list[str] = labels.column("id").to_pylist()
            self.domains: list[str] = labels.column("domain").to_pylist()
        groups = {file.num_row_groups for file in self._files}
        if tuple(self.ids) != self.manifest.prompt_ids or groups != {len(self.ids)}:
            raise TraceError(f"tables and manifest of {folder} are of different traces; trace again into a new folder")

    @property
    def spec(self) -> DecoderSpec:
        """The decoder that this trace stands for."""
        return self.manifest.spec.with_branches(self.branches)

    @cached_property
    def prompt_fingerprints(self) -> list[str]:
        """Of the tokens of each prompt, from that column alone."""
        with _readable(str(self.path)):
            column = self._files[0].read(columns=["prompt_tokens"]).column("prompt_tokens")
        return [fingerprint_values(tokens) for tokens in column.to_pylist()]

    def _read(self, index: int) -> PromptTrace:
        prompts, drafts = self._files
        with _readable(f"prompt {self.ids[index]!r} of {self.path}"):
            tables = prompts.read_row_group(index), drafts.read_row_group(index)
            trace = from_tables(*tables, self.manifest.block_sizes)
        return trace
