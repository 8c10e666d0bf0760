"""Networks of `delayed_tree`: a few numbers of each vector, from these and scalars a score of every tree, a choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.decode.trees import TreeShape
from bpkit.export.curves import Curves
from bpkit.export.graph import best
from bpkit.learn.gains import NEVER
from bpkit.learn.networks import Standard
from bpkit_trees.delayed_counts import ELSEWHERE
from bpkit_trees.delayed_shapes import DelayedTree

PROJECTED, WIDE, NARROW = 128, 512, 32
"""Numbers that a vector becomes, and neurons of the two layers, as published."""
SCALARS, LATENCIES = 3, 2
"""Numbers of every row beside projected ones. Latencies hardly move in training, and are not standardised by it."""


QUIET = 0.1
"""Of the weights of the last layer, as they are made, with which training begins."""


class Projections(nn.Module):
    """Hidden states, each by a layer of its own and LayerNorm.

    Args:
        widths: of the vectors, by name, in their order.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.each = nn.ModuleDict()
        for name, width in widths.items():
            self.each[name] = nn.Sequential(nn.Linear(width, PROJECTED), nn.LayerNorm(PROJECTED))

    def forward(self, *vectors: Tensor) -> Tensor:
        """Each [..., its width], of any floating type -> float32 [..., vectors * PROJECTED]."""
        made = [project(value.float()) for project, value in zip(self.each.values(), vectors, strict=True)]
        return torch.cat(made, dim=-1)


class TreeScores(nn.Module):
    """A score of every tree.

    Args:
        inputs: their number, of which the last, `SCALARS`, are standardised. trees: outputs.
    """

    def __init__(self, inputs: int, trees: int) -> None:
        super().__init__()
        self.standard = Standard(inputs)
        self.first, self.second, self.output = (
            nn.Linear(inputs, WIDE),
            nn.Linear(WIDE, NARROW),
            nn.Linear(NARROW, trees),
        )

    def fit(self, x: Tensor) -> None:
        """Take mean and deviation of the scalars, the last columns of x, [rows, any]."""
        of_scalars = Standard(SCALARS)
        of_scalars.fit(x[:, -SCALARS:])
        self.standard.mean[-SCALARS:] = of_scalars.mean
        self.standard.scale[-SCALARS:] = of_scalars.scale

    @torch.no_grad()
    def begin_at(self, static: Tensor, scale: float) -> None:
        """Begin with scores that differ by chance alone, whatever the static ones, [trees]."""
        self.output.weight.div_(scale)
        self.output.bias.copy_(-static / scale)

    @torch.no_grad()
    def quieten(self, scale: float) -> None:
        """Begin with scores that are nearly alike, so that training tries all trees."""
        self.output.weight.mul_(QUIET * scale)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, inputs] -> [batch, trees]."""
        x = F.silu(self.first(self.standard(x)))
        return cast("Tensor", self.output(F.silu(self.second(x))))


class TreePrices(nn.Module):
    """What steps with each tree take.

    Args:
        trees: that may be drafted, the one without nodes first. yields: tokens a step of each in training.
    """

    def __init__(self, trees: Sequence[DelayedTree], yields: Sequence[float]) -> None:
        super().__init__()
        self.longest, self.widest = max(tree.deepest for tree in trees), max(tree.nodes for tree in trees)
        self.register_buffer("deepest", torch.tensor([tree.deepest for tree in trees]))
        self.register_buffer("nodes", torch.tensor([tree.nodes for tree in trees]))
        self.register_buffer("yields", torch.tensor(yields))

    def seconds(self, draft_seconds: Tensor, verify_seconds: Tensor) -> Tensor:
        """Of a step, float32 [batch, trees], from what `bpkit.export.curves.Curves` has at the context of each row."""
        return draft_seconds[:, cast("Tensor", self.deepest)] + verify_seconds[:, cast("Tensor", self.nodes)]

    def forward(self, draft_seconds: Tensor, verify_seconds: Tensor) -> tuple[Tensor, Tensor]:
        """Static scores, [batch, trees], 0 of the best static tree and less of others; latencies, [batch, LATENCIES].

        A score is what a tree yields beyond the best static one in training, less what it takes beyond that, in steps
        of that: a second is worth the tokens that it brings there (`bpkit.learn.gains`). The latencies are what the
        longest draft and the widest pass take beyond a step without a draft, in such steps.
        """
        yields, seconds = cast("Tensor", self.yields), self.seconds(draft_seconds, verify_seconds)
        place = (yields / seconds).argmax(dim=1, keepdim=True)
        static = yields / yields[place] - seconds / seconds.gather(1, place)
        draft, verify = draft_seconds[:, 0], verify_seconds[:, 0]
        more = [draft_seconds[:, self.longest] - draft, verify_seconds[:, self.widest] - verify]
        return static, torch.stack(more, dim=1) / (draft + verify)[:, None]

    def row(self, curves: Curves) -> list[float]:
        """Static scores, seconds and latencies of one context length, one behind the other."""
        of_row = torch.tensor([curves.draft]), torch.tensor([curves.verify])
        static, latencies = self(*of_row)
        return torch.cat([static, self.seconds(*of_row), latencies], dim=1)[0].tolist()

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Static scores, seconds and latencies of such rows."""
        trees = len(cast("Tensor", self.nodes))
        return rows[:, :trees], rows[:, trees : 2 * trees], rows[:, 2 * trees :]


class TreeChoice(nn.Module):
    """From what is known before a draft to the tree to draft: what decides live, and what is exported.

        score(a) = scale * network(x)[a] + yield(a) / yield(a*) - seconds(a) / seconds(a*)

    `yield(a)` is what tree a yielded a step in training, and a* the best static tree at the costs: what a network that
    says nothing chooses. That is chosen, too, where costs are others than in training, so that another one is the best.

    Args:
        projections: of the target's vectors. network: a `TreeScores` for all trees of training, or the same sooner.
        trees: that may be drafted. places: theirs among those of training. yields: of all of those.
        curves: what steps cost in training. scale: of what the network gives. margin: as of `DelayedTreeConfig`.
    """

    def __init__(
        self,
        projections: Projections,
        network: Callable[[Tensor], Tensor],
        trees: Sequence[DelayedTree],
        places: Sequence[int],
        yields: Sequence[float],
        *,
        curves: Curves,
        scale: float,
        margin: float,
    ) -> None:
        super().__init__()
        self.projections, self.network, self.scale, self.margin = projections, network, scale, margin
        self.prices = TreePrices(trees, [yields[place] for place in places])
        self.home = int(np.argmax(self.prices.row(curves)[: len(trees)]))
        shapes, width = [TreeShape.delayed(*tree) for tree in trees], self.prices.widest
        self.register_buffer("places", torch.tensor(places))
        self.register_buffer("parents", torch.tensor([[*s.parents, *[-1] * (width - len(s))] for s in shapes]))
        self.register_buffer("ranks", torch.tensor([[*s.ranks, *[0] * (width - len(s))] for s in shapes]))

    def scores(self, x: Tensor, static: Tensor) -> Tensor:
        """From what `inputs` gives and static scores: float32 [batch, trees]."""
        return self.scale * self.network(x)[:, cast("Tensor", self.places)] + static

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each tree block_size, parents, ranks ([trees, nodes]) and depth, int64 [trees]."""
        found = self.prices.nodes, self.parents, self.ranks, self.prices.deepest
        nodes, parents, ranks, deepest = cast("tuple[Tensor, Tensor, Tensor, Tensor]", found)
        return nodes + 1, parents, ranks, deepest

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Vectors, then as `inputs` takes them up to the context length, `draft_seconds` and `verify_seconds`.

        Returns:
            The row's of each of `tables`, scores float32 [batch, trees], of trees that are not far enough ahead of the
            best static one `NEVER`, and margin float32 [batch].
        """
        vectors = len(self.projections.each)
        *known, draft_seconds, verify_seconds = given[vectors:]
        static, latencies = self.prices(draft_seconds, verify_seconds)
        scores = self.scores(inputs(self.projections(*given[:vectors]), *known, latencies=latencies), static)
        floor = torch.arange(static.shape[1]) == static.argmax(dim=1, keepdim=True)
        least = torch.where(floor, scores, NEVER).amax(dim=1, keepdim=True) + self.margin
        at_home = static[:, self.home, None] > -ELSEWHERE
        scores = torch.where((scores > least) & at_home | floor, scores, NEVER)
        place, margin = best(scores)
        return (*(table[place] for table in self.tables()), scores, margin)


def inputs(projected: Tensor, *known: Tensor, latencies: Tensor) -> Tensor:
    """What `TreeScores` takes, float32 [batch, inputs].

    Args:
        projected: vectors. known: entropy and log-probability of the anchor, what is known of the last draft, if it is
            read, as `AfterStep` gives it, and the context length. latencies: as `TreePrices` gives them.
    """
    entropy, log_probability, *last_draft, context_length = known
    scalars = [value[:, None] for value in (entropy, log_probability, context_length.float().log())]
    return torch.cat([projected, *last_draft, latencies, *scalars], dim=1)


class AfterDraft(nn.Module):
    """What is kept of a draft until its step has ended: the drafter at each depth, and nothing is left out of it.

    The positions of block diffusion do not depend on what is drafted before them, so that the first path of the tree,
    its first nodes, stands for all.

    Args:
        projections: of the drafter's hidden state. deepest: tokens of the longest path.
    """

    def __init__(self, projections: Projections, deepest: int) -> None:
        super().__init__()
        self.projections, self.deepest = projections, deepest

    def forward(self, draft_hidden: Tensor, draft_length: Tensor) -> tuple[Tensor, ...]:
        """verify_length int64 [batch]; of each depth the drafter, float32 [batch, deepest, PROJECTED], 0 beyond the
        draft; and margin float32 [batch], 1: nothing is weighed.
        """
        projected = self.projections(draft_hidden)
        padding = 0.0 * draft_length[:, None, None] + torch.zeros(self.deepest, PROJECTED)
        there = torch.arange(self.deepest) < draft_length[:, None]
        kept = torch.where(there[..., None], torch.cat([projected, padding], dim=1)[:, : self.deepest], 0.0)
        return draft_length, kept, torch.where(draft_length >= 0, 1.0, 0.0)


class AfterStep(nn.Module):
    """What is known of the last draft: the drafter where the target decided the anchor, if the draft reached so far."""

    def forward(self, num_accepted: Tensor, draft_length: Tensor, depth: Tensor, of_depths: Tensor) -> Tensor:
        """int64 [batch] each, and as `AfterDraft` gives it -> float32 [batch, PROJECTED + 1]: 1 at the end if known."""
        known = (num_accepted < depth.minimum(draft_length))[:, None]
        place = num_accepted.clamp(max=of_depths.shape[1] - 1)[:, None, None].expand(-1, 1, of_depths.shape[2])
        found = torch.cat([of_depths.gather(1, place)[:, 0], torch.ones_like(of_depths[:, 0, :1])], dim=1)
        return torch.where(known, found, 0.0)
