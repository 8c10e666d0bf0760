"""Several continuations of a match as one tree of drafted tokens, their trie.

REST (He et al. 2023, 2311.08252) drafts such a trie, and Hierarchy Drafting (2502.05609) several continuations in one
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple, Protocol

import torch

from bpkit.decode.drafter import Offer, Proposal
from bpkit.decode.trees import TreeShape
from bpkit.draft.best_first import Node, best_nodes, shaped_nodes

COUNTED = 32
"""Occurrences of a match that are asked for what comes next, where there are more."""


class Branch(NamedTuple):
    """A token that may follow.

    Attributes:
        chance: the number of the continuations counted here that go on with it, over the number of all that go on and
            one, so that few are not sure of much; where it is known which came last, that counts twice. Not calibrated.
        share: the same where each counts once, as in `Feature.SOURCE_SHARE`.
        below: what follows it.
    """

    token: int
    chance: float
    share: float
    below: Place


class Place(Protocol):
    """Where a path has come to in what a store knows."""

    def children(self, most: int) -> list[Branch]:
        """What follows, at most so many, the highest chance first."""
        ...


@dataclass(frozen=True, slots=True)
class Continuations:
    """Texts that followed a match and agree so far. One that ends here does not count.

    Attributes:
        texts: of equal chances, that of the text that comes first is the first. at: tokens that they agree in.
        latest_first: whether they are in the order in which they were met, from the latest on, which counts twice.
        vocabulary: ids from here on count but are not drafted, such as what separates the texts of a corpus.
    """

    texts: Sequence[Sequence[int]]
    at: int = 0
    latest_first: bool = False
    vocabulary: int = 2**32

    def children(self, most: int) -> list[Branch]:
        going_on: dict[int, list[Sequence[int]]] = {}
        for text in self.texts:
            if self.at < len(text):
                going_on.setdefault(text[self.at], []).append(text)
        all_and_one, again = 1 + sum(map(len, going_on.values())), self.latest_first
        found = []
        for place, (token, own) in enumerate(going_on.items()):
            chance = (len(own) + (again and place == 0)) / (all_and_one + again)
            if token < self.vocabulary:
                found.append(Branch(token, chance, len(own) / all_and_one, replace(self, texts=own, at=self.at + 1)))
        return sorted(found, key=lambda branch: -branch.chance)[:most]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Places of several stores. What chance one leaves to other tokens than its children is shared out by the next.

    One that counts n continuations once leaves 1 in n + 1: method A of PPM (Cleary & Witten 1984).
    """

    places: Sequence[Place]

    def children(self, most: int) -> list[Branch]:
        left, first, below = 1.0, dict[int, Branch](), dict[int, list[Place]]()
        for place in self.places:
            found = place.children(most)
            for branch in found:
                first.setdefault(branch.token, branch._replace(chance=left * branch.chance))
                below.setdefault(branch.token, []).append(branch.below)
            left *= 1 - sum(branch.chance for branch in found)
        made = [branch._replace(below=Backoff(below[token])) for token, branch in first.items()]
        return sorted(made, key=lambda branch: -branch.chance)[:most]


@dataclass(frozen=True, slots=True)
class Counted(Offer):
    """What a store has: the likeliest token with its share, and where the match has come to."""

    place: Place = field(kw_only=True)

    @classmethod
    def at(cls, place: Place, match: int) -> Counted:
        first = place.children(1)
        return cls([branch.token for branch in first], match, first[0].share if first else 1.0, place=place)


class ContinuationTree:
    """The best tree of what follows a match, which grows as far as it is asked for.

    Args:
        root: where the match has come to. match: its length.
        deepest: tokens of a path. branches: children of a node.
    """

    def __init__(self, root: Place, match: int, deepest: int, branches: int) -> None:
        self.root, self.match, self.deepest, self.branches = root, match, deepest, branches
        self.below: dict[int, list[Branch]] = {}
        """Children of nodes, by their places; of -1 those of the anchor."""
        self.nodes: list[Node] = []
        self._further = best_nodes(self._children)

    def _children(self, place: int, node: Node | None) -> list[float]:
        at, depth = (self.root, 0) if node is None else (self.branch(node).below, node.position + 1)
        self.below[place] = at.children(self.branches) if depth < self.deepest else []
        return [branch.chance for branch in self.below[place]]

    def branch(self, node: Node) -> Branch:
        """What a node was made of."""
        return self.below[node.parent][node.rank]

    def first(self, count: int) -> list[Node]:
        """The best nodes, so many if there are."""
        self.nodes += islice(self._further, max(0, count - len(self.nodes)))
        return self.nodes[:count]

    def offer(self, most: int) -> Offer:
        """The best path, of each node the first child, as far as it lies in the tree of `most` nodes."""
        path = [-1]
        for place in range(most):
            if not self.below.get(path[-1], [True]):  # nothing follows it
                break
            nodes = self.first(place + 1)
            if len(nodes) <= place:
                break
            if nodes[place].parent == path[-1] and nodes[place].rank == 0:
                path.append(place)
        on_path = [self.branch(self.nodes[place]) for place in path[1:]]
        return Offer([branch.token for branch in on_path], self.match, on_path[0].share if on_path else 1.0)

    def proposal(self, wanted: int | TreeShape) -> Proposal:
        """The best tree of so many nodes, or the one of such a shape, as the proposal of its row."""
        if isinstance(wanted, int):
            return self._proposed(self.first(wanted))
        other = ContinuationTree(self.root, self.match, self.deepest, self.branches)
        return other._proposed(shaped_nodes(other._children, wanted))

    def _proposed(self, nodes: list[Node]) -> Proposal:
        return Proposal(
            torch.tensor([[self.branch(node).token for node in nodes]], dtype=torch.long),
            None,
            None,
            [len(nodes)],
            parents=torch.tensor([[node.parent for node in nodes]], dtype=torch.long),
            chances=torch.tensor([[node.chance for node in nodes]], dtype=torch.float32),
            positions=[1 + min(len(nodes), self.deepest)],
        )
