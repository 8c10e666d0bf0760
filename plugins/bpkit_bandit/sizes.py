"""The type of option `block_sizes`: from a list, or from text such as `1+4+8` or `2-16`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from bpkit.sizes import parse_sizes


def _read(value: object) -> object:
    if isinstance(value, str):
        return parse_sizes(value.replace(";", "+"))
    return (value,) if isinstance(value, int) else value


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes)))


BlockSizes = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    Field(min_length=1),
    BeforeValidator(_read),
    AfterValidator(_ascending),
]
"""Ascending, each once."""
