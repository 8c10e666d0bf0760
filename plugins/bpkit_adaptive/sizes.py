"""The type of option `block_sizes`: from a list, or from text such as `1+4+8` or `1-16`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from bpkit.sizes import parse_sizes


def _read(value: object) -> object:
    if isinstance(value, str):
        return parse_sizes(value.replace(";", "+"))
    return (value,) if isinstance(value, int) else value


def _with_no_draft(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({1, *sizes}))


BlockSizes = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(_read),
    AfterValidator(_with_no_draft),
]
"""Ascending, each once; 1 (no draft) is always among them."""
