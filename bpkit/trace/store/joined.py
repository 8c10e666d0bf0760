"""Traces of the same outputs with different drafters, read as one trace of several sources of drafts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bpkit.trace.records import PromptTrace
from bpkit.trace.store.manifest import MANIFEST, TraceError
from bpkit.trace.store.storage import PromptTraces, Trace
from bpkit.types import DecoderSpec, SourceSpec

OF_THE_DRAFTER = frozenset(
    {
        "drafter",
        "drafter_kind",
        "drafter_work",
        "trained_block_size",
        "block_sizes",
        "branches",
        "candidates",
        "features",
        "near_ties",
    }
)
"""What may differ between traces of one output."""


class JoinedTrace(PromptTraces):
    """Traces of one output, each a source of drafts in the order given; features of the target are the first one's.

    Raises:
        TraceError: the traces are not of the same outputs.
    """

    def __init__(self, traces: Sequence[Trace]) -> None:
        self.traces, first = list(traces), traces[0]
        for other in traces[1:]:
            said = first.manifest.differences(other.manifest)
            different = [one for one in said if one.partition(":")[0] not in OF_THE_DRAFTER]
            if different:
                raise TraceError(
                    f"{first.path} and {other.path} are not of the same outputs ({'; '.join(different)}): trace the "
                    f"second with `--outputs-of {first.path}`"
                )
        self.path, self.manifest = first.path, first.manifest
        self.ids, self.domains = first.ids, first.domains

    @property
    def spec(self) -> DecoderSpec:
        """The decoder that replay stands for, with all sources."""
        others = [trace.spec.sources[0] for trace in self.traces[1:]]
        return replace(self.traces[0].spec, others=tuple[SourceSpec, ...](others))

    @property
    def prompt_fingerprints(self) -> list[str]:
        """Of the tokens of each prompt."""
        return self.traces[0].prompt_fingerprints

    def _read(self, index: int) -> PromptTrace:
        first, *others = (trace[index] for trace in self.traces)
        for trace, other in zip(self.traces[1:], others, strict=True):
            if not np.array_equal(first.output_tokens, other.output_tokens):
                raise TraceError(
                    f"the outputs of prompt {first.id!r} differ between {self.path} and {trace.path}, as rounding may "
                    f"decide: trace the second with `--outputs-of {self.path}`"
                )
        return replace(first, others=tuple(other.drafts for other in others))


AnyTrace = Trace | JoinedTrace


def open_trace(folder: Path | str, branches: int | None = None) -> AnyTrace:
    """Open a complete trace, or several of the same outputs, each of which is a source of drafts.

    Args:
        folder: of one trace; or one that holds traces in folders 0, 1, ..., as `bpkit trace` writes of several
            drafters; or folders with `+` between them.
        branches: as of `Trace`, of those whose drafts have more.

    Raises:
        TraceError, FileNotFoundError: with a sentence that says what to do.
    """
    folders = [each for part in _parts(str(folder)) for each in _sources_in(Path(part))]
    traces = [Trace(each) for each in folders]
    if branches is not None:
        traces = [
            Trace(trace.path, branches) if trace.branches > branches or len(traces) == 1 else trace for trace in traces
        ]
    return traces[0] if len(traces) == 1 else JoinedTrace(traces)


def _parts(folder: str) -> list[str]:
    return [folder] if "+" not in folder or Path(folder).exists() else folder.split("+")


def _sources_in(folder: Path) -> Iterator[Path]:
    """The traces in a folder: itself, or those in 0, 1, ..."""
    if (folder / MANIFEST).is_file() or not (folder / "0" / MANIFEST).is_file():
        yield folder
        return
    place = 0
    while (folder / str(place)).is_dir():
        yield folder / str(place)
        place += 1
