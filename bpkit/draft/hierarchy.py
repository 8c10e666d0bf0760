"""Hierarchy Drafting: three stores of n-grams, asked in order; no model (Cho et al. 2025, arXiv 2502.05609)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from bpkit.decode.drafter import EachRow, GoOn, Offer, Proposal, proposed
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RowText, RunningText
from bpkit.decode.trees import TreeShape
from bpkit.draft.config import HierarchyConfig
from bpkit.draft.stores.context import ContextStore, TextIndex
from bpkit.draft.stores.files import Store, StoreFacts, open_store
from bpkit.draft.stores.trees import Backoff, Branch, ContinuationTree, Counted, Place
from bpkit.draft.vocabulary import fingerprint_tokenizer
from bpkit.types import DraftWork, Feature


class HierarchyDrafter:
    """Drafts what followed the end of the text: in the text itself, in the target's answers, in a corpus.

    The model and the corpus store are only read. The context store belongs to one request, unless it was asked to live
    across requests.

    With `branches` a draft is the trie of all that the stores have of what followed their matches: the `block_size - 1`
    nodes with the highest products of chances, at most `trained_block_size - 1` deep. A child's chance is its share of
    the continuations that go on after the node's path, with one more in the divisor; the share of that one goes to
    children that the next store has and this one has not. The context store counts each different continuation that it
    keeps once and the latest twice, the model store an n-gram once for each text that had it, the corpus up to 32
    occurrences. An offer is the best path: of each node the first child.

    Args:
        store: the tables of the model and the corpus store; without them the context alone is asked.
        options: see `HierarchyConfig`.

    Raises:
        ValueError: only stores are to be asked that are not there; `branches` with a model store without counts.

    Attributes:
        drafts: drafts made so far, by the store that began them.
    """

    kind, work = "hierarchy", DraftWork("nothing", "none")
    feature_layers: tuple[int, ...] = ()
    provides = frozenset({Feature.DRAFT_TOKENS})

    def __init__(self, store: Store | None = None, options: HierarchyConfig | None = None) -> None:
        self.options = options = options or HierarchyConfig()
        self.store = store
        asked = "" if options.order == HierarchyConfig().order else f" {'+'.join(options.order)}"
        self.name = f"hierarchy{asked}" + ("" if store is None else f" of {store.path.name}")
        self.trained_block_size = options.block_size
        self.max_block_size = max(32, max(2, options.branches) * options.block_size)
        self.order = tuple(name for name in options.order if name == "context" or store is not None)
        if not self.order:
            order = "+".join(options.order)
            raise ValueError(f"order {order} needs a store, which `bpkit store build` makes: hierarchy:store=FOLDER")
        self.branches = options.branches
        if self.branches > 1 and store is not None and "model" in self.order and store.model.counts is None:
            raise ValueError(
                f"store {store.path} has no counts of n-grams, which branches={self.branches} needs: build it again "
                "with `bpkit store build`, or leave the model store out with order=context+corpus"
            )
        self.remembers_requests, self.depends_on_steps = options.across_requests, options.last_pass
        self.shared = self.context() if options.across_requests else None
        self.drafts: Counter[str] = Counter()

    @classmethod
    def load(cls, path: str, target: PreTrainedModel, *, store: str = "", **options: Any) -> HierarchyDrafter:
        """Make one with the store in a folder.

        Raises:
            ValueError: a store of another tokenizer, or damaged. FileNotFoundError: no store there.
        """
        chosen = HierarchyConfig(store=store or path, **options)
        if not chosen.store:
            return cls(None, chosen)
        opened = open_store(Path(chosen.store))
        refuse_misfit(opened.facts, target, chosen.store)
        return cls(opened, chosen)

    def context(self) -> ContextStore:
        """An empty context store."""
        return ContextStore(self.options.span, self.options.candidates, self.options.max_entries)

    def begin(self, text: RunningText) -> EachRow:
        return EachRow(text, partial(HierarchySession if self.branches == 1 else HierarchyTrees, self))


class HierarchySession:
    """The stores as one row asks them.

    Attributes:
        source: the store that the last offer began in; empty if there was none.
    """

    def __init__(self, drafter: HierarchyDrafter, text: RowText) -> None:
        self.drafter, self.options, self.tokens = drafter, drafter.options, text.tokens
        sizes = range(self.options.max_ngram, self.options.min_ngram - 1, -1)
        self.index = TextIndex(drafter.shared or drafter.context(), sizes, text.tokens)
        self.matches = range(self.options.max_match, self.options.min_match - 1, -1)
        self.longest = max(self.options.max_ngram, self.options.max_match)
        self.said: list[int] = []
        """By the target, in its last pass, after the first wrong token."""
        self.source = ""
        self.asked, self.made = 0, Offer([])
        """The offer for this text, and for how many tokens: a draft is its beginning."""

    def passed(self, chosen: list[int]) -> None:
        """Take in what the target said at verified positions after the step's last token."""
        self.said = chosen if self.options.last_pass else []

    def advance(self, features: Tensor | None) -> None:
        self.asked = 0
        self.index.advance()
        if self.said:
            # Said after a wrong token, so no more than one token of what led to it is certain: short n-grams alone.
            read = [self.tokens[-1], *self.said]
            for end in range(1, len(read)):
                self.index.store.add((read[end - 1],), tuple(read[end : end + self.options.span]))
            self.said = []

    def offer(self, most: int) -> Offer:
        """What it would draft now, at most `most` tokens, and the length of the match that they follow.

        What is drafted is looked up again as if it stood, as long as that finds a match of `go_on_match` tokens.
        """
        first, self.source = self.find(self.tokens[-self.longest :], most)
        tokens = first.tokens
        for _ in range(self.options.look_ups - 1):
            if not tokens or len(tokens) >= most:
                break
            more, _ = self.find(self.tail_with(tokens), most - len(tokens))
            if more.match < self.options.go_on_match:
                break
            tokens = tokens + more.tokens
        self.asked, self.made = most, Offer(tokens[:most], first.match, first.share)
        return self.made

    def tail_with(self, drafted: Sequence[int]) -> list[int]:
        """The end of the text as if these tokens stood."""
        return [*self.tokens[-self.longest :], *drafted][-self.longest :]

    def find(self, tail: list[int], most: int) -> tuple[Offer, str]:
        """What follows in the first store that has a match of `sure_match` tokens, else in that with the longest.

        Returns:
            an offer, perhaps of more than `most` tokens, and the store's name.
        """
        best, store = Offer([]), ""
        for name in self.drafter.order:
            found = self.look_up(name, tail, most)
            if found.tokens and found.match > best.match:
                best, store = found, name
                if found.match >= self.options.sure_match:
                    break
        return best, store

    def look_up(self, name: str, tail: list[int], most: int) -> Offer:
        """What one store has."""
        if name == "context" or self.drafter.store is None:
            return self.index.find(tail)
        if name == "model":
            return self.drafter.store.model.find(tail)
        return self.drafter.store.corpus.find(tail, self.matches, most)

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        most = block_size - 1
        tokens = (self.made if self.asked >= most else self.offer(most)).tokens[:most]
        if tokens:
            self.drafter.drafts[self.source] += 1
        return proposed(Offer(tokens))


class HierarchyTrees(HierarchySession):
    """The same where drafts are trees."""

    def __init__(self, drafter: HierarchyDrafter, text: RowText) -> None:
        super().__init__(drafter, text)
        self.deepest = drafter.trained_block_size - 1
        self.grown: ContinuationTree | None = None

    def advance(self, features: Tensor | None) -> None:
        super().advance(features)
        self.grown = None

    def offer(self, most: int) -> Offer:
        """The best path of the tree of `most` nodes, and the length of the match that it follows."""
        return self.tree().offer(most)

    def tree(self) -> ContinuationTree:
        """What follows the text."""
        if self.grown is None:
            first, self.source = self.find(self.tail_with(()), self.deepest)
            root = Onward(self, first.place, (), self.options.look_ups - 1)
            self.grown = ContinuationTree(root, first.match, self.deepest, self.drafter.branches)
        return self.grown

    def find(self, tail: list[int], most: int) -> tuple[Counted, str]:
        """What follows in all stores, and the name of that which comes first."""
        looked_up = [(self.look_up(name, tail, most), name) for name in self.drafter.order]
        found = [(own, name) for own, name in looked_up if own.tokens]
        if not found:
            return Counted([], place=Backoff(())), ""
        sure = (own for own in found if own[0].match >= self.options.sure_match)
        first = next(sure, None) or max(found, key=lambda own: own[0].match)
        places = [first[0].place, *(own[0].place for own in found if own is not first)]
        return Counted(first[0].tokens, first[0].match, first[0].share, place=Backoff(places)), first[1]

    def look_up(self, name: str, tail: list[int], most: int) -> Counted:
        if name == "context" or self.drafter.store is None:
            return self.index.find_all(tail)
        if name == "model":
            return self.drafter.store.model.find_all(tail)
        return self.drafter.store.corpus.find_all(tail, self.matches, most)

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None, shape: TreeShape | None = None) -> Proposal:
        proposal = self.tree().proposal(shape or block_size - 1)
        if proposal.counts[0]:
            self.drafter.drafts[self.source] += 1
        return proposal


@dataclass(frozen=True, slots=True)
class Onward:
    """A place in a store, where a path that ends is looked up again as if it stood.

    Attributes:
        path: to it, from the text on. left: look-ups that the path may still take.
    """

    session: HierarchyTrees
    place: Place
    path: tuple[int, ...]
    left: int

    def children(self, most: int) -> list[Branch]:
        found, left, session = self.place.children(most), self.left, self.session
        if not found and self.path and left:
            more, _ = session.find(session.tail_with(self.path), session.deepest - len(self.path))
            if more.match >= session.options.go_on_match:
                found, left = more.place.children(most), left - 1
        return [
            branch._replace(below=Onward(session, branch.below, (*self.path, branch.token), left)) for branch in found
        ]


def refuse_misfit(facts: StoreFacts, target: PreTrainedModel, name: str) -> None:
    """Raise ValueError if a store's token ids are not the target's, as far as that can be known without the network."""
    vocab_size, path = target.config.get_text_config().vocab_size, str(target.name_or_path or "")
    ours = fingerprint_tokenizer(path) if path and facts.tokenizer else None
    if facts.vocab_size > vocab_size or (facts.vocab_size < vocab_size if ours is None else ours != facts.tokenizer):
        raise ValueError(
            f"store {name} has token ids of another tokenizer: it was made for {facts.target} ({facts.vocab_size} ids, "
            f"fingerprint {facts.tokenizer}), and the target {path or type(target).__name__} has {vocab_size} ids, "
            f"fingerprint {ours}; make one for this target with `bpkit store build`"
        )
