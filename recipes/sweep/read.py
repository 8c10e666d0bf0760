"""A sweep: one figure of merit for each prompt and block size, however it was measured.

`layouts` has the files it is read from, `figures` what the figures say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.sweep.layouts import FIGURES, LONG, FigureReading, TableValue, csv_cells, json_cells, listed


@dataclass(frozen=True)
class Sweep:
    """A figure of merit by prompt and block size; more is better.

    Attributes:
        prompts: ids, each once.
        sizes: block sizes, anchor included, ascending: int64 [sizes].
        values: float64 [prompts, sizes], no gaps.
        figure: `acceptance_length` (tokens a step yields, mean over the steps of the prompt) or `tokens_per_second`.
        domains: of each prompt, or None where the file does not say.
        source: where it was read from.
    """

    prompts: tuple[str, ...]
    sizes: NDArray[np.int64]
    values: NDArray[np.float64]
    figure: str = "acceptance_length"
    domains: tuple[str, ...] | None = None
    source: str = ""

    def at(self, sizes: Sequence[int]) -> Sweep:
        """The same prompts with these sizes only. Raises ValueError for a size that was not measured."""
        known = [int(size) for size in self.sizes]
        absent = [size for size in sizes if size not in known]
        if absent:
            raise ValueError(f"{self.source or 'the sweep'} has no block size {listed(absent)}; it has {listed(known)}")
        columns = [known.index(size) for size in sorted(set(sizes))]
        return Sweep(self.prompts, self.sizes[columns], self.values[:, columns], self.figure, self.domains, self.source)


def read_sweep(path: Path, *, figure: str | None = None) -> Sweep:
    """Read a table of prompt by block size: JSON if the name ends in `.json`, else CSV.

    Args:
        path: the file, in one of the layouts that this module names.
        figure: which of `FIGURES` to read. By default the one that the file names; layouts that name none (mapping,
            wide CSV) are taken to hold acceptance lengths.

    Raises:
        ValueError: a value is missing, doubled or impossible; the message says where, and how to mend it.
        FileNotFoundError: there is no such file.
    """
    if figure is not None and figure not in FIGURES:
        raise ValueError(f"figure {figure!r} is not known; known are {listed(FIGURES)}")
    if not path.exists():
        raise FileNotFoundError(f"there is no sweep file {str(path)!r}")
    reading = FigureReading(path, figure)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise reading.fail("not UTF-8 text; save it as CSV or JSON in UTF-8") from None
    found, name = json_cells(reading, text) if path.suffix.lower() == ".json" else csv_cells(reading, text)
    return _table(reading, list(found), name)


def _table(reading: FigureReading, cells: list[TableValue], figure: str) -> Sweep:
    """From cells to a table without gaps."""
    if not cells:
        raise reading.fail(f"it holds no prompts; write one line for each prompt and block size under {LONG}")
    places: dict[tuple[str, int], TableValue] = {}
    for cell in cells:
        _check(reading, cell, figure)
        first = places.setdefault((cell.prompt, cell.size), cell)
        if first is not cell:
            raise reading.fail(
                f"prompt {cell.prompt!r}, block size {cell.size} stands in {first.where} and in {cell.where}; "
                "keep one, or their mean"
            )
    prompts = tuple(dict.fromkeys(cell.prompt for cell in cells))
    sizes = sorted({cell.size for cell in cells})
    gaps = [(prompt, size) for prompt in prompts for size in sizes if (prompt, size) not in places]
    if gaps:
        (prompt, size), more = gaps[0], f" ({len(gaps)} values are missing in all)" if len(gaps) > 1 else ""
        raise reading.fail(
            f"prompt {prompt!r} has no value at block size {size}{more}; measure it, or leave out that prompt or size"
        )
    values = np.array([[places[prompt, size].value for size in sizes] for prompt in prompts])
    return Sweep(
        prompts, np.array(sizes, np.int64), values, figure, _domains(reading, cells, prompts), str(reading.path)
    )


def _domains(reading: FigureReading, cells: list[TableValue], prompts: Sequence[str]) -> tuple[str, ...] | None:
    """The domain of each prompt, or None where no cell has one."""
    found: dict[str, str | None] = {}
    for cell in cells:
        if found.setdefault(cell.prompt, cell.domain) != cell.domain:
            raise reading.fail(
                f"{cell.where}: prompt {cell.prompt!r} has domain {cell.domain!r} here and {found[cell.prompt]!r} "
                "before; give it one"
            )
    if all(domain is None for domain in found.values()):
        return None
    missing = [prompt for prompt in prompts if found[prompt] is None]
    if missing:
        raise reading.fail(f"prompt {missing[0]!r} has no domain though others do; give one to each, or to none")
    return tuple(str(found[prompt]) for prompt in prompts)


def _check(reading: FigureReading, cell: TableValue, figure: str) -> None:
    """Refuse what cannot be measured. A mean acceptance length lies between 1 and the block size."""
    if cell.size < 1:
        raise reading.fail(f"{cell.where}: block size {cell.size}; a block counts its anchor, so 1 is the least")
    if figure == "tokens_per_second":
        if cell.value <= 0:
            raise reading.fail(f"{cell.where}: {cell.value} tokens per second; it must be more than 0")
    elif cell.value < 1:
        raise reading.fail(
            f"{cell.where}: an acceptance length of {cell.value} is below 1, which every step yields; "
            "if these are accepted tokens without the step's last one, add 1"
        )
    elif cell.value > cell.size * (1 + 1e-9):
        raise reading.fail(
            f"{cell.where}: an acceptance length of {cell.value} at block size {cell.size}; a step yields at most as "
            "many tokens as its block has positions, anchor included. If the sizes are draft lengths, add 1 to them; "
            "if the values are tokens per second, say so with --figure tokens_per_second"
        )
