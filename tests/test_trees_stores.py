"""Several continuations out of stores: their trie is drafted as one tree, and the text stays that of plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bpkit import Context, Draft, Feature, Plan, Policy, SpeculativeDecoder
from bpkit.decode.drafter import Drafter, EachRow, Offer, Proposal
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.decode.text import RowText, RunningText
from bpkit.decode.trees import TreeShape
from bpkit.draft.config import HierarchyConfig, NgramConfig
from bpkit.draft.hierarchy import HierarchyDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.draft.stores.files import Store, open_store
from bpkit.draft.stores.trees import Backoff, Continuations, ContinuationTree, Place
from bpkit.policy import State
from bpkit.testing import TinyPair
from tests.test_lossless import SAMPLINGS, Outputs, Sampling, name_of_sampling
from tests.tiny_store import store_of

if TYPE_CHECKING:
    from tests.conftest import PlainDecoding

SEED = 20
PROMPTS = ("1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, ", "f(x) = f(y) = f(x) = f(z) = f(", "abcabdabcabe ab")


@pytest.fixture(scope="module")
def outputs(pair: TinyPair, plain: PlainDecoding) -> Outputs:
    return Outputs(plain, pair.target)


@pytest.fixture(scope="module")
def store(pair: TinyPair, outputs: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of the target's answers, and twice of others that begin alike, so that the answers are second candidates."""
    texts = []
    for prompt in PROMPTS:
        ids = pair.ids(prompt)
        answer = [*ids[0].tolist(), *outputs(ids, SAMPLINGS[0], max_new_tokens=24).tokens]
        wrong = [token if i % 5 else (token + 1) % 90 for i, token in enumerate(answer)]
        texts += [answer, wrong, wrong]
    return store_of(tmp_path_factory.mktemp("store"), texts, vocab_size=pair.target.config.vocab_size)


def paths_of(proposal: Proposal) -> dict[tuple[int, ...], float]:
    """The path to each node of a proposal of one row, in their order, with its chance."""
    assert proposal.parents is not None
    assert proposal.chances is not None
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposal.tokens[0].tolist(), proposal.parents[0].tolist(), strict=True):
        paths.append((*paths[parent + 1], token))
    assert len(set(paths)) == len(paths), "children of a node are different tokens"
    return dict(zip(paths[1:], proposal.chances[0].tolist(), strict=True))


def tree_of(root: Place, most: int, deepest: int, branches: int) -> Proposal:
    return ContinuationTree(root, 1, deepest, branches).proposal(most)


def session_of(drafter: Drafter, tokens: Sequence[int]) -> Any:
    """The session of a row that has read these tokens."""
    text = RunningText([RowText(torch.tensor([list(tokens)]), 1000)])
    session = drafter.begin(text)
    session.advance(None)
    assert isinstance(session, EachRow)
    return session.sessions[0]


def drafted(drafter: Drafter, tokens: Sequence[int], nodes: int) -> dict[tuple[int, ...], float]:
    proposal: Proposal = session_of(drafter, tokens).draft(nodes + 1, None, None)
    assert proposal.counts == [len(proposal.tokens[0])]
    return paths_of(proposal)


# The trie.


def test_the_trie_of_a_text_made_by_hand() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]
    found = drafted(NgramDrafter(max_ngram=2, min_ngram=2, branches=3, block_size=4), text, 20)
    # After "1 2": 3 1 2, then 4 1 2, and the latest, 3 5 1, which counts twice.
    assert found == pytest.approx(
        {
            (3,): 3 / 5,
            (3, 5): 2 / 4,
            (3, 5, 1): 2 / 3,
            (4,): 1 / 5,
            (3, 1): 1 / 4,
            (4, 1): 2 / 3,
            (3, 1, 2): 2 / 3,
            (4, 1, 2): 2 / 3,
        }
    )
    assert list(found)[:4] == [(3,), (3, 5), (4,), (3, 5, 1)], "of 0.6, 0.3, 0.2 and 0.2"


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=6),
    latest_first=st.booleans(),
    most=st.integers(1, 30),
    deepest=st.integers(1, 5),
    branches=st.integers(1, 4),
)
def test_the_best_nodes_are_drafted(
    texts: list[list[int]], latest_first: bool, most: int, deepest: int, branches: int
) -> None:
    """Against all paths, counted one by one."""

    def chances(path: tuple[int, ...]) -> dict[int, float]:
        on = [text for text in texts if len(text) > len(path) and tuple(text[: len(path)]) == path]
        weights = [1 + (latest_first and i == 0) for i in range(len(on))]
        seen = dict.fromkeys(text[len(path)] for text in on)
        of = {
            token: sum(w for w, text in zip(weights, on, strict=True) if text[len(path)] == token) / (sum(weights) + 1)
            for token in seen
        }
        return dict(sorted(of.items(), key=lambda item: -item[1])[:branches])

    products: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(deepest):
        for path in [path for path in products if len(path) == depth]:
            products.update({(*path, token): products[path] * chance for token, chance in chances(path).items()})
    del products[()]
    found = paths_of(tree_of(Continuations(texts, latest_first=latest_first), most, deepest, branches))
    assert set(found) <= set(products)
    assert [products[path] for path in found] == pytest.approx(sorted(products.values(), reverse=True)[:most])
    for path, chance in found.items():
        assert chance == pytest.approx(chances(path[:-1])[path[-1]])


def test_a_smaller_tree_is_the_beginning_of_a_larger_one() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 3, 1, 5, 2, 1]
    for drafter in (NgramDrafter(branches=3, max_ngram=1), HierarchyDrafter(None, HierarchyConfig(branches=3))):
        sizes = [[*drafted(drafter, text, nodes)] for nodes in range(1, 31)]
        assert all(more[: len(less)] == less for less, more in itertools.pairwise(sizes))
        assert len(sizes[-1]) > 12
        assert max(map(len, sizes[-1])) == drafter.trained_block_size - 1
        assert drafter.max_block_size == 32


def test_what_others_leave_goes_to_the_next_store() -> None:
    places = [Continuations([[1, 2], [1, 3]]), Continuations([[4], [1, 9], [4]]), Continuations([[7]])]
    found = paths_of(tree_of(Backoff(places), 20, 5, 5))
    assert found == pytest.approx(
        {
            (1,): 2 / 3,
            (4,): 1 / 3 * 2 / 4,
            (7,): 1 / 3 * 1 / 4 * 1 / 2,
            (1, 2): 1 / 3,
            (1, 3): 1 / 3,
            (1, 9): 1 / 3 * 1 / 2,
        }
    )
    assert paths_of(tree_of(Backoff(()), 5, 5, 5)) == {}


def test_an_offer_is_the_best_path(store: Store, pair: TinyPair) -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]
    drafter = NgramDrafter(branches=3, block_size=4)
    offer = session_of(drafter, text).offer(9)
    assert (offer.tokens, offer.match, offer.share) == ([3, 5, 1], 2, 2 / 4)
    options = HierarchyConfig(branches=3)
    for tokens in (text, pair.ids(PROMPTS[0])[0].tolist(), [88]):
        for most in (31, 9, 4):
            session = session_of(HierarchyDrafter(store, options), tokens)
            offer = session.offer(most)
            assert len(offer.tokens) <= 7
            found = paths_of(session.draft(most + 1, None, None))
            best: tuple[int, ...] = ()
            while after := {path: chance for path, chance in found.items() if path[:-1] == best}:
                best = max(after, key=lambda path: after[path])
            assert list(best) == offer.tokens
            assert (offer.match > 0) == bool(offer.tokens)
    assert session.offer(31).tokens == []


def test_no_match_no_tree() -> None:
    for drafter in (NgramDrafter(branches=2), HierarchyDrafter(None, HierarchyConfig(branches=2))):
        session = session_of(drafter, [1, 2, 3])
        assert session.offer(7).tokens == []
        made = session.draft(8, None, None)
        assert made.counts == [0]
        assert made.parents.shape == made.chances.shape == made.tokens.shape == (1, 0)


def test_trees_that_are_asked_for() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]
    session = session_of(NgramDrafter(max_ngram=2, branches=3, block_size=4), text)
    shape = TreeShape((-1, -1, 1, 0, 0, -1), (0, 1, 0, 1, 0, 2))
    made = session.draft(len(shape) + 1, None, None, shape=shape)
    assert [*paths_of(made)] == [(3,), (4,), (4, 1), (3, 1), (3, 5)], "a third child of the anchor is not there"


# Stores.


def test_a_model_store_counts_the_texts_of_each_ngram(tmp_path: Path) -> None:
    store = store_of(tmp_path, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 6], [1, 2, 7, 8, 9], [9, 1, 2, 3, 4]])
    drafter = HierarchyDrafter(store, HierarchyConfig(order=("model",), branches=4, look_ups=1))
    found = drafted(drafter, [1, 2], 20)
    assert found == pytest.approx(
        {(3,): 3 / 5, (3, 4): 3 / 4, (3, 4, 6): 2 / 4, (3, 4, 5): 1 / 4, (7,): 1 / 5, (7, 8): 1 / 2, (7, 8, 9): 1 / 2}
    )
    assert session_of(drafter, [1, 2]).offer(7).share == 3 / 5


def test_a_store_without_counts_still_drafts_chains(tmp_path: Path) -> None:
    store = store_of(tmp_path, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    (tmp_path / "counts.npy").unlink()
    old = open_store(tmp_path)
    assert session_of(HierarchyDrafter(old), [1, 2]).offer(3) == session_of(HierarchyDrafter(store), [1, 2]).offer(3)
    with pytest.raises(ValueError, match=r"has no counts of n-grams, which branches=4 needs: build it again"):
        HierarchyDrafter(old, HierarchyConfig(branches=4))
    HierarchyDrafter(old, HierarchyConfig(branches=4, order=("context", "corpus")))


def test_the_corpus_goes_on_within_a_text_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path, [[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2]])
    drafter = HierarchyDrafter(store, HierarchyConfig(order=("corpus",), branches=4, look_ups=1))
    # One occurrence in four ends there, which counts.
    assert drafted(drafter, [1, 2], 20) == pytest.approx({(3,): 2 / 5, (4,): 1 / 5})


def test_paths_that_end_are_looked_up_again() -> None:
    text = [5, 6, 1, 2, 7, 8, 3, 4, 5, 6, 1, 3, 5, 6]
    once, again = (
        HierarchyDrafter(None, HierarchyConfig(branches=2, span=2, look_ups=look_ups)) for look_ups in (1, 8)
    )
    assert max(map(len, drafted(once, text, 31))) == 2
    found = drafted(again, text, 31)
    assert {(1, 2), (1, 3)} <= set(found)
    assert (1, 2, 7, 8, 3, 4, 5) in found, "1 2 is looked up as if it stood, and so on"
    assert (1, 3, 5, 6) in found


# Texts are those of plain decoding.


class Noted(Policy):
    """Verifies whole drafts of a size, and notes them."""

    wants = frozenset({Feature.DRAFT_TOKENS})

    def __init__(self, size: int, source: int = 0) -> None:
        super().__init__()
        self.size, self.source = size, source
        self.drafts: list[Draft] = []

    def select(self, state: State, context: Context) -> Any:
        if self.source < 0:  # a source for each row in turn
            own = (context.position + torch.arange(context.batch_size)) % len(context.spec.sources)
            return Plan(context.full(self.size), own)
        return context.full(self.size)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        self.drafts.append(draft)
        return draft.draft_length


def drafters(store: Store) -> dict[str, Drafter]:
    return {
        "ngram": NgramDrafter(branches=3, max_ngram=2),
        "hierarchy": HierarchyDrafter(store, HierarchyConfig(branches=3)),
        "context": HierarchyDrafter(None, HierarchyConfig(branches=2, max_ngram=1, sure_match=1, last_pass=True)),
        "corpus": HierarchyDrafter(store, HierarchyConfig(branches=4, order=("corpus",), min_match=1)),
    }


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=name_of_sampling)
@pytest.mark.parametrize("name", ["ngram", "hierarchy", "context", "corpus"])
def test_trees_of_stores_leave_the_text_alone(
    pair: TinyPair, outputs: Outputs, store: Store, name: str, sampling: Sampling
) -> None:
    decoder = SpeculativeDecoder(pair.target, drafters(store)[name], "fixed:4", tokenizer=pair.tokenizer, strict=True)
    assert decoder.spec.branches > 1
    rows = [{"prompt": prompt, "stream_id": i} for i, prompt in enumerate(PROMPTS)]
    for policy in ("fixed:24", "tree:slope=0.001", "ema", "goodput", "portfolio"):
        made = decoder.with_policy(policy).generate(rows, max_new_tokens=24, seed=SEED, **sampling.options)
        for place, one in enumerate(made):
            wanted = outputs(pair.ids(PROMPTS[place]), sampling, max_new_tokens=24, stream_id=place)
            assert one.error is None
            assert one.tokens[0].tolist() == wanted.tokens
            assert all(int(step.draft_length) < decoder.spec.max_block_size for step in one.steps)


def test_the_second_continuation_of_a_match_stands(pair: TinyPair, outputs: Outputs, store: Store) -> None:
    """Where two texts in three go on otherwise than the target does, both are verified and its own is accepted."""
    drafter = HierarchyDrafter(store, HierarchyConfig(branches=2, order=("corpus",), max_match=3))
    policy = Noted(8)
    decoder = SpeculativeDecoder(pair.target, drafter, policy, tokenizer=pair.tokenizer, strict=True)
    result = decoder.generate(PROMPTS[0], max_new_tokens=24, temperature=0)
    assert result.tokens[0].tolist() == outputs(pair.ids(PROMPTS[0]), SAMPLINGS[0], max_new_tokens=24).tokens
    forks = 0
    for step, draft in zip(result.steps, policy.drafts, strict=True):
        assert draft.parents is not None
        assert step.path is not None
        for node in step.path[0].tolist():
            siblings = (draft.parents[0] == draft.parents[0, node]).nonzero()[:, 0].tolist()
            forks += siblings.index(node) == 1 and max(siblings) < int(step.verify_length)
    assert forks > 1
    chains = SpeculativeDecoder(
        pair.target,
        HierarchyDrafter(store, HierarchyConfig(order=("corpus",), max_match=3)),
        "fixed:8",
        tokenizer=pair.tokenizer,
    )
    assert len(result.steps) < len(chains.generate(PROMPTS[0], max_new_tokens=24, temperature=0).steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_of_a_store_beside_chains_of_a_model(pair: TinyPair, store: Store, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "seed": SEED}
    several: list[Drafter] = [pair.block_diffusion(), drafters(store)["ngram"], drafters(store)["hierarchy"]]
    plain = SpeculativeDecoder(pair.target, several, "fixed:1", tokenizer=pair.tokenizer)
    assert [source.branches for source in plain.spec.sources] == [1, 3, 3]
    wanted = [one.tokens.tolist() for one in plain.generate(list(PROMPTS), **options)]
    for policy in (Noted(9, source=-1), "portfolio", "fixed:12,source=2"):
        decoder = SpeculativeDecoder(pair.target, several, policy, tokenizer=pair.tokenizer, strict=True)
        made = decoder.generate(list(PROMPTS), **options)
        assert [one.tokens.tolist() for one in made] == wanted
        if isinstance(policy, Noted):
            of_trees = [draft for draft in policy.drafts if draft.parents is not None]
            mixed = 0
            for draft in of_trees:
                assert draft.parents is not None
                for row, (source, length) in enumerate(
                    zip(draft.source.tolist(), draft.draft_length.tolist(), strict=True)
                ):
                    chain = draft.parents[row, :length].tolist() == list(range(-1, length - 1))
                    assert chain or source > 0
                    mixed += not chain
            assert mixed > 0


# Options.


def test_branches_by_name(pair: TinyPair, store: Store) -> None:
    drafter = resolve_drafter("ngram:branches=4,block_size=20", pair.target)
    assert isinstance(drafter, NgramDrafter)
    assert (drafter.branches, drafter.trained_block_size, drafter.max_block_size) == (4, 20, 80)
    assert NgramConfig().branches == HierarchyConfig().branches == 1
    drafter = resolve_drafter("hierarchy:branches=3", pair.target)
    assert isinstance(drafter, HierarchyDrafter)
    assert drafter.branches == 3
    for name in ("ngram", "hierarchy"):
        with pytest.raises(ValueError, match="branches"):
            resolve_drafter(f"{name}:branches=0", pair.target)
    with pytest.raises(ValueError, match="branches must be 1 or more; got 0"):
        NgramDrafter(branches=0)


def test_one_branch_drafts_what_followed_last() -> None:
    text = [1, 2, 3, 1, 2, 3, 1, 2, 4, 5, 1, 2]
    session = session_of(NgramDrafter(max_ngram=2), text)
    assert session.offer(3) == Offer([4, 5, 1], 2, 1.0)
    made = session.draft(9, None, None)
    assert made.tokens.tolist() == [[4, 5, 1, 2]]
    assert made.parents is None
