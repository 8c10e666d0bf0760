"""Block sizes as people type them, such as `14-18`, `4+8+16`, `2-8+16`, and the types of options that take them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST = 4096
"""No drafter fills such a block; a larger number is a slip of the finger, and its range would fill the memory."""

_EXAMPLE = "write sizes as `14-18`, `4+8+16` or `2-8+16`"


def parse_sizes(text: str, *, smallest: int = 1) -> tuple[int, ...]:
    """Block sizes, ascending and each once, from a list of sizes and ranges with `+` between them.

    Both ends of a range belong to it. Blanks do not matter.

    Args:
        text: such as `2-8+16`.
        smallest: the least size that makes sense here; 1 is "no drafting", so what needs a draft says 2.

    Raises:
        ValueError: the text is no such list; the message says what is wrong with which part.

    >>> parse_sizes("14-18")
    (14, 15, 16, 17, 18)
    >>> parse_sizes(" 16 + 2-5 + 4 ")
    (2, 3, 4, 5, 16)
    >>> parse_sizes("18-14")
    Traceback (most recent call last):
    ValueError: block sizes '18-14': the range 18-14 runs backwards; write 14-18
    >>> parse_sizes("4,8")
    Traceback (most recent call last):
    ValueError: block sizes '4,8': '4,8' is no size; write sizes as `14-18`, `4+8+16` or `2-8+16`
    >>> parse_sizes("1-4", smallest=2)
    Traceback (most recent call last):
    ValueError: block sizes '1-4': 1 is less than 2: a block counts the anchor, so size 1 drafts nothing
    """
    sizes: set[int] = set()
    for part in text.split("+"):
        try:
            sizes.update(_part(part.strip(), smallest))
        except ValueError as error:
            raise ValueError(f"block sizes {text!r}: {error}") from None
    return tuple(sorted(sizes))


def _part(part: str, smallest: int) -> range:
    """One size or one range."""
    found = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", part)
    if found is None:
        raise ValueError(f"{part!r} is no size; {_EXAMPLE}" if part else f"a size is missing; {_EXAMPLE}")
    first = int(found[1])
    last = first if found[2] is None else int(found[2])
    if last < first:
        raise ValueError(f"the range {first}-{last} runs backwards; write {last}-{first}")
    if first < smallest:
        why = ": a block counts the anchor, so size 1 drafts nothing" if (first, smallest) == (1, 2) else ""
        raise ValueError(f"{first} is less than {smallest}{why}")
    if last > LARGEST:
        raise ValueError(f"{last} is more than {LARGEST}, the largest block size that is taken")
    return range(first, last + 1)


def format_sizes(sizes: Iterable[int]) -> str:
    """The shortest text that `parse_sizes` reads as these sizes.

    >>> format_sizes([2, 3, 4, 8, 9, 16])
    '2-4+8+9+16'
    >>> parse_sizes(format_sizes([14, 15, 16, 17, 18]))
    (14, 15, 16, 17, 18)
    """
    runs: list[list[int]] = []
    for size in sorted(set(sizes)):
        if runs and size == runs[-1][-1] + 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "+".join(map(str, run)) for run in runs)


def _read(value: object) -> object:
    if isinstance(value, str):  # a `;` may stand for `+`; a comma separates options on the command line
        return parse_sizes(value.replace(";", "+"))
    return (value,) if isinstance(value, int) else value


BlockSize = Annotated[
    int | None,
    Field(ge=1, description="positions to draft, anchor included; by default the trained block size"),
]
"""Type of an option `block_size`, with its description; None is the trained block size."""

BlockSizes = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    Field(min_length=1),
    BeforeValidator(_read),
    AfterValidator(lambda sizes: tuple(sorted(set(sizes)))),
]
"""Type of an option `block_sizes`: a size, a list, or text such as `1+4+8` or `2-16`; ascending, each once."""

BlockSizesWithNoDraft = Annotated[BlockSizes, AfterValidator(lambda sizes: tuple(sorted({1, *sizes})))]
"""The same; 1 (no draft) is always among them."""
