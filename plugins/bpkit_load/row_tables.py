"""Tables by number of running rows, as people type them: `1:8+4:4+16:1`, or `1:2+4+8:1+2` where entries are lists."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def read_table(value: object) -> object:
    """A table from text: number of rows, colon, entry, with `+` or `;` between; what has no colon continues an entry.

    >>> read_table("1:8+4:4+16:1"), read_table("1:2+4;8:1+2")
    ({'1': '8', '4': '4', '16': '1'}, {'1': '2+4', '8': '1+2'})
    """
    if not isinstance(value, str):
        return value
    table: dict[str, str] = {}
    for part in value.replace(";", "+").split("+"):
        rows, colon, entry = (text.strip() for text in part.partition(":"))
        if colon and rows in table:
            raise ValueError(f"{rows} rows stand twice in {value!r}")
        if not colon and not table:
            raise ValueError(f"{value!r} must begin with a number of rows and a colon, as in 1:8+4:4+16:1")
        if colon:
            table[rows] = entry
        else:
            table[[*table][-1]] += f"+{rows}"
    return table


def from_one_row(table: dict[int, Entry]) -> dict[int, Entry]:
    """The table by ascending number of rows. Raises ValueError if it does not begin at 1."""
    if min(table, default=0) != 1:
        raise ValueError("the table must begin at 1 row, so that every number of rows has an entry")
    return dict(sorted(table.items()))


def rows_of_entry(table: Mapping[int, Entry], rows: int) -> int:
    """The number of rows under which the entry for so many stands: the largest that is not above it.

    >>> rows_of_entry({1: 8, 4: 4, 16: 1}, 15)
    4
    """
    given = [*table]
    return given[bisect_right(given, rows) - 1]
