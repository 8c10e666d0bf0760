"""How well each block size does on a prompt: the labels of policies that choose once for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bpkit.policy import PolicyError
from bpkit.sizes import format_sizes, parse_sizes
from bpkit.trace.oracle import fixed_path
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DraftWork

Label = Literal["acceptance_length", "tokens_per_second"]

NEIGHBOURS = 2
"""BlockPilot chooses among the trained block size and so many sizes on either side of it."""


def candidate_sizes(given: str | None, trained: int, traced: Sequence[int]) -> tuple[int, ...]:
    """The block sizes to choose from, ascending.

    Args:
        given: such as `1+8-16`, or None for the trained size and its neighbours, as far as they were traced.

    Raises:
        PolicyError: a given size was not traced, or there are not two sizes to choose from.

    >>> candidate_sizes(None, 8, range(2, 17))
    (6, 7, 8, 9, 10)
    >>> candidate_sizes(None, 16, range(2, 17))
    (14, 15, 16)
    >>> candidate_sizes("1+4+8", 8, (2, 4, 8))
    (1, 4, 8)
    """
    known = {1, *map(int, traced)}
    if given is None:
        around = range(max(trained - NEIGHBOURS, 2), trained + NEIGHBOURS + 1)
        sizes = tuple(size for size in around if size in known)
    else:
        try:
            sizes = parse_sizes(given)
        except ValueError as error:
            raise PolicyError(f"option 'candidates': {error}") from None
        missing = [size for size in sizes if size not in known]
        if missing:
            raise PolicyError(
                f"option 'candidates': the trace has sizes 1+{format_sizes(traced)}, not {format_sizes(missing)}; "
                "name sizes that it has, or trace again with `--block-sizes`"
            )
    if len(sizes) < 2:
        raise PolicyError(
            f"there is nothing to choose: of the sizes around {trained} the trace has only {list(sizes)}. Name others "
            f"with the option 'candidates', of 1+{format_sizes(traced)}"
        )
    return sizes


def curve(
    prompt: PromptTrace, work: DraftWork, cost: CostModel, sizes: Sequence[int], label: Label
) -> NDArray[np.float64]:
    """What each block size, kept for the whole prompt, gives: tokens per step or tokens per second, float64 [sizes].

    Args:
        work: of the drafter.
    """
    paths = [fixed_path(prompt, work, cost, size) for size in sizes]
    if label == "acceptance_length":
        return np.array([path.tokens / path.steps for path in paths])
    return np.array([path.tokens / path.seconds for path in paths])
