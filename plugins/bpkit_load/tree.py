"""Nodes of drafted trees, of all rows together, as far as they pay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from bpkit.export.prices import priced
from bpkit.policy import PolicyConfig, PolicyError, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSize, BlockSizesWithNoDraft
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from bpkit_load.node_chances import NodeChances
    from bpkit_load.node_prices import NodePrices

    Floats = NDArray[np.float64]

Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PARENTS, CELLS, WAITING = "parents", "cells", "waiting"
"""Of a state: parents of the last draft's nodes; where each is counted, -1 of those that were not verified; positions
that wait for the drafter."""
MOST_NODES = 63
LARGEST_EVERY, FEWEST, SEEN = 16, 4, 16
"""Steps from one draft of the most nodes to the next, and how many such drafts, at first and at last, say what pays."""
WEIGHT, KEPT = 8.0, 0.998
"""Drafts that what chances say counts for beside what was accepted, and the weight of the past of that."""
USUAL = 3
"""Positions that wait for a draft where no row is new, at most."""


class TreePolicyConfig(PolicyConfig):
    """Options of `tree`."""

    block_size: BlockSize = Field(
        default=None, description="nodes to draft, and the anchor; by default as many as pay, up to 63 nodes"
    )
    nodes: int | None = Field(
        default=None,
        ge=1,
        description="verify so many nodes in every row, whatever they cost; by default those that pay",
    )
    block_sizes: BlockSizesWithNoDraft = Field(
        default=tuple(range(1, MOST_NODES + 2)), description="of chains, sizes to choose from; trees are of any size"
    )
    rate_discount: float = Field(default=0.95, ge=0, lt=1, description="weight of the past in tokens per second")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further node, in plain steps, where there is no cost model"
    )


class TreePolicyMemory(PolicyMemory):
    """Discounted counts of all rows, what drafts are like, and what a second brought.

    Fields:
        accepted, tested: nodes by range of depths and of the drafter's chance.
        survival: of the last drafts of the most nodes, chances that the best, second best, ... stands.
        places: of drafts that were verified whole, how often the first, second, ... node stood, and was there.
        until_largest: steps to the next draft of the most nodes.
        rates: tokens and seconds by range of rows, from `int.bit_length`.
    """

    accepted: list[list[Count]] = []
    tested: list[list[Count]] = []
    survival: list[list[Count]] = []
    places: list[list[Count]] = []
    until_largest: int = Field(default=0, ge=0)
    rates: dict[int, tuple[Count, Count]] = {}


class TreePolicy(RememberingPolicy[TreePolicyMemory]):
    """Verifies the nodes of all rows' trees that are worth their time, the likeliest first.

        argmax over counts m of   sum of the m highest S_n over all rows' nodes  -  rate * seconds(m)

    S_n is the chance that node n and all before it on its path stand: the product of the chances that the drafter gives
    (`Draft.chances`), each calibrated by counts (`NodeChances`). A node's S is below its parent's, so the m highest are
    trees. `rate` is what a second is worth: the tokens per second of the last steps with about as many rows, by the
    prices of the cost model. `seconds` is its price of a target pass that is as wide as the widest row has nodes.

    The nodes to draft are so many that all of them bring the most tokens for their time, in the mean over the last
    drafts of the most nodes, of which there is one every sixteen steps. Of one row alone all of them are verified in
    between: to choose from each draft brought no more tokens/s than the right number did, and takes time. How often
    each place in such drafts stood says more of the mean than chances do.

    A chain is a tree of one path: its chances are the drafter's probabilities, of a drafter without any 0.7 at first.
    """

    Config = TreePolicyConfig
    Memory = TreePolicyMemory
    wants = frozenset()
    joint = True
    config: TreePolicyConfig
    counted: NodeChances
    survival: Floats
    places: Floats
    until_largest: int
    rates: dict[int, tuple[float, float]]

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        from bpkit.export.position_costs import KeptCosts
        from bpkit_load.node_prices import NodePrices, PassCosts

        source = decoder.sources[0]
        if source.branches == 1:
            self.wants_optional = frozenset({Feature.DRAFT_PROBABILITY})  # type: ignore[misc]
        elif cost is not None:
            cost = PassCosts(cost, source)
        most = min(self.config.block_size or MOST_NODES + 1, MOST_NODES + 1, decoder.max_block_size)
        sizes = self.config.block_sizes if source.branches == 1 else range(2, most + 1)
        self.sizes, self.work = priced(cost, (size for size in sizes if size <= most)), decoder.work
        self.most = max(self.sizes, default=1) - 1
        self.costs = KeptCosts(
            NodePrices, cost, self.sizes, features=bool(self.wants_optional), slope=self.config.slope
        )
        self._whole = False
        self._rate, self._drafting, self._seconds = 0.0, 0.0, 0.0

    # Decisions

    def begin(self, context: Context) -> State:
        like, shape = context.position, (context.batch_size, self.most)
        first = [self.work.first(length - 1) for length in context.context_length.tolist()]
        return {
            PARENTS: like.new_full(shape, -1),
            CELLS: like.new_full(shape, -1),
            WAITING: like.new_tensor(first),
        }

    def select(self, state: State, context: Context) -> Tensor:
        state[CELLS].fill_(-1)
        rows = context.batch_size
        if not self.sizes:
            return context.full(1)
        prices = self._prices(context)
        waiting = int(state[WAITING].max())
        before, usual = prices.catch_up(waiting), prices.catch_up(min(waiting, USUAL))
        self._rate = self._lately(rows)
        self._whole = self.until_largest <= 0 or not self._rate or len(self.survival) < FEWEST
        if self._whole:
            self.until_largest = LARGEST_EVERY
        self.until_largest -= 1
        length = self.most
        if not self._whole and self.config.block_size is None and self.config.nodes is None:
            length = prices.draft_length(self._mean_survival(rows), usual, self.sizes)
        self._drafting = float(prices.drafts[length]) + (before if length else 0.0)
        self._seconds = self._drafting + float(prices.nodes[0])  # where nothing is drafted, all that there is
        return context.full(length + 1)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        import numpy as np
        import torch

        from bpkit_load.node_chances import Paths

        if draft.context.batch_size == 1 and not self._whole and self.config.nodes is None:
            length = draft.draft_length
            self._seconds = self._drafting + float(self._prices(draft.context).nodes[int(length[0])])
            return length
        there = np.arange(draft.tokens.shape[1]) < draft.draft_length.numpy()[:, None]
        parents, chances = self._tree(draft, there)
        paths = Paths(parents)
        cells = self.counted.cells(chances, paths.depths)
        survival = paths.products(np.where(there, self.counted.calibrated(chances, cells), 0.0))
        order = np.argsort(-survival, axis=1, kind="stable")
        falling = np.take_along_axis(survival, order, axis=1)
        if self._whole:
            self._note(falling)
        taken = self._worth(falling, draft.context)
        kept = np.zeros_like(there)
        np.put_along_axis(kept, order, np.arange(there.shape[1]) < taken[:, None], axis=1)
        kept &= there
        state[PARENTS].numpy()[:, : there.shape[1]] = parents
        state[CELLS].numpy()[:, : there.shape[1]] = np.where(kept, cells, -1)
        # Of a chain the first ones.
        return torch.from_numpy(kept if draft.parents is not None else kept.sum(axis=1))

    def _tree(self, draft: Draft, there: Any) -> tuple[Any, Floats]:
        """Parents and the drafter's chances of a draft; NaN where it says none.

        Args:
            there: which tokens were drafted, bool [rows, width].
        """
        import numpy as np

        if draft.parents is not None and draft.chances is not None:
            parents, chances = draft.parents.numpy(), draft.chances.double().numpy()
        else:
            parents = np.broadcast_to(np.arange(-1, there.shape[1] - 1), there.shape)
            probability = draft.features.get(Feature.DRAFT_PROBABILITY)
            chances = np.full(there.shape, np.nan) if probability is None else probability.double().numpy()
        return np.where(there, parents, -1), chances

    def _note(self, falling: Floats) -> None:
        """Keep what drafts of the most nodes are like, of the first rows."""
        import numpy as np

        seen = np.zeros((min(len(falling), SEEN), self.most))
        seen[:, : falling.shape[1]] = falling[:SEEN]
        known = self.survival if self.survival.shape[1] == self.most else seen[:0]
        self.survival = np.concatenate([known, seen])[-SEEN:]

    def _worth(self, falling: Floats, context: Context) -> Any:
        """Nodes of each row to verify, int64 [rows].

        Args:
            falling: chances of each row's nodes to be reached and stand, falling.
        """
        import numpy as np

        prices, most = self._prices(context), self.config.nodes
        if most is not None:
            counts = np.minimum((falling > 0).sum(axis=1), most)
            self._seconds = self._drafting + float(prices.nodes[min(most, self.most)])
            return counts
        if not self._rate:
            self._rate = prices.best_rate(falling, drafting=self._drafting)
        chosen = prices.best(falling, self._rate)
        self._seconds = self._drafting + chosen.seconds
        return chosen.counts

    def _mean_survival(self, rows: int) -> Floats:
        """Of the best, second best, ... node of a draft the chance to stand, in the mean: falling, float64 [most]."""
        import numpy as np

        mean = np.asarray(self.survival.mean(axis=0))
        if rows > 1:
            return mean
        stood, there = self.places[:, : len(mean)]
        return np.minimum.accumulate((stood + WEIGHT * mean) / (there + WEIGHT))

    def _prices(self, context: Context) -> NodePrices:
        return self.costs.of(context.batch_size, int(context.context_length.max()))

    def _lately(self, rows: int) -> float:
        """Tokens per second of the last steps with about as many rows; 0 if there were none."""
        tokens, seconds = self.rates.get(rows.bit_length(), (0.0, 0.0))
        return tokens / seconds if seconds > 0 else 0.0

    # Learning

    def observe(self, state: State, step: Step) -> None:
        import numpy as np

        if not self.sizes:
            return
        accepted = step.num_accepted.numpy()
        rows, drafted = len(accepted), bool(step.draft_length.any())
        if drafted:
            path = np.where(np.arange(self.most) < accepted[:, None], np.arange(self.most), -1)  # of a chain
            if step.path is not None:
                path = step.path.numpy()
            ended = np.array(step.stopped or [False] * rows)
            if rows == 1 and (state[CELLS] < 0).all():  # nothing was chosen from it
                self._count_places(path[0], int(step.verify_length[0]))
            else:
                self.counted.count(state[CELLS].numpy(), state[PARENTS].numpy(), path, ended)
        kept, (tokens, seconds) = self.config.rate_discount, self.rates.get(rows.bit_length(), (0.0, 0.0))
        self.rates[rows.bit_length()] = (
            kept * tokens + float(accepted.sum()) + rows,
            kept * seconds + self._seconds,
        )
        if drafted:  # rows that do not draft are read along
            state[WAITING][:] = step.num_accepted + 1 if self.work.reads == "features" else int(self.work.waits)
        elif self.work.waits:
            state[WAITING] += 1

    def _count_places(self, path: Any, verified: int) -> None:
        self.places *= KEPT
        self.places[1, :verified] += 1
        self.places[0, path[path >= 0]] += 1

    # Memory

    @property
    def memory(self) -> TreePolicyMemory:
        counted = self.counted
        return TreePolicyMemory(
            accepted=counted.accepted.tolist() if counted.tested.any() else [],
            tested=counted.tested.tolist() if counted.tested.any() else [],
            survival=self.survival.tolist(),
            places=self.places.tolist() if self.places.any() else [],
            until_largest=self.until_largest,
            rates=dict(self.rates),
        )

    @memory.setter
    def memory(self, known: TreePolicyMemory) -> None:
        import numpy as np

        from bpkit_load.node_chances import NodeChances

        self.counted = NodeChances()
        if known.tested:
            self.counted.accepted, self.counted.tested = np.array(known.accepted), np.array(known.tested)
        self.survival = np.array(known.survival or np.zeros((0, 0)))
        self.places = np.array(known.places or np.zeros((2, MOST_NODES)))
        self.until_largest, self.rates = known.until_largest, dict(known.rates)

    def fitted(self, memory: TreePolicyMemory) -> TreePolicyMemory:
        from bpkit_load.node_chances import SHAPE

        for counts in (memory.accepted, memory.tested) if memory.accepted or memory.tested else ():
            if [len(row) for row in counts] != [SHAPE[1]] * SHAPE[0]:
                raise PolicyError(f"this is no memory of TreePolicy (counts are not {SHAPE[0]} rows of {SHAPE[1]})")
        if memory.places and [len(row) for row in memory.places] != [MOST_NODES] * 2:
            raise PolicyError(f"this is no memory of TreePolicy (places are not 2 rows of {MOST_NODES})")
        if len({len(row) for row in memory.survival}) > 1:
            raise PolicyError("this is no memory of TreePolicy (survival is not of drafts of equal length)")
        return memory
