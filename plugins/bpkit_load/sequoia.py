"""The best tree that is the same in every step, of as many nodes as pay, by how often candidates of each rank stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from bpkit.export.prices import StepPrices
from bpkit.policy import PolicyConfig, PolicyError, PolicyMemory, RememberingPolicy, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Plan, Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PARENTS, CELLS = "parents", "cells"
"""Of a state: parents of the last tree's nodes, and where each is counted, depth * branches + rank; -1 of none."""
MOST_NODES = 64
"""Where as many are drafted as pay."""
COST_CONTEXT = 64
"""Costs are looked up once for so many context lengths: they change slowly, and a lookup costs a decision's time."""
MOST_STEPS = 32
"""For which a tree stays: what was counted changes it little by then, and its search takes a decision's time."""


class SequoiaConfig(PolicyConfig):
    """Options of `sequoia`."""

    block_size: int | None = Field(
        default=None, ge=1, description="nodes to draft, and the anchor; by default as many as pay, up to 64"
    )
    discount: float = Field(default=0.9995, gt=0, le=1, description="weight of what was counted after each step")
    prior_weight: float = Field(default=4.0, gt=0, description="candidates that what is expected counts for")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further node, in plain steps, where there is no cost model"
    )


class SequoiaMemory(PolicyMemory):
    """Discounted counts of all rows.

    Fields:
        accepted, tested: candidates by depth, from 0, and by rank.
    """

    accepted: list[list[Count]] = []
    tested: list[list[Count]] = []


class _Tree(NamedTuple):
    """A tree to draft in every row; as in `StaticTree`, plain numbers."""

    parents: list[int]
    ranks: list[int]
    depths: list[int]


class Sequoia(RememberingPolicy[SequoiaMemory]):
    """Drafts the best static tree: the same ranks at the same places in every step (Sequoia, 2402.12374).

        argmax over trees T   (1 + sum over nodes of T of (a[0, r_0] a[1, r_1] ... a[d, r_d])) / seconds(T)

    a[d, r] is the chance that the candidate of rank r stands at depth d where the path before it does, counted from
    what was drafted (`RankCounts`); of a number of nodes and a depth the best tree is exact (`best_static`). `seconds`
    is the cost model's price of a step that drafts as deep and verifies as many nodes for all rows. With `block_size`
    the nodes are so many, whatever they cost.

    With drafters that do not branch it is the best chain.
    """

    Config = SequoiaConfig
    Memory = SequoiaMemory
    wants = frozenset()
    joint = True
    config: SequoiaConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.cost, self.branches = cost, decoder.branches
        self.most = min(self.config.block_size or 1 + MOST_NODES, decoder.max_block_size) - 1
        deepest = decoder.max_block_size if self.branches == 1 else decoder.trained_block_size
        self.shape = max(1, min(self.most, deepest - 1)), self.branches
        self._trees: dict[tuple[int, int], _Tree] = {}
        self._prices: dict[tuple[int, int], Any] = {}
        self._left = 0

    def fitted(self, memory: SequoiaMemory) -> SequoiaMemory:
        widths = {len(row) for counts in (memory.accepted, memory.tested) for row in counts}
        if len(memory.accepted) != len(memory.tested) or len(widths) > 1:
            raise PolicyError("this is no memory of Sequoia (accepted and tested are not of the same depths and ranks)")
        return memory

    def known(self) -> Any:
        """What was counted, as `RankCounts`."""
        from bpkit_load.rank_counts import RankCounts

        return RankCounts.of(self.memory.accepted, self.memory.tested, self.shape)

    # Decisions

    def begin(self, context: Context) -> State:
        self._left = 0  # a request begins with what is known, whoever ran before
        like, shape = context.position, (context.batch_size, self.most)
        return {PARENTS: like.new_full(shape, -1), CELLS: like.new_full(shape, -1)}

    def select(self, state: State, context: Context) -> Tensor | Plan:
        if self._left <= 0:
            self._trees.clear()
            self._left = self._steps_until_the_next()
        self._left -= 1
        tree = self._tree(context.running, int(context.context_length.max()) // COST_CONTEXT)
        nodes, rows, like = len(tree.parents), context.batch_size, context.position
        size = context.full(nodes + 1)
        if self.branches == 1 or not nodes:
            return size
        parents, ranks, depths = (like.new_tensor(values).expand(rows, nodes) for values in tree)
        state[CELLS][:, :nodes] = depths * self.branches + ranks
        state[PARENTS][:, :nodes] = parents
        return Plan(size, context.full(0), parents, ranks)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        lengths, asked = draft.draft_length.tolist(), (draft.block_size - 1).tolist()
        if draft.parents is not None and self.branches > 1 and lengths != asked:
            from bpkit_load.rank_counts import nodes_left

            for row, (length, most) in enumerate(zip(lengths, asked, strict=True)):
                cells, parents = state[CELLS][row], state[PARENTS][row]
                found, ranks = draft.parents[row, :length], cells[:most] % self.branches
                kept = nodes_left(parents[:most].tolist(), ranks.tolist(), found.tolist())
                cells[:length], parents[:length] = cells[kept], found
        return draft.draft_length

    def _steps_until_the_next(self) -> int:
        """For which a tree stays, fewer while little is known."""
        drafts = max(self.memory.tested[0], default=0.0) if self.memory.tested else 0.0
        return min(MOST_STEPS, 1 + int(drafts) // 8)

    def _tree(self, rows: int, place: int) -> _Tree:
        """The best tree for so many rows and about so long a context."""
        key = rows, place
        if key not in self._trees:
            from bpkit.draft.static_trees import best_static

            chances, nodes = self.known().chances(self.config.prior_weight), self.most
            if self.config.block_size is None:
                depth, nodes = self._worth(chances, *key)
                chances = chances[:depth]
            made = best_static(chances, nodes)
            self._trees[key] = _Tree(made.parents.tolist(), made.ranks.tolist(), made.depths.tolist())
        return self._trees[key]

    def _worth(self, chances: NDArray[np.float64], rows: int, place: int) -> tuple[int, int]:
        """Largest depth and nodes of the tree with the most tokens for its time."""
        import numpy as np

        from bpkit.draft.static_trees import accepted_by_depth

        key = rows, place
        if key not in self._prices:
            self._prices[key] = self._seconds(*key)
        rates = (1 + accepted_by_depth(chances, self.most)) / self._prices[key]
        depth, nodes = np.unravel_index(rates.argmax(), rates.shape)  # of equals the least deep, then the smallest
        return int(depth) + 1, int(nodes)

    def _seconds(self, rows: int, place: int) -> NDArray[np.float64]:
        """Of a step, by the largest depth, from 1, and by nodes: float64 [depths, most + 1]; inf without a price."""
        import numpy as np

        prices = StepPrices(self.cost, self.config.slope, place * COST_CONTEXT + COST_CONTEXT // 2, rows)

        def of(phase: str, size: int) -> float:
            try:
                return prices.of(phase, size)
            except ValueError:  # a table ends somewhere
                return np.inf

        verify = np.array([of("verify", 1 + nodes) for nodes in range(self.most + 1)])
        draft = np.array([of("draft", 2 + depth) for depth in range(self.shape[0])])
        draft = np.stack([np.zeros_like(draft), *[draft] * self.most], axis=1)  # nothing is drafted of no nodes
        return np.asarray(draft + verify + prices.of("rest", 1))

    # Learning

    def observe(self, state: State, step: Step) -> None:
        import numpy as np

        place, rows, counted = np.arange(self.most), len(step.num_accepted), self.known()
        path = np.where(place < step.num_accepted.numpy()[:, None], place, -1)  # of a chain
        if step.path is not None:
            path = step.path.numpy()
        cells, parents = np.tile(place, (rows, 1)), np.tile(place - 1, (rows, 1))
        if self.branches > 1:
            cells, parents = state[CELLS].numpy(), state[PARENTS].numpy()
        cells = np.where(place < step.draft_length.numpy()[:, None], cells, -1)
        counted.count(cells, parents, path, np.array(step.stopped or [False] * rows), self.config.discount)
        self.memory = SequoiaMemory.model_construct(accepted=counted.accepted.tolist(), tested=counted.tested.tolist())
