"""Does a file decide as the policy does? Every row of a trace says, at batch sizes that the file was not traced at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.export.core import DECIDES, FEATURES, Core
from bpkit.export.inputs import Given, Inputs
from bpkit.export.rows import at_begin, at_select, at_truncate
from bpkit.policy import Policy, PolicyError, State
from bpkit.trace.records import PromptTrace
from bpkit.types import Context, DecoderSpec, Draft, Feature

Run = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""Runs an ONNX file: outputs by name from inputs by name."""

BATCHES = (1, 2, 7, 64)
"""Batch sizes that rows are run at in turn, none of them that of the example the graph was traced with."""
SHOWN = 3
AT_ONCE = 256


@dataclass
class Comparison:
    """What rows of one file gave.

    Attributes:
        rows, agree, within_tolerance: counts of rows. largest_difference: of float outputs.
        wrong: descriptions of the first rows that differ beyond the tolerance.
        golden: inputs of a few rows of one batch, chosen so that decisions differ.
    """

    rows: int = 0
    agree: int = 0
    within_tolerance: int = 0
    largest_difference: float = 0.0
    wrong: list[str] = field(default_factory=list)
    batch_sizes: set[int] = field(default_factory=set)
    golden: Given | None = None
    variety: int = 0

    def add(self, core: Core, given: Given, decided: Tensor, run: Run) -> None:
        """Rows of one batch, cut into batches of the sizes of `BATCHES`."""
        with torch.inference_mode():
            values = core.module(*(given[port.name] for port in core.inputs))
        wanted = dict(zip((port.name for port in core.outputs), values, strict=True))
        for rows in _batches(len(decided)):
            self.batch_sizes.add(len(rows))
            part = {port.name: _rows_of(given[port.name], port.shape, rows) for port in core.inputs}
            got = run({name: value.numpy() for name, value in part.items()})
            self._compare(core, {name: value[rows] for name, value in wanted.items()}, decided[rows], got)
        self._choose_golden(core, given, decided, wanted[core.margin])

    def _compare(self, core: Core, wanted: dict[str, Tensor], decided: Tensor, got: dict[str, NDArray[Any]]) -> None:
        name = DECIDES[core.method]
        same = got[name] == decided.numpy()
        close = wanted[core.margin].numpy() < core.tolerance
        self.rows += len(decided)
        self.agree += int(same.sum())
        self.within_tolerance += int((~same & close).sum())
        for row in np.flatnonzero(~same & ~close)[:SHOWN]:
            margin = float(wanted[core.margin][row])
            self.wrong.append(
                f"{name} {got[name][row]} where the policy says {int(decided[row])} (margin {margin:.3g})"
            )
        for port in core.outputs:
            if port.dtype == "float32" and got[port.name].size:
                difference = np.abs(got[port.name] - wanted[port.name].numpy())
                self.largest_difference = max(self.largest_difference, float(difference.max()))

    def _choose_golden(self, core: Core, given: Given, decided: Tensor, margin: Tensor) -> None:
        clear = (margin > 10 * core.tolerance).nonzero()[:, 0]
        kinds = {int(decided[row]): int(row) for row in clear}
        if len(clear) and min(len(kinds), 4) > self.variety:
            self.variety = min(len(kinds), 4)
            rows = torch.tensor(sorted(list(kinds.values())[:4]))
            self.golden = {port.name: _rows_of(given[port.name], port.shape, rows) for port in core.inputs}


def compare(
    policy: Policy,
    cores: dict[str, Core],
    runs: Mapping[str, Run],
    prompts: Sequence[PromptTrace],
    spec: DecoderSpec,
    make_inputs: Callable[[Core], Inputs],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Comparison]:
    """Compare every file of a policy with the policy on every row of some prompts.

    Raises:
        PolicyError: a row is decided otherwise although it was not close.
    """
    found = {name: Comparison() for name in cores}
    inputs = {name: make_inputs(core) for name, core in cores.items()}
    for group in _groups(prompts, cores):
        for name, source, state, decided in _questions(policy, cores, group, spec):
            if len(decided):
                found[name].add(cores[name], inputs[name](source, state), decided, runs[name])
        for _ in group:
            progress()
    for name, result in found.items():
        if not result.rows:
            raise PolicyError(f"the trace has no row to try {name}.onnx on: name one with longer outputs")
        if result.wrong:
            more = result.rows - result.agree - result.within_tolerance
            raise PolicyError(
                f"{name}.onnx decides otherwise than the policy on {more} of {result.rows} rows: "
                f"{'; '.join(result.wrong[:SHOWN])}; nothing was exported"
            )
    return found


def _groups(prompts: Sequence[PromptTrace], cores: dict[str, Core]) -> Iterator[Sequence[PromptTrace]]:
    """Prompts that make one batch: many where each is one row, else one, whose positions are rows."""
    size = AT_ONCE if any(core.method == "begin" for core in cores.values()) else 1
    for start in range(0, len(prompts), size):
        yield [prompts[place] for place in range(start, min(start + size, len(prompts)))]


def _questions(
    policy: Policy, cores: dict[str, Core], prompts: Sequence[PromptTrace], spec: DecoderSpec
) -> Iterator[tuple[str, Context | Draft, State, Tensor]]:
    """Each core with what it is asked about a group of prompts, and what the policy's own method answers."""
    names = {core.method: name for name, core in cores.items()}
    # A policy that sees no use in asking reads nothing, but its file does.
    read = {Feature(port.name) for core in cores.values() for port in core.inputs if port.name in FEATURES}
    wants, state = policy.wants | read, State()
    if "begin" in names:
        context = at_begin(prompts, spec, wants)
        state = policy.begin(context)
        yield names["begin"], context, {}, policy.select(state, context)
        return
    (prompt,) = prompts
    rows = at_select(prompt, spec, wants)
    state = policy.begin(rows)
    sizes = policy.select(state, rows)
    if "select" in names:
        yield names["select"], rows, state, sizes
    if "truncate" in names:
        traced = set(prompt.drafts.block_sizes.tolist())
        for size in sorted(set(sizes.tolist()) & traced):
            draft = at_truncate(prompt, rows, size, wants)
            yield names["truncate"], draft, state, policy.truncate(state, draft)
            if "extend" in names:
                for count in range(1, size - 1):
                    begun = draft.first(count)
                    yield names["extend"], begun, state, policy.extend(state, begun)


def _batches(rows: int) -> Iterator[Tensor]:
    start, turn = 0, 0
    while start < rows:
        size = min(BATCHES[turn % len(BATCHES)], rows - start)
        yield torch.arange(start, start + size)
        start, turn = start + size, turn + 1


def _rows_of(value: Tensor, shape: tuple[str | int, ...], rows: Tensor) -> Tensor:
    return value[rows] if shape and shape[0] == "batch" else value
