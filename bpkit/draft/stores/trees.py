"""Several continuations of a match as one tree of drafted tokens, their trie.

REST (He et al. 2023, 2311.08252) drafts such a trie, and Hierarchy Drafting (2502.05609) several continuations in one
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    """An offer that is the best path of a tree.

    Attributes:
        place: where the match has come to.
    """

    place: Place = field(kw_only=True)

    @classmethod
    def at(cls, place: Place, match: int, most: int = 1) -> Counted:
        """What follows there: of each node the child with the highest chance, up to `most` tokens."""
        tokens, share, below = list[int](), 1.0, place
        while len(tokens) < most and (found := below.children(1)):
            share = share if tokens else found[0].share
            tokens.append(found[0].token)
            below = found[0].below
        return cls(tokens, match, share, place=place)


def drafted_tree(root: Place, wanted: int | TreeShape, deepest: int, branches: int) -> Proposal:
    """A tree of what follows as the proposal of its row.

    Args:
        wanted: nodes of the best tree, or the tree. deepest: tokens of a path. branches: children of a node.
    """
    below: dict[int, list[Branch]] = {}

    def children(place: int, node: Node | None) -> list[float]:
        at, depth = (root, 0) if node is None else (below[node.parent][node.rank].below, node.position + 1)
        below[place] = at.children(branches) if depth < deepest else []
        return [branch.chance for branch in below[place]]

    nodes = best_nodes(children, wanted) if isinstance(wanted, int) else shaped_nodes(children, wanted)
    return Proposal(
        torch.tensor([[below[node.parent][node.rank].token for node in nodes]], dtype=torch.long),
        None,
        None,
        [len(nodes)],
        parents=torch.tensor([[node.parent for node in nodes]], dtype=torch.long),
        chances=torch.tensor([[node.chance for node in nodes]], dtype=torch.float32),
        positions=[1 + min(len(nodes), deepest)],
    )
