"""The policy under which costs are measured: block sizes and verify widths at random, all amid all others."""

from __future__ import annotations

import torch
from torch import Tensor

from bpkit.policy import Policy, State
from bpkit.types import Context, Draft

CHANCE_OF_PLAIN_STEPS, MOST_PLAIN_STEPS = 0.03, 32


class RandomSizes(Policy):
    """Draws block size and verify width at random, so that every size is timed amid all others.

    Block sizes are drawn evenly. Half of the drafts are verified whole, so that no width is rare, and of the others as
    much as is drawn. Now and then comes a run of plain steps, its length even on a logarithmic scale: the draft after
    it has much to catch up with.

    Of several rows the widest is drawn so, as padded passes go by it. In a quarter of the steps all are as wide, in
    others a random share of them; each of the rest draws a size of its own, up to a bound that is drawn for the step.

    Args:
        largest: block size and verify width, from 2.
    """

    wants = frozenset()
    joint = True

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def begin(self, context: Context) -> State:
        return {"width": context.full(1), "plain_steps": context.full(0)}  # int64 [batch] both

    def select(self, state: State, context: Context) -> Tensor:
        generator = context.generator
        largest, width, plain_steps = self._draw(int(state["plain_steps"].max()), generator)
        block_size, state["width"] = context.full(largest), context.full(width)
        state["plain_steps"] = context.full(plain_steps)
        if context.batch_size > 1 and largest > 1 and _between(0, 3, generator):
            narrow = torch.rand(context.batch_size, generator=generator) < torch.rand((), generator=generator)
            narrow[_between(0, context.batch_size - 1, generator)] = False
            bound = _between(1, largest, generator)
            own = torch.randint(1, bound + 1, (2, context.batch_size), generator=generator)
            block_size = block_size.where(~narrow, own[0])
            state["width"] = state["width"].where(~narrow, own[1].clamp(max=width))
        return block_size

    def truncate(self, state: State, draft: Draft) -> Tensor:
        verify_length: Tensor = (state["width"] - 1).minimum(draft.draft_length)
        return verify_length

    def _draw(self, plain_steps_left: int, generator: torch.Generator) -> tuple[int, int, int]:
        """Block size, verify width, and how many plain steps are to come."""
        if plain_steps_left == 0 and float(torch.rand((), generator=generator)) < CHANCE_OF_PLAIN_STEPS:
            plain_steps_left = int(MOST_PLAIN_STEPS ** float(torch.rand((), generator=generator)))
        if plain_steps_left > 0:
            return 1, 1, plain_steps_left - 1
        block_size = _between(2, self.largest, generator)
        whole = _between(0, 1, generator)
        return block_size, block_size if whole else _between(1, block_size, generator), 0


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
