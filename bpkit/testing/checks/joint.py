"""A batch whose rows share a budget, beside the same batch in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bpkit.policy import State
from bpkit.testing.checks import tapes
from bpkit.testing.checks.batch import Batch, Stop
from bpkit.types import Context, Draft, Step


class Joint(Batch):
    """Rows that share a budget: their order must not matter."""

    def _decide(self, method: str, given: Context | Draft, alone: Sequence[Context | Draft | None]) -> None:
        """Ask about the batch, and about the same batch the other way round."""
        places = list(range(len(self.order)))[::-1]
        twin, turned = self._twin(), tapes.rows_of(self.together, places)
        answer, drew = self._asked(self.policy, method, self.together, given)
        self._whole(self.together, len(self.order), method, self.order)
        other, _ = self._asked(twin, method, turned, _turned(given, places, self.time))
        expected = [answer[place] for place in places]
        if other == expected:
            self.compared += len(answer)
        elif drew:
            self.drawn += len(answer)
        else:
            self.out.fail(
                f"{self._batch(method)}, then for the same requests in reverse",
                f"the same decisions in reverse, {expected}: `joint = True` lets rows share, not know their places",
                f"it answered {answer}, and in reverse {other}",
            )
            raise Stop

    def _observe(self, seen: Sequence[Step]) -> None:
        self._call(self.policy, "observe", self.together, tapes.steps(seen, tapes.total(seen)))
        self._whole(self.together, len(self.order), "observe", self.order)

    def _same_state(self, method: str, row: int, mine: State, alone: State) -> None:
        """Rows that share may have states that do."""


def _turned(given: Context | Draft, places: Sequence[int], seed: int) -> Context | Draft:
    """The rows in another order, with the generator as it was."""
    order = list(places)
    if isinstance(given, Context):
        return Context(
            given.spec,
            given.position[order],
            given.remaining[order],
            given.context_length[order],
            torch.Generator().manual_seed(seed),
            {name: value[order] for name, value in given.features.items()},
        )
    context = _turned(given.context, places, seed)
    assert isinstance(context, Context)
    return Draft(
        context,
        given.block_size[order],
        given.draft_length[order],
        given.tokens[order],
        None if given.logits is None else given.logits[order],
        {name: value[order] for name, value in given.features.items()},
    )
