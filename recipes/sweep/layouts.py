"""Five layouts of a table of prompt by block size, read cell by cell; an error names the place and how to mend it.

    the published one   {"block_sizes": [4, 8], "prompts": [{"index": 0, "acceptance_length": {"4": 3.4, "8": 5.1}}]}
    JSON, mapping       {"prompt-a": {"4": 3.4, "8": 5.1}}
    JSON, rows          [{"prompt": "prompt-a", "block_size": 4, "acceptance_length": 3.4}, ...]
    CSV, wide           prompt,4,8
    CSV, long           prompt,block_size,acceptance_length

`domain` may stand beside the prompt in all but the mapping. `tokens_per_second` may stand for `acceptance_length`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = ("acceptance_length", "tokens_per_second")
"""What a sweep may hold. More is better for each."""

_IDS = ("prompt", "id", "index")
LONG = "`prompt,block_size,acceptance_length`"


@dataclass(frozen=True)
class TableValue:
    """One value as it stands in a file; `where` names it for whoever has to mend it."""

    prompt: str
    size: int
    value: float
    domain: str | None
    where: str


@dataclass(frozen=True)
class FigureReading:
    """What is known while a file is read."""

    path: Path
    figure: str | None

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def choose(self, names: Sequence[str]) -> str:
        """The figure to read among those that a file holds by name."""
        found = [name for name in FIGURES if name in names]
        if self.figure is not None:
            if self.figure not in found:
                raise self.fail(f"there is no '{self.figure}'; it has {listed(names)}")
            return self.figure
        if len(found) == 1:
            return found[0]
        if found:
            raise self.fail(f"it holds both {listed(found)}: say which is meant with --figure")
        raise self.fail(f"it holds neither 'acceptance_length' nor 'tokens_per_second', but {listed(names)}")

    @property
    def unnamed(self) -> str:
        """The figure of layouts that do not name theirs."""
        return self.figure or FIGURES[0]


def listed(names: Sequence[object]) -> str:
    return ", ".join(str(name) for name in names)


def _number(reading: FigureReading, value: object, where: str) -> float:
    """A finite number. In CSV it is a text that says one."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (ValueError, OverflowError):
        if value is None or value == "":
            raise reading.fail(f"{where}: the value is missing; measure it, or leave out that prompt or size") from None
        raise reading.fail(f"{where}: {value!r} is not a number; write it as 5.25") from None
    return number


def _size(reading: FigureReading, value: object, where: str) -> int:
    """A block size: a whole number, or a text that says one."""
    text = str(value).strip()
    if isinstance(value, (bool, float)) or not text.isascii() or not text.isdigit():
        raise reading.fail(f"{where}: block size {value!r} is not a whole number; write it as 16")
    return int(text)


def _name(reading: FigureReading, value: object, where: str) -> str:
    """A prompt's id: a text or a whole number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise reading.fail(f"{where}: the prompt needs an id, a text or a whole number, not {value!r}")
    return str(value).strip()


def _domain(value: object) -> str | None:
    return None if value is None or not str(value).strip() else str(value).strip()


# JSON

Found = tuple[Iterator[TableValue], str]


def json_cells(reading: FigureReading, text: str) -> Found:
    """Cells of a JSON file, and the figure they are of."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # `json` keeps the last of two equal keys, and nobody would learn that a value was lost.
        seen = dict(pairs)
        if len(seen) < len(pairs):
            keys = [key for key, _ in pairs]
            raise reading.fail(f"{next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object; keep one")
        return seen

    try:
        data = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise reading.fail(f"not valid JSON ({error})") from None
    if isinstance(data, dict) and isinstance(data.get("prompts"), list):
        return _published(reading, data)
    if isinstance(data, list):
        return _rows(reading, data)
    if isinstance(data, dict):
        return _mapping(reading, data), reading.unnamed
    raise reading.fail('it holds no table; write {"prompt-a": {"8": 5.1, "16": 6.5}, ...}')


def _objects(reading: FigureReading, rows: Sequence[object], what: str) -> list[Mapping[str, Any]]:
    """The elements of a JSON list, which must be objects."""
    kept: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise reading.fail(f"{what} {number}: {row!r} is not an object")
        kept.append(row)
    return kept


def _identity(reading: FigureReading, row: Mapping[str, Any], where: str) -> str:
    """The id of a row's prompt, under any of the names it goes by."""
    key = next((key for key in _IDS if key in row), None)
    if key is None:
        raise reading.fail(f"{where}: it has no 'prompt' (nor 'id' or 'index'), but {listed(list(row))}")
    return _name(reading, row[key], where)


def _curve(reading: FigureReading, curve: object, prompt: str, domain: str | None, where: str) -> Iterator[TableValue]:
    """The cells of {size: value}."""
    if not isinstance(curve, dict) or not curve:
        raise reading.fail(f'{where}: it needs values by block size, such as {{"8": 5.1, "16": 6.5}}, not {curve!r}')
    for size, value in curve.items():
        here = f"{where}, block size {size}"
        if isinstance(value, str) and value:
            raise reading.fail(f"{here}: {value!r} is a text; write a number, without quotes")
        number = _number(reading, value, here)
        yield TableValue(prompt, _size(reading, size, where), number, domain, here)


def _published(reading: FigureReading, data: Mapping[str, Any]) -> Found:
    """The layout of the published sweep: a list of prompts, each with its curve."""
    rows = _objects(reading, data["prompts"], "prompt")
    figure = reading.choose(sorted({key for row in rows for key in row})) if rows else reading.unnamed
    declared = data.get("block_sizes")
    wanted = [_size(reading, size, "'block_sizes'") for size in declared] if isinstance(declared, list) else []

    def cells() -> Iterator[TableValue]:
        for number, row in enumerate(rows, start=1):
            where = f"prompt {number}"
            found = list(
                _curve(reading, row.get(figure), _identity(reading, row, where), _domain(row.get("domain")), where)
            )
            absent = [size for size in wanted if size not in {cell.size for cell in found}]
            if absent:
                raise reading.fail(f"{where}: no value at block size {listed(absent)}, which 'block_sizes' names")
            yield from found

    return cells(), figure


def _rows(reading: FigureReading, data: Sequence[object]) -> Found:
    """A list of {"prompt", "block_size", figure}."""
    rows = _objects(reading, data, "row")
    figure = reading.choose(sorted({key for row in rows for key in row})) if rows else reading.unnamed

    def cells() -> Iterator[TableValue]:
        for number, row in enumerate(rows, start=1):
            where = f"row {number}"
            if "block_size" not in row:
                raise reading.fail(f"{where}: it has no 'block_size', but {listed(list(row))}")
            size = _size(reading, row["block_size"], where)
            prompt, domain = _identity(reading, row, where), _domain(row.get("domain"))
            yield from _curve(reading, {size: row.get(figure)}, prompt, domain, where)

    return cells(), figure


def _mapping(reading: FigureReading, data: Mapping[str, Any]) -> Iterator[TableValue]:
    """{prompt: {size: value}}."""
    for prompt, curve in data.items():
        yield from _curve(reading, curve, _name(reading, prompt, f"prompt {prompt!r}"), None, f"prompt {prompt!r}")


# CSV


def csv_cells(reading: FigureReading, text: str) -> Found:
    """Cells of a CSV file, and the figure they are of."""
    lines = csv.reader(text.splitlines(keepends=True))
    header = [name.strip() for name in next(lines, [])]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise reading.fail(f"line 1: column {doubled[0]!r} stands twice; keep one")
    if not any(key in header for key in _IDS):
        raise reading.fail(
            f"line 1: no column 'prompt' (nor 'id' or 'index') but {listed(header) or 'nothing'}; begin the file with "
            f"{LONG}, or with `prompt,8,16` and a column for each block size"
        )
    rows = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    named: list[tuple[str, dict[str, str]]] = []
    for number, row in rows:
        if len(row) != len(header):
            raise reading.fail(f"line {number}: {len(row)} columns, but the header has {len(header)}")
        named.append((f"line {number}", dict(zip(header, (cell.strip() for cell in row), strict=True))))
    if "block_size" in header:
        figure = reading.choose(header)
        return _long(reading, named, figure), figure
    return _wide(reading, named, header), reading.unnamed


def _long(reading: FigureReading, rows: Sequence[tuple[str, dict[str, str]]], figure: str) -> Iterator[TableValue]:
    for where, row in rows:
        here = f"{where}, column '{figure}'"
        yield TableValue(
            _identity(reading, row, where),
            _size(reading, row["block_size"], f"{where}, column 'block_size'"),
            _number(reading, row[figure], here),
            _domain(row.get("domain")),
            here,
        )


def _wide(
    reading: FigureReading, rows: Sequence[tuple[str, dict[str, str]]], header: Sequence[str]
) -> Iterator[TableValue]:
    columns = [name for name in header if name not in (*_IDS, "domain")]
    if not columns:
        raise reading.fail("line 1: no column for a block size; add one for each, such as `prompt,8,16`")
    for name in columns:
        if not (name.isascii() and name.isdigit()):
            raise reading.fail(
                f"line 1: column {name!r} is no block size; name the columns by size (`prompt,8,16`), or write {LONG}"
            )
    for where, row in rows:
        prompt, domain = _identity(reading, row, where), _domain(row.get("domain"))
        for name in columns:
            here = f"{where}, column '{name}'"
            yield TableValue(prompt, int(name), _number(reading, row[name], here), domain, here)
