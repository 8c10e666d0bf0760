"""Training of `delayed_tree`: tokens per second of the trees that it would draft, against the best static tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.export.curves import TYPICAL_CONTEXT, CostCurves
from bpkit.export.inputs import CurveRows
from bpkit.export.prices import has_price
from bpkit.learn.training.learned import HALF, mean_yields, visited
from bpkit.learn.training.policy_module import PolicyModule, Replay, TrainingOptions
from bpkit.policy import PolicyError
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature
from bpkit_trees.delayed_counts import accepted_of, seconds_left
from bpkit_trees.delayed_networks import TreePrices, TreeScores, inputs
from bpkit_trees.delayed_shapes import DelayedTree, delayed_trees
from bpkit_trees.delayed_tree import VECTORS, DelayedTreePolicy

SOME = 4096
"""Positions by which inputs are standardised."""
NEAR = 0.1
"""Static trees are good that take at most such a share more of a prompt's time than the best of them."""
LEAST = 0.05
"""Of the seconds of static trees, what is thought possible. A batch of a few rows may seem to take none at all."""

TINY = 1e-9
"""Keeps logarithms of chances finite."""


class DelayedTreeOptions(TrainingOptions):
    """Training options of `delayed_tree`."""

    epochs: int = Field(default=8, ge=1, description="passes over the training positions, at most")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW, at its peak")
    weight_decay: float = Field(default=0.05, ge=0, description="of AdamW")
    dropout: float = Field(default=0.3, ge=0, lt=1, description="share of the projected numbers that are left out")
    scale: float = Field(
        default=0.03,
        gt=0,
        description="of differences between trees that count, in steps of the best static one: what a nat of the "
        "choice's entropy is worth in the loss",
    )
    worst_share: float = Field(default=0.1, gt=0, le=1, description="of the steps, those with the largest losses")
    worst_weight: float = Field(default=0.1, ge=0, description="of the mean loss of these in the loss")


class DelayedTreeModule(PolicyModule):
    """-log(TPS / TPS of the best static tree) over a batch, and a penalty on the steps that lose most.

    In training trees are drafted by chance, by the softmax of their scores. A tree that yields more leaves less to be
    decided, and what that would have taken depends on where it is: tokens that are easy to draft are soon decided
    anyhow. So the tokens are those that the best static tree yields here, and the seconds those until they are
    decided, if from the next step on some good static tree is kept: the step's own, and the difference between what
    the rest of the output takes after it and after the step of the static tree. All of that is counted in the trace.

    Positions weigh as often as steps of good static trees begin there: where much stands, few do. A bonus on the
    entropy of the choice keeps it from settling on the best static tree before it has learned anything.
    """

    Options = DelayedTreeOptions
    features = frozenset({*VECTORS, Feature.ANCHOR_ENTROPY, Feature.ANCHOR_LOG_PROBABILITY})
    policy: DelayedTreePolicy
    options: DelayedTreeOptions

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """A row for each position at which a draft may begin; vectors in half precision, because there are many."""
        (ranks, branches), rows = ranks_of(prompt), prompt.drafts.rows
        sizes = prompt.drafts.block_sizes.tolist()
        trees = self._trees(sizes, branches)
        accepted = accepted_of(ranks, sizes, trees)
        context_length = torch.arange(rows) + prompt.prompt_length + 1
        prices = TreePrices(trees, [1.0] * len(trees))
        seconds = prices.of(CurveRows(self._curves(trees), prices.row)(context_length))[1].double().numpy()
        left = seconds_left(accepted, seconds)
        good, steps = left[0] <= (1 + NEAR) * left[0].min(), visited(accepted.astype(np.int32))
        after = left[:, good].mean(axis=1)[np.arange(1, rows + 1)[:, None] + accepted]
        of_anchors = (Feature.ANCHOR_ENTROPY, Feature.ANCHOR_LOG_PROBABILITY)
        return {
            **{str(name): _half(prompt.features[name][:rows]) for name in VECTORS},
            **{str(name): torch.tensor(prompt.features[name][:rows]) for name in of_anchors},
            **(self._last_drafts(prompt, trees, accepted, good) if self.policy.config.last_draft else {}),
            "context_length": context_length,
            "accepted": torch.from_numpy(accepted),
            "visited": torch.from_numpy(steps),
            "weight": torch.from_numpy(steps[:, good].mean(axis=1).astype(np.float32)),
            "after": torch.from_numpy(after.astype(np.float32)),
            "sizes": torch.tensor([*sizes, branches], dtype=torch.int16).expand(rows, -1),
        }

    def _trees(self, sizes: Sequence[int], branches: int) -> list[DelayedTree]:
        """What the trace holds, and can be drafted and priced."""
        spec, traced = self.spec, {1, *sizes}
        return [
            tree
            for tree in delayed_trees(min(branches, spec.branches), min(max(traced), spec.trained_block_size) - 1)
            if tree.deepest + 1 in traced
            and tree.nodes < spec.max_block_size
            and has_price(self.cost, tree.deepest + 1, tree.nodes + 1)
        ]

    def _curves(self, trees: Sequence[DelayedTree]) -> CostCurves:
        sizes, deepest = {tree.nodes + 1 for tree in trees}, max(tree.deepest for tree in trees)
        return CostCurves(self.cost, sorted(sizes - {1}), longest_draft=deepest + 1)

    def _last_drafts(
        self,
        prompt: PromptTrace,
        trees: Sequence[DelayedTree],
        accepted: NDArray[np.int16],
        good: NDArray[np.bool_],
    ) -> dict[str, Tensor]:
        """What the drafter knew of each position's anchor, in a draft of some good tree, any that ends a step there.

        `drafter` float16 [rows, drafter hidden] and `drafter_known` bool [rows].
        """
        rows, random = len(accepted), np.random.default_rng((self.options.seed, prompt.index))
        order = random.permutation(np.flatnonzero(np.broadcast_to(good, accepted.shape)))
        ends = (np.arange(1, rows + 1)[:, None] + accepted).ravel()[order]  # row at which the next step begins
        chosen = np.full(rows, -1)
        chosen[ends[ends < rows]] = order[ends < rows]  # the last one stays
        begun, tree = np.divmod(chosen, len(trees))
        place, deepest = np.arange(rows) - begun - 1, np.array([one.deepest for one in trees])[tree]
        known = (chosen >= 0) & (place < deepest)
        column = np.searchsorted(prompt.drafts.block_sizes, deepest + 1)
        at = tuple(np.where(known, index, 0) for index in (begun, column, place))
        hidden = prompt.drafts.features[Feature.DRAFT_HIDDEN][at]
        return {
            "drafter": _half(np.where(known[:, None], hidden, np.float32(0))),
            "drafter_known": torch.from_numpy(known),
        }

    def prepare(self, data: dict[str, Tensor]) -> None:
        """Facts: `trees`, tokens a step of each (`yields`), `inputs` and `drafter` (numbers in vectors), `curves`."""
        if not len(data["context_length"]):
            raise PolicyError("no training prompt has a position to learn from: the outputs are too short")
        *sizes, branches = data["sizes"][0].tolist()
        trees = self._trees(sizes, branches)
        yields, curves = mean_yields(data["accepted"], data["visited"]), self._curves(trees)
        self.facts = {
            "trees": [list(tree) for tree in trees],
            "yields": yields,
            "inputs": {str(name): data[str(name)].shape[1] for name in VECTORS},
            "drafter": data["drafter"].shape[1] if "drafter" in data else 0,
            "scale": self.options.scale,
            "curves": dataclasses.asdict(curves(TYPICAL_CONTEXT)),
        }
        self.prices = TreePrices(trees, yields)
        self.rows = CurveRows(curves, self.prices.row)
        self.networks = nn.ModuleDict(self.policy.build(self.facts))
        self._scores.begin_at(self.rows(torch.tensor([TYPICAL_CONTEXT]))[0, : len(trees)], self.facts["scale"])
        rows = len(data["context_length"])
        some = torch.linspace(0, rows - 1, min(rows, SOME)).long()
        with torch.no_grad():
            self._scores.fit(self.inputs({name: value[some] for name, value in data.items()}))

    def on_train_start(self) -> None:
        if self.global_step == 0:  # of a run that goes on the weights are those of its checkpoint
            self._scores.quieten(self.options.scale)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        static, seconds, _ = self._priced(batch)
        chances = (self._scores(self.inputs(batch)) + static / self.options.scale).softmax(dim=1)
        options = self.options
        lost = throughput_loss(
            chances,
            seconds,
            batch["after"],
            static.argmax(dim=1),
            batch["weight"],
            worst_share=options.worst_share,
            worst_weight=options.worst_weight,
        )
        settled: Tensor = (chances * (chances + TINY).log()).sum(dim=1).mean()
        return lost + options.scale * settled

    def inputs(self, data: dict[str, Tensor]) -> Tensor:
        """As the policy makes them: float32 [rows, inputs]."""
        known = [data[str(name)] for name in (Feature.ANCHOR_ENTROPY, Feature.ANCHOR_LOG_PROBABILITY)]
        if "drafter" in data:
            reached = data["drafter_known"][:, None]
            of_drafter = torch.where(reached, self._dropped("drafter", data["drafter"]), 0.0)
            known.append(torch.cat([of_drafter, reached.float()], dim=1))
        projected = self._dropped("target", *(data[str(name)] for name in VECTORS))
        return inputs(projected, *known, data["context_length"], latencies=self._priced(data)[2])

    def _dropped(self, network: str, *vectors: Tensor) -> Tensor:
        """Projected vectors, in training with dropout."""
        return F.dropout(self.networks[network](*vectors), self.options.dropout, self.networks[network].training)

    @property
    def _scores(self) -> TreeScores:
        return cast("TreeScores", self.networks["scores"])

    def _priced(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Static scores, seconds and latencies of rows, as `TreePrices.of`."""
        return self.prices.of(self.rows(data["context_length"].cpu()).to(self.device))

    def choose(self, replay: Replay) -> None:
        """The margin with the most tokens per second on validation prompts, unless it was given."""
        self.set_options(**self.fastest(replay, self.policy.config.grid))


def throughput_loss(
    chances: Tensor,
    seconds: Tensor,
    after: Tensor,
    static: Tensor,
    weights: Tensor,
    *,
    worst_share: float,
    worst_weight: float,
) -> Tensor:
    """-log of the tokens per second of all rows over those of the static trees, and a penalty, a scalar.

    The tokens are those that the static trees yield, so that the rates are as the seconds until these are decided. The
    penalty is the mean, over the rows in which they are most, of the seconds beyond those of the static tree, in such.

    Args:
        chances: that each tree is drafted, [rows, trees]. seconds, after: of a step with each, and of the rest of the
            output after it, alike.
        static: the best static tree of each row, int64 [rows]. weights: of the rows, not negative.
    """
    theirs, left = (value.gather(1, static[:, None]) for value in (seconds, after))
    ours = (chances * (seconds + after - left)).sum(dim=1, keepdim=True)
    more, weights = (ours / theirs - 1)[:, 0], weights.clamp(min=1e-6)
    ratio = (weights * ours[:, 0]).sum() / (weights * theirs[:, 0]).sum()
    worst = more.topk(max(1, round(worst_share * len(more)))).indices
    penalty = (weights * more)[worst].sum() / weights[worst].sum()
    return ratio.clamp(min=LEAST).log() + worst_weight * penalty


def ranks_of(prompt: PromptTrace) -> tuple[NDArray[np.int32], int]:
    """Ranks as `CandidateTable` has them, int32 [rows, sizes, width], and how many candidates there are.

    Of a trace of chains, drafted tokens are the only candidates.

    Raises:
        PolicyError: the trace holds trees that the drafter chose itself.
    """
    drafts = prompt.drafts
    if drafts.candidates is not None:
        return drafts.candidates.ranks, drafts.candidates.branches
    if drafts.parents is not None:
        raise PolicyError(
            "policy 'delayed_tree' learns from the candidates of every position, and this trace holds the trees that "
            "its drafter chose: trace with `--drafter block-diffusion:branches=4`"
        )
    rows, _, width = drafts.tokens.shape
    place = np.arange(1, rows + 1)[:, None] + np.arange(width)  # in the output: [rows, width]
    text = prompt.output_tokens[np.minimum(place, rows)][:, None]
    stands = (drafts.tokens == text) & (place < rows)[:, None]
    return np.where(drafts.tokens < 0, -1, np.where(stands, 0, 1)).astype(np.int32), 1


def _half(vectors: NDArray[np.float32]) -> Tensor:
    """float16 [rows, numbers]."""
    return torch.from_numpy(vectors.reshape(len(vectors), -1).clip(-HALF, HALF)).half()
