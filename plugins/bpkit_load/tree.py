"""Nodes of drafted trees, of all rows together, as far as they pay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from bpkit.export.prices import priced
from bpkit.policy import PolicyConfig, PolicyError, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSize
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from bpkit_load.positions import PositionPrices

    Floats = NDArray[np.float64]

Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PARENTS, CELLS = "parents", "cells"
"""Of a state: parents of the last draft's nodes, and where each is counted, -1 of those that were not verified."""
ENOUGH = 1e-6
"""A rate that grows by less, of itself, has been found."""


class TreePolicyConfig(PolicyConfig):
    """Options of `tree`."""

    block_size: BlockSize = None
    rate_discount: float = Field(default=0.95, ge=0, lt=1, description="weight of the past in tokens per second")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further node, in plain steps, where there is no cost model"
    )


class TreePolicyMemory(PolicyMemory):
    """Discounted counts of all rows, and what a second brought.

    Fields:
        accepted, tested: nodes by range of depths and of the drafter's chance.
        rates: tokens and seconds by range of rows, from `int.bit_length`.
    """

    accepted: list[list[Count]] = []
    tested: list[list[Count]] = []
    rates: dict[int, tuple[Count, Count]] = {}


class TreePolicy(RememberingPolicy[TreePolicyMemory]):
    """Verifies the nodes of all rows' trees that are worth their time, the likeliest first.

        argmax over counts m of   sum of the m highest S_n over all rows' nodes  -  rate * seconds(m)

    S_n is the chance that node n and all before it on its path stand: the product of the chances that the drafter gives
    (`Draft.chances`), each calibrated by counts (`NodeChances`). A node's S is below its parent's, so the m highest are
    trees. `rate` is what a second is worth: the tokens per second of the last steps with about as many rows, by the
    prices of the cost model. `seconds` is its price of a target pass that is as wide as the widest row has nodes.

    Every step drafts `block_size - 1` nodes for each row: with a drafter whose further candidates cost no pass. Drafts
    without branches are verified whole.
    """

    Config = TreePolicyConfig
    Memory = TreePolicyMemory
    wants = frozenset()
    joint = True
    config: TreePolicyConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        from bpkit.export.position_costs import KeptCosts
        from bpkit_load.positions import PositionPrices

        most = min(self.config.block_size or decoder.trained_block_size, decoder.max_block_size)
        self.sizes = priced(cost, range(2, most + 1))
        self.block_size = max(self.sizes, default=1)
        self.costs = KeptCosts(PositionPrices, cost, self.sizes, features=False, slope=self.config.slope)
        self._seconds = 0.0

    def fitted(self, memory: TreePolicyMemory) -> TreePolicyMemory:
        from bpkit_load.node_chances import SHAPE

        for counts in (memory.accepted, memory.tested) if memory.accepted or memory.tested else ():
            if [len(row) for row in counts] != [SHAPE[1]] * SHAPE[0]:
                raise PolicyError(f"this is no memory of TreePolicy (counts are not {SHAPE[0]} rows of {SHAPE[1]})")
        return memory

    # Decisions

    def begin(self, context: Context) -> State:
        like, shape = context.position, (context.batch_size, self.block_size - 1)
        return {PARENTS: like.new_full(shape, -1), CELLS: like.new_full(shape, -1)}

    def select(self, state: State, context: Context) -> Tensor:
        state[CELLS].fill_(-1)
        self._seconds = 0.0
        return context.full(self.block_size)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if draft.parents is None or draft.chances is None:
            return draft.draft_length
        import numpy as np
        import torch

        from bpkit_load.node_chances import depths, reached

        width = draft.parents.shape[1]
        there = np.arange(width) < draft.draft_length.numpy()[:, None]
        parents = np.where(there, draft.parents.numpy(), -1)
        chances = np.where(there, np.nan_to_num(draft.chances.double().numpy(), nan=1.0), 0.0)
        counted = self.known()
        cells = counted.cells(chances, depths(parents))
        survival = reached(np.where(there, counted.calibrated(chances, cells), 0.0), parents)
        order = np.argsort(-survival, axis=1, kind="stable")
        taken = self._worth(np.take_along_axis(survival, order, axis=1), draft.context)
        kept = np.zeros_like(there)
        np.put_along_axis(kept, order, np.arange(width) < taken[:, None], axis=1)
        kept &= there
        state[PARENTS].numpy()[:, :width] = parents
        state[CELLS].numpy()[:, :width] = np.where(kept, cells, -1)
        return torch.from_numpy(kept)

    def _worth(self, survival: Floats, context: Context) -> Any:
        """Nodes of each row to verify, int64 [rows].

        Args:
            survival: chances of each row's nodes to be reached and stand, falling.
        """
        rows = len(survival)
        prices = self.costs.of(rows, int(context.context_length.max()))
        drafting = float(prices.drafting[-1, -1])
        tokens, seconds = self.memory.rates.get(rows.bit_length(), (0.0, 0.0))
        rate = tokens / seconds if seconds > 0 else self._best_rate(prices, survival, drafting)
        chosen = prices.best(survival, rate)
        self._seconds = drafting + chosen.seconds
        return chosen.counts

    @staticmethod
    def _best_rate(prices: PositionPrices, survival: Floats, drafting: float) -> float:
        """The most tokens per second that a step with such drafts may give."""
        rate, better = 0.0, len(survival) / (drafting + float(prices.verify[0, 0]))
        while better > rate * (1 + ENOUGH):  # Dinkelbach's iteration: what is best at a rate has no lower one
            rate, chosen = better, prices.best(survival, better)
            gained = sum(float(own[:count].sum()) for own, count in zip(survival, chosen.counts, strict=True))
            better = (len(survival) + gained) / (drafting + chosen.seconds)
        return rate

    # Learning

    def known(self) -> Any:
        """What was counted, as `NodeChances`."""
        import numpy as np

        from bpkit_load.node_chances import NodeChances

        counted = NodeChances()
        if self.memory.accepted:
            counted.accepted, counted.tested = np.array(self.memory.accepted), np.array(self.memory.tested)
        return counted

    def observe(self, state: State, step: Step) -> None:
        if step.path is None or not self._seconds:
            return
        import numpy as np

        rows, counted = len(step.num_accepted), self.known()
        cells, parents = state[CELLS].numpy(), state[PARENTS].numpy()
        counted.count(cells, parents, step.path.numpy(), np.array(step.stopped or [False] * rows))
        kept, rates = self.config.rate_discount, dict(self.memory.rates)
        tokens, seconds = rates.get(rows.bit_length(), (0.0, 0.0))
        rates[rows.bit_length()] = kept * tokens + int(step.acceptance_length.sum()), kept * seconds + self._seconds
        self.memory = TreePolicyMemory.model_construct(
            accepted=counted.accepted.tolist(), tested=counted.tested.tolist(), rates=rates
        )
