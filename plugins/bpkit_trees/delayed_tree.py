"""The policy `delayed_tree`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from bpkit.export.core import Core, Export, Port, decision, given, margin, tree
from bpkit.export.curves import CostCurves, Curves
from bpkit.export.prices import has_price
from bpkit.learn import TrainedConfig, TrainedPolicy
from bpkit.policy import PolicyConfig, PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Plan, Step
from bpkit_trees.delayed_shapes import DelayedTree

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bpkit_trees.delayed_networks import TreeChoice, TreeScores

VECTORS = (Feature.LAST_HIDDEN, Feature.TARGET_FEATURES, Feature.ANCHOR_EMBEDDING)
DEPTH, OF_DEPTHS, LAST_DRAFT = "depth", "of_depths", "last_draft"
"""Of a state: of the draft, the drafter at each of its depths, and what is known of it afterwards."""


class DelayedTreeConfig(TrainedConfig):
    """Options of `delayed_tree`; `margin` is settled by training."""

    margin: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="what a tree must promise beyond the best static one, in steps of that; 1000 always drafts that",
    )
    last_draft: bool = Field(default=True, description="also read what the drafter knew of the last decided position")
    grid = {"margin": (0.0, 0.01, 0.03, 0.1, 1000.0)}


class DelayedTreePolicy(TrainedPolicy):
    """A network chooses how the next draft branches: delayed trees (Thomas et al. 2026, 2602.16994).

    A trunk of L1 tokens, then K paths of L2; K is 1 to 4, L1 and L2 are 0 to 8, so that chains and no draft are among
    them. As published, vectors are projected to 128 numbers, with LayerNorm, and with scalars go through layers of 512
    and 32; training maximises tokens per second against the best static tree, with a penalty on the worst steps. What
    differs:

    - It is asked before the draft, so that the drafter's hidden state at the root is not there. Instead of it the
      network reads what the drafter will read: `target_features` and the anchor's embedding.
    - The drafter's hidden state at the last decided position is that of the last draft, where it reached so far
      (`last_draft`). Its entropy and divergences would cost time; temperature and top-p are not known.
    - What the network says is added to the scores of static trees at the user's costs, so that without it, and where it
      promises less than `margin`, the best static tree is drafted. So it is where costs are so different from those of
      training that the best static tree of then is 5% worse than that of now.
    - Acceptance is not estimated: traces of drafters with branches say what each tree yields.

    Where the drafter has fewer branches it chooses among the trees of so many, without branches among chains. Without a
    cost model (`cost` None) steps are taken to cost what they did where the policy was trained.
    """

    name = "delayed_tree"
    Config = DelayedTreeConfig
    trainer = "bpkit_trees.delayed_training:DelayedTreeModule"
    wants = frozenset({*VECTORS, Feature.ANCHOR_ENTROPY, Feature.ANCHOR_LOG_PROBABILITY})
    in_order = True
    config: DelayedTreeConfig

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        if self.config.last_draft:
            self.wants = self.wants | {Feature.DRAFT_HIDDEN}  # type: ignore[misc]

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """The networks for `facts`: `inputs` (numbers in each vector), `drafter` (in its hidden state) and `trees`."""
        from bpkit_trees.delayed_networks import LATENCIES, PROJECTED, SCALARS, Projections, TreeScores

        made: dict[str, nn.Module] = {"target": Projections({str(name): facts["inputs"][name] for name in VECTORS})}
        inputs = len(VECTORS) * PROJECTED + LATENCIES + SCALARS
        if self.config.last_draft:
            made["drafter"] = Projections({str(Feature.DRAFT_HIDDEN): facts["drafter"]})
            inputs += PROJECTED + 1
        return {**made, "scores": TreeScores(inputs, len(facts["trees"]))}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        from bpkit.export.inputs import CurveRows
        from bpkit.learn.quick import quick
        from bpkit_trees.delayed_networks import AfterDraft, AfterStep

        self.decoder = decoder
        trained = [DelayedTree(*sizes) for sizes in self.facts["trees"]]
        self.places = [place for place, tree in enumerate(trained) if self._usable(tree, cost)]
        self.trees = [trained[place] for place in self.places]
        if len(self.trees) < 2:
            raise PolicyError(f"policy {self.name!r}: this decoder drafts none of the trees that it was trained for")
        network = cast("TreeScores", self.networks["scores"].cpu())  # of numbers that are on the host
        self.choice = self._choice(quick(network, network.first.in_features))
        self.after_draft = AfterDraft(cast("Any", self.networks.get("drafter")), self.choice.prices.longest)
        self.after_step, self.tables = AfterStep(), [table.numpy() for table in self.choice.tables()]
        self.curves = self._curves(cost)
        self.priced = CurveRows(self.curves, self.choice.prices.row)

    def _usable(self, tree: DelayedTree, cost: CostModel | None) -> bool:
        spec = self.decoder
        fits = tree.nodes < spec.max_block_size and tree.deepest < spec.trained_block_size
        return tree.branches <= spec.branches and fits and has_price(cost, tree.deepest + 1, tree.nodes + 1)

    def _choice(self, network: Any) -> TreeChoice:
        from bpkit_trees.delayed_networks import TreeChoice

        target: Any = self.networks["target"]
        return TreeChoice(
            target,
            network,
            self.trees,
            self.places,
            self.facts["yields"],
            curves=Curves(**self.facts["curves"]),
            scale=self.facts["scale"],
            margin=self.config.margin,
        )

    def _curves(self, cost: CostModel | None) -> Any:
        if cost is not None:
            return CostCurves(cost, self.block_sizes[1:], longest_draft=self.choice.prices.longest + 1)
        curves = Curves(**self.facts["curves"])
        return lambda context_length: curves

    @property
    def branches(self) -> int:
        """Of the tree with the most."""
        return max(tree.branches for tree in self.trees)

    @property
    def block_sizes(self) -> list[int]:
        """Nodes of the trees and the anchor, ascending from 1."""
        return sorted({tree.nodes + 1 for tree in self.trees})

    # Decisions

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if Feature.DRAFT_HIDDEN in features:
            return {"drafter": self.networks["drafter"](features[Feature.DRAFT_HIDDEN])}
        if Feature.LAST_HIDDEN in features:
            return {"target": self.networks["target"](*(features[name] for name in VECTORS))}
        return {}

    def begin(self, context: Context) -> State:
        import torch

        from bpkit_trees.delayed_networks import PROJECTED

        if not self.config.last_draft:
            return {}
        rows, depths = context.batch_size, self.choice.prices.longest
        return {
            DEPTH: context.full(0),
            OF_DEPTHS: torch.zeros(rows, depths, PROJECTED),
            LAST_DRAFT: torch.zeros(rows, PROJECTED + 1),
        }

    def select(self, state: State, context: Context) -> Tensor | Plan:
        import torch

        from bpkit_trees.delayed_counts import best_places
        from bpkit_trees.delayed_networks import inputs

        known = [context[Feature.ANCHOR_ENTROPY], context[Feature.ANCHOR_LOG_PROBABILITY]]
        if self.config.last_draft:
            known.append(state[LAST_DRAFT])
        static, _, latencies = self.choice.prices.of(self.priced(context.context_length))
        x = inputs(self.predicted(context)["target"], *known, context.context_length, latencies=latencies)
        place = best_places(self.choice.scores(x, static).numpy(), static.numpy(), self.config.margin, self.choice.home)
        block_size, parents, ranks, depth = (torch.from_numpy(table[place]) for table in self.tables)
        if self.config.last_draft:
            state[DEPTH] = depth
        return block_size if self.decoder.branches == 1 else Plan(block_size, context.full(0), parents, ranks)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if self.config.last_draft:
            projected = self.predicted(draft)["drafter"][:, : self.choice.prices.longest]
            state[OF_DEPTHS][:, : projected.shape[1]] = projected
        return draft.draft_length

    def observe(self, state: State, step: Step) -> None:
        if self.config.last_draft:
            kept = state[OF_DEPTHS]
            state[LAST_DRAFT] = self.after_step(step.num_accepted, step.draft_length, state[DEPTH], kept)
            kept.zero_()

    # Files

    def export(self) -> Export:
        """What is chosen before each draft, and what is kept of the last one, if it is read."""
        if not self.config.last_draft:
            return Export({"policy": self._select_core()}, self.block_sizes, self.curves, branches=self.branches)
        from bpkit_trees.delayed_networks import PROJECTED

        axes = ("batch", self.choice.prices.longest, PROJECTED)
        kept = Port(OF_DEPTHS, axes, "float32", "the drafter's hidden state at each depth, projected")
        cores = {"select": self._select_core()}
        cores["truncate"] = Core(
            "truncate",
            self.after_draft,
            inputs=(given(Feature.DRAFT_HIDDEN, self.facts["drafter"]), given("draft_length")),
            outputs=(decision("truncate"), kept, margin("1, since the whole draft is verified")),
        )
        cores["observe"] = Core(
            "observe",
            self.after_step,
            inputs=(given("num_accepted"), given("draft_length"), self._depth(), kept),
            outputs=(self._last_draft(),),
            margin="",
        )
        return Export(cores, self.block_sizes, self.curves, branches=self.branches, state=lambda state: {})

    def _select_core(self) -> Core:
        prices = self.choice.prices
        known = [given(name) for name in (Feature.ANCHOR_ENTROPY, Feature.ANCHOR_LOG_PROBABILITY)]
        return Core(
            "select",
            self._choice(self.networks["scores"]),
            inputs=(
                *(given(name, self.facts["inputs"][name]) for name in VECTORS),
                *known,
                *([self._last_draft()] if self.config.last_draft else []),
                given("context_length"),
                given("draft_seconds", prices.longest + 1),
                given("verify_seconds", prices.widest + 1),
            ),
            outputs=(
                decision("select"),
                *tree(prices.widest),
                self._depth(),
                Port(
                    "scores",
                    ("batch", len(self.trees)),
                    "float32",
                    "of each tree, in steps of the best static one; -1e9 if not far enough ahead",
                ),
                margin("how far the tree is ahead of the next, in the same"),
            ),
        )

    @staticmethod
    def _depth() -> Port:
        return Port(DEPTH, ("batch",), "int64", "tokens of the tree's longest path")

    @staticmethod
    def _last_draft() -> Port:
        from bpkit_trees.delayed_networks import PROJECTED

        return Port(LAST_DRAFT, ("batch", PROJECTED + 1), "float32", "the drafter where the target decided the anchor")
