"""Drafts that are trees: one pass reads each path as it is read alone, and the text stays that of plain decoding."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bpkit import Context, Draft, Feature, Policy, SpeculativeDecoder, Step
from bpkit.decode import loop
from bpkit.decode.attention import use_grouped_attention
from bpkit.decode.drafter import Drafter, GoOn, Proposal
from bpkit.decode.guard import GuardedPolicy, PolicyFault, PolicyFaultWarning
from bpkit.decode.masks import of_trees
from bpkit.decode.rows import Rows
from bpkit.decode.sampling import Draw
from bpkit.decode.serving import reads_trees, served_by
from bpkit.decode.slot_target import SlotTarget
from bpkit.decode.target import TargetOutput
from bpkit.decode.text import RunningText
from bpkit.decode.trees import Tree, VerifiedNodes, closed
from bpkit.draft.best_first import best_first
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import State
from bpkit.testing import TinyPair
from bpkit.testing.models import AgreeableDrafter, AgreeableSession
from bpkit.testing.simulated_device import SimulatedDevice
from bpkit.types import DecoderSpec
from tests.test_lossless import SAMPLINGS, Outputs, Sampling, name_of_sampling
from tests.test_rows import PROMPTS, limit_of
from tests.test_sessions import Reader, at
from tests.tiny_architectures import WINDOW, repeating_causal_lm, tiny_causal_lm

if TYPE_CHECKING:
    from tests.conftest import PlainDecoding, ShippedPair

SEED = 20
SHAPE = [-1, 0, -1, 0, 1, 2, 4]
"""Parents: two children of the anchor, two of the first of them, and paths of up to four."""


# One pass over a tree


class TreeReader(Reader):
    """A reader that also reads trees, of which a random path stands."""

    def grow(self, most: int = 9) -> None:
        """One pass over a random tree of each row."""
        parents = [[self.random.randrange(-1, i) for i in range(self.random.randrange(most + 1))] for _ in self.texts]
        parents[self.random.randrange(len(parents))] = [-1, -1, 0, 0, 1]
        tree = Tree.of(parents, torch.device("cpu"))
        fed = [[self.token() for _ in range(count)] for count in tree.counts]
        tokens = torch.full((len(fed), max(tree.counts)), 1)
        for row, some in enumerate(fed):
            tokens[row, : len(some)] = torch.tensor(some)
        output, stands = self.session.verify_trees(tokens, tree), []
        for row, own in enumerate(parents):
            node, path = self.random.randrange(-1, len(own)), [0]
            ancestors = [node + 1] if node >= 0 else []
            while node >= 0 and own[node] >= 0:
                node = own[node]
                ancestors.append(node + 1)
            path += ancestors[::-1]
            self.texts[row] += [fed[row][column] for column in path]
            self.found[row] += [at(output, row, column, prompt=False) for column in path]
            stands.append(path)
        self.session.accept(tree.counts, stands)
        assert self.session.held == [len(text) for text in self.texts]


@pytest.mark.parametrize("attention", ["own", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss"])
def test_nodes_of_trees_give_what_their_paths_give(kind: str, attention: str) -> None:
    """Windows of 8 that paths and texts cross, soft caps, tables of positions, latent attention, sinks."""
    model = tiny_causal_lm(kind)
    if attention != "own":
        model.set_attn_implementation(attention)
    reader = TreeReader(model, feature_layers=(0, 1))
    with torch.inference_mode():
        reader.begin([1, 3 * WINDOW, 6], slots=4, capacity=160)
        for turn in range(14):
            reader.grow() if turn % 4 else reader.step()
        reader.keep([2, 0])
        reader.grow(14)
        reader.read([2, 1])
    assert max(map(len, reader.texts)) > 3 * WINDOW
    reader.check()


def test_one_row_with_grouped_attention() -> None:
    model = tiny_causal_lm("qwen3")
    use_grouped_attention(model)
    reader = TreeReader(model, 3)
    with torch.inference_mode():
        reader.begin([5], capacity=120)
        for most in (3, 9, 14, 9, 2):
            reader.grow(most)
            reader.read([1])
    reader.check()


def test_only_columns_that_change_place_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SlotTarget(tiny_causal_lm("qwen3"), rows=2, capacity=40, slots=2, feature_layers=(), keep_hidden=False)
    moved: list[list[list[int]]] = []
    layer: Any = type(session.slot_cache.slot_layers[0])
    monkeypatch.setattr(layer, "shift", lambda self, places: moved.append(places.T.tolist()))
    with torch.inference_mode():
        session.prefill(torch.ones(2, 4, dtype=torch.long), [4, 2], last=False)
        tree = Tree.of([SHAPE, SHAPE], torch.device("cpu"))
        session.verify_trees(torch.ones(2, 8, dtype=torch.long), tree)
        session.accept(tree.counts, [[0, 1, 2], [0]])
        assert session.held == [7, 3]
        assert moved == []
        session.verify_trees(torch.ones(2, 8, dtype=torch.long), tree)
        session.accept(tree.counts, [[0, 1, 2, 5], [0, 3]])
    assert session.held == [11, 5]
    assert moved == [[[0, 12, 10], [1, 6, 4]]] * len(session.slot_cache.slot_layers)


def test_a_mask_of_trees_shows_the_text_and_the_own_path() -> None:
    tree = Tree.of([[-1, 0, -1], [-1]], torch.device("cpu"))
    seen = of_trees(torch.tensor([[3], [1]]), tree, 0, 7)[:, 0].int().tolist()
    assert seen[0] == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]]
    assert seen[1][:2] == [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    # The last two of its own path and position; siblings have one position.
    seen = of_trees(torch.tensor([[3], [1]]), tree, 0, 7, 2)[:, 0].int().tolist()
    assert seen[0] == [[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("spoiled", ["depth", "above"])
def test_targets_that_read_trees_wrongly_are_found(
    spoiled: str, monkeypatch: pytest.MonkeyPatch, pair: TinyPair
) -> None:
    made = Tree.of

    def spoil(parents: Sequence[Sequence[int]], device: torch.device) -> Tree:
        tree = made(parents, device)
        value = torch.arange(tree.depth.shape[1]).expand_as(tree.depth) if spoiled == "depth" else tree.above | True
        changed: dict[str, Any] = {spoiled: value}
        return dataclasses.replace(tree, **changed)

    model = tiny_causal_lm("qwen3")
    monkeypatch.setattr("bpkit.decode.serving.Tree.of", spoil)
    assert served_by(model) is SlotTarget
    assert not reads_trees(model)
    monkeypatch.undo()
    assert reads_trees(tiny_causal_lm("qwen3"))


# Texts are those of plain decoding


class TreeDrafter(AgreeableDrafter):
    """Random trees over the target's own continuation: a token is that at its depth, or any other."""

    def __init__(self, target: Any, seed: int, right: float = 0.6) -> None:
        super().__init__(target, corruption=0.0)
        self.branches = 99
        self.max_block_size, self.right, self.trees = 32, right, random.Random(seed)

    def begin(self, text: RunningText) -> TreeSession:
        return TreeSession(self, text)


class TreeSession(AgreeableSession):
    drafter: TreeDrafter

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        chain = super().draft([min(size, 8) for size in block_size], draw, None)
        chance, vocab = self.drafter.trees, chain.scores.shape[-1] if chain.scores is not None else 0
        rows = []
        for row, size in enumerate(block_size):
            right, parents, tokens, depth = chain.tokens[row].tolist(), list[int](), list[int](), {-1: 0}
            for node in range(chance.randrange(size) if size > 1 else 0):
                before = chance.choice([place for place in range(-1, node) if depth[place] < chain.counts[row]])
                taken = [tokens[other] for other, parent in enumerate(parents) if parent == before]
                token = right[depth[before]] if chance.random() < self.drafter.right else chance.randrange(vocab)
                while token in taken:
                    token = chance.randrange(vocab)
                depth[node] = depth[before] + 1
                parents.append(before)
                tokens.append(token)
            rows.append((tokens, parents, [depth[node] - 1 for node in range(len(tokens))]))
        width = max(len(tokens) for tokens, _, _ in rows)

        def side_by_side(place: int) -> Tensor:
            return torch.tensor([[*row[place], *[0] * (width - len(row[place]))] for row in rows], dtype=torch.long)

        return dataclasses.replace(
            chain,
            tokens=side_by_side(0),
            parents=side_by_side(1),
            places=side_by_side(2),
            chances=torch.full((len(rows), width), 0.5),
            counts=[len(tokens) for tokens, _, _ in rows],
        )


class RandomNodes(Policy):
    """Random sizes, and of each draft a random number of its first tokens, or a random closed set of them."""

    wants = frozenset({Feature.ANCHOR_ENTROPY, Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY})

    def __init__(self, seed: int, most: int) -> None:
        super().__init__()
        self.random, self.most = random.Random(seed), most
        self.kept: list[list[int]] = []
        self.draft: Draft | None = None

    def select(self, state: State, context: Context) -> Tensor:
        return torch.tensor([self.random.randrange(1, self.most + 1) for _ in context.row_ids])

    def truncate(self, state: State, draft: Draft) -> Tensor:
        assert draft[Feature.DRAFT_PROBABILITY].shape == draft[Feature.DRAFT_TOKENS].shape == draft.tokens.shape
        lengths, self.draft = draft.draft_length.tolist(), draft
        if draft.parents is None or self.random.random() < 0.3:
            first = [self.random.randrange(length + 1) for length in lengths]
            self.kept = [list(range(count)) for count in first]
            return torch.tensor(first)
        drawn = [[self.random.random() < 0.8 for _ in range(length)] for length in lengths]
        self.kept = [closed(row, parents) for row, parents in zip(drawn, draft.parents.tolist(), strict=True)]
        mask = torch.zeros(draft.tokens.shape, dtype=torch.bool)
        for row, nodes in enumerate(self.kept):
            mask[row, nodes] = True
        return mask

    def observe(self, state: State, step: Step) -> None:
        """The path is one of the draft and of what was kept, and its tokens are the step's."""
        if self.draft is None or self.draft.parents is None or step.path is None:
            assert not bool(step.draft_length.any())
            return
        tokens, parents = self.draft[Feature.DRAFT_TOKENS], self.draft.parents
        for row, accepted in enumerate(step.num_accepted.tolist()):
            path = step.path[row, :accepted].tolist()
            assert tokens[row, path].equal(step.tokens[row, :accepted])
            assert parents[row, path].tolist() == [-1, *path][:accepted]
            assert set(path) <= set(self.kept[row])
            assert step.path[row, accepted:].tolist() == [-1] * (step.path.shape[1] - accepted)
            assert int(step.verify_length[row]) <= len(self.kept[row])


@pytest.fixture(scope="module")
def outputs(pair: TinyPair, plain: PlainDecoding) -> Outputs:
    return Outputs(plain, pair.target)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Steps; after each the slots must hold exactly the accepted tokens."""
    steps: list[Step] = []
    step = loop.step

    def checked(rows: Rows, policy: Any) -> Step:
        made = step(rows, policy)
        assert rows.target.held == [row.length - 1 for row in rows.text.rows]
        steps.append(made)
        return made

    monkeypatch.setattr(loop, "step", checked)
    return steps


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=name_of_sampling)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_trees_leave_the_text_alone(
    pair: TinyPair, outputs: Outputs, held: list[Step], sampling: Sampling, data: st.DataObject
) -> None:
    """Any tree, any closed set of its nodes, rows beside each other with other trees, and stops within them."""
    seed, batch_size = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 2, 5]))
    places = data.draw(st.permutations(range(16)))[: data.draw(st.integers(1, 6))]
    rows = [{"prompt": PROMPTS[i], "max_new_tokens": limit_of(i), "stream_id": i} for i in places]
    drafter, policy = TreeDrafter(pair.target, seed), RandomNodes(seed, most=data.draw(st.integers(2, 24)))
    decoder = SpeculativeDecoder(pair.target, drafter, policy, tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate(rows, batch_size=batch_size, seed=SEED, **sampling.options)
    for place, one in zip(places, made, strict=True):
        assert one.error is None
        ids = pair.ids(PROMPTS[place])
        wanted = outputs(ids, sampling, max_new_tokens=limit_of(place), stream_id=place)
        assert one.tokens[0].tolist() == wanted.tokens
        assert all(step.path is None or step.path.shape == (1, int(step.num_accepted)) for step in one.steps)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=name_of_sampling)
def test_second_candidates_stand(pair: TinyPair, outputs: Outputs, held: list[Step], sampling: Sampling) -> None:
    """Where the first is always wrong, so that what stands has to be moved in the slots."""
    decoder = SpeculativeDecoder(pair.target, SecondRight(pair.target), "fixed:12", strict=True)
    for stream_id, prompt in enumerate(PROMPTS[:4]):
        made = decoder.generate(pair.ids(prompt), max_new_tokens=20, seed=SEED, stream_id=stream_id, **sampling.options)
        wanted = outputs(pair.ids(prompt), sampling, max_new_tokens=20, stream_id=stream_id)
        assert made.tokens[0].tolist() == wanted.tokens
        assert made.acceptance_length > 3
    assert [1, 3, 5] in [step.path[0].tolist()[:3] for step in held if step.path is not None]


class SecondRight(AgreeableDrafter):
    """Pairs of siblings of which the second is the target's."""

    def __init__(self, target: Any) -> None:
        super().__init__(target, corruption=0.0)
        self.branches = 2
        self.max_block_size = 16

    def begin(self, text: RunningText) -> SecondRightSession:
        return SecondRightSession(self, text)


class SecondRightSession(AgreeableSession):
    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        chain = super().draft([1 + size // 2 for size in block_size], draw, None)
        assert chain.scores is not None
        pairs = torch.stack([(chain.tokens + 1) % chain.scores.shape[-1], chain.tokens], dim=2).flatten(1)
        nodes = torch.arange(pairs.shape[1])
        return dataclasses.replace(
            chain,
            tokens=pairs,
            parents=(nodes // 2 * 2 - 1).expand_as(pairs),
            places=(nodes // 2).expand_as(pairs),
            chances=torch.full(pairs.shape, 0.5),
            counts=[2 * count for count in chain.counts],
        )


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_on_other_architectures(kind: str, temperature: float) -> None:
    """Texts longer than the window, of several rows."""
    target = repeating_causal_lm(kind)
    plain = SpeculativeDecoder(target, NgramDrafter(), "fixed:1")
    trees = SpeculativeDecoder(target, TreeDrafter(target, 3, right=0.8), RandomNodes(5, 14), strict=True)
    ids = [torch.arange(2, 2 + length)[None] for length in (1, 9, 20)]
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "seed": 4, "eos_token_id": None}
    wanted, made = plain.generate(ids, **options), trees.generate(ids, **options)
    assert [one.tokens.tolist() for one in made] == [one.tokens.tolist() for one in wanted]
    assert max(one.acceptance_length for one in made) > 1.2


def test_trees_beside_sources_of_chains(pair: TinyPair, outputs: Outputs) -> None:
    class Turns(Policy):
        wants = frozenset({Feature.DRAFT_PROBABILITY})

        def select(self, state: State, context: Context) -> Any:
            from bpkit import Plan

            return Plan(context.full(7), (context.position + torch.arange(context.batch_size)) % 2)

        def truncate(self, state: State, draft: Draft) -> Tensor:
            if draft.parents is not None and draft.context.batch_size > 1:
                for row, length in enumerate(draft.draft_length.tolist()):
                    if int(draft.source[row]) == 1:
                        assert draft.parents[row, :length].tolist() == list(range(-1, length - 1))
            return draft.draft_length

    drafters: list[Drafter] = [branching(pair), NgramDrafter()]
    decoder = SpeculativeDecoder(pair.target, drafters, Turns(), tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate(list(PROMPTS[:4]), max_new_tokens=16, temperature=0)
    for prompt, one in zip(PROMPTS, made, strict=False):
        assert one.tokens[0].tolist() == outputs(pair.ids(prompt), SAMPLINGS[0], max_new_tokens=16).tokens


# Block diffusion


def branching(pair: TinyPair, branches: int = 3) -> BlockDiffusionDrafter:
    return BlockDiffusionDrafter(pair.drafter_model, pair.target, branches=branches)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=name_of_sampling)
@pytest.mark.parametrize("policy", ["fixed:12", "threshold:0.01", "confidence", "joint", "goodput", "ema"])
def test_policies_of_chains_run_on_trees(pair: TinyPair, outputs: Outputs, policy: str, sampling: Sampling) -> None:
    decoder = SpeculativeDecoder(pair.target, branching(pair), policy, tokenizer=pair.tokenizer, strict=True)
    rows = [{"prompt": PROMPTS[i], "stream_id": i} for i in range(3)]
    made = decoder.generate(rows, max_new_tokens=16, seed=SEED, **sampling.options)
    for place, one in enumerate(made):
        wanted = outputs(pair.ids(PROMPTS[place]), sampling, max_new_tokens=16, stream_id=place)
        assert one.tokens[0].tolist() == wanted.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_shipped_pair_accepts_more_of_a_tree(shipped: ShippedPair, temperature: float) -> None:
    prompt = shipped.tokenizer("def add(a, b):\n    return", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 48, "temperature": temperature, "seed": 1}
    chain = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:16", strict=True)
    drafter = BlockDiffusionDrafter(shipped.drafter.model, shipped.target, branches=4)
    tree = SpeculativeDecoder(shipped.target, drafter, "fixed:16", strict=True)
    one, other = chain.generate(prompt, **options), tree.generate(prompt, **options)
    assert one.tokens.equal(other.tokens)
    assert other.acceptance_length > one.acceptance_length
    assert any(
        step.path is not None and step.path[0].tolist() != list(range(int(step.num_accepted))) for step in other.steps
    )


def test_one_branch_is_a_chain(pair: TinyPair) -> None:
    decoders = [
        SpeculativeDecoder(pair.target, made, "fixed:9") for made in (branching(pair, 1), pair.block_diffusion())
    ]
    one, other = (made.generate(pair.ids("x = "), max_new_tokens=12, temperature=1.0, seed=2) for made in decoders)
    assert one.tokens.equal(other.tokens)
    assert [step.path for step in one.steps] == [None] * len(one.steps)
    assert [step.num_accepted for step in one.steps] == [step.num_accepted for step in other.steps]
    assert decoders[0].spec == decoders[1].spec
    with pytest.raises(ValueError, match="branches must be 1 or more; got 0"):
        branching(pair, 0)


class Watching(Policy):
    wants = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.drafts: list[Draft] = []

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.size)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        self.drafts.append(draft)
        return draft.draft_length


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_holds_the_best_candidates_of_each_position(pair: TinyPair, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": temperature, "seed": 6, "top_k": 0}
    policies = {size: Watching(size) for size in (8, 20)}
    for policy in policies.values():
        SpeculativeDecoder(pair.target, branching(pair), policy, strict=True).generate(pair.ids("x = "), **options)
    chain = Watching(8)
    SpeculativeDecoder(pair.target, pair.block_diffusion(), chain, strict=True).generate(pair.ids("x = "), **options)
    small, large, best = policies[8].drafts[0], policies[20].drafts[0], chain.drafts[0]
    assert small.parents is not None
    assert large.parents is not None
    assert large.draft_length.tolist() == [19]
    # Blocks above the trained size are of the trained size, and the best nodes come first.
    assert large.parents[0, :7].equal(small.parents[0])
    assert large.tokens[0, :7].equal(small.tokens[0])
    assert large.chances is not None
    products, depth = [1.0], [0]
    for node, before in enumerate(large.parents[0].tolist()):
        products.append(products[before + 1] * float(large.chances[0, node]))
        depth.append(depth[before + 1] + 1)
        if (before, node) == (-1, 0) or (products[-1] / products[before + 1] > 0.5):
            assert large.tokens[0, node] == best.tokens[0, depth[-1] - 1]  # a candidate with most of the chances
        assert large[Feature.DRAFT_ENTROPY][0, node] == pytest.approx(
            float(best[Feature.DRAFT_ENTROPY][0, depth[-1] - 1])
        )
        assert large[Feature.DRAFT_HIDDEN][0, node].allclose(best[Feature.DRAFT_HIDDEN][0, depth[-1] - 1], atol=1e-5)
        if temperature == 0:
            assert large[Feature.DRAFT_PROBABILITY][0, node] == pytest.approx(float(large.chances[0, node]), rel=1e-4)
    assert products[1:] == sorted(products[1:], reverse=True)


@settings(max_examples=60, deadline=None)
@given(
    chances=st.lists(
        st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3).map(lambda c: sorted(c, reverse=True)), max_size=4
    ),
    most=st.integers(0, 40),
)
def test_best_first_takes_the_largest_products(chances: list[list[float]], most: int) -> None:
    nodes = best_first(chances, most)
    paths: list[tuple[int, ...]] = [()]
    for node in nodes:
        assert node.position == len(paths[node.parent + 1])
        paths.append((*paths[node.parent + 1], node.rank))
    found = [product(chances, path) for path in paths[1:]]
    every = [
        path
        for depth in range(1, len(chances) + 1)
        for path in itertools.product(*(range(len(own)) for own in chances[:depth]))
    ]
    assert len(set(paths)) == len(paths)
    wanted = sorted((value for path in every if (value := product(chances, path)) > 0), reverse=True)[:most]
    assert found == pytest.approx(wanted)


def product(chances: list[list[float]], path: tuple[int, ...]) -> float:
    value = 1.0
    for own, rank in zip(chances, path, strict=False):
        value *= own[rank]
    return value


# What is refused, and what is mended


def test_what_cannot_verify_trees_is_refused(pair: TinyPair) -> None:
    with pytest.raises(ValueError, match=r"drafts trees \(branches=3\), and rule 'rejection' verifies chains alone"):
        SpeculativeDecoder(pair.target, branching(pair), rule="rejection")
    for kind, why in (("qwen3_5_text", "one state for a whole text"), ("bloom", "it reads rows apart")):
        target = tiny_causal_lm(kind)
        with pytest.raises(ValueError, match=f"reads one path at a time, because .*{why}"):
            SpeculativeDecoder(target, TreeDrafter(target, 0))


class Masking(Policy):
    wants = frozenset()

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(8)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        draft.draft_length.zero_()
        return torch.tensor(self.mask)


def draft_of(parents: list[list[int]] | None, lengths: list[int]) -> Draft:
    spec = DecoderSpec("t", "d", "block-diffusion", 8, 16, 4, 9)
    rows = len(lengths)
    counts = torch.ones(rows, dtype=torch.long)
    context = Context(spec, counts, counts * 50, counts * 9, torch.Generator())
    tokens = torch.zeros(rows, max(lengths), dtype=torch.long)
    given = None if parents is None else torch.tensor(parents)
    return Draft(context, counts * 8, torch.tensor(lengths), tokens, parents=given)


def guarded(mask: Any, *, strict: bool = False) -> GuardedPolicy:
    return GuardedPolicy(Masking(mask), draft_of(None, [1]).context.spec, strict=strict)


def test_masks_that_lack_ancestors_are_mended() -> None:
    draft = draft_of([[-1, 0, -1, 2], [-1, -1, 0, 0]], [4, 2])
    policy = guarded([[True, False, True, True], [True, True, True, True]])
    assert policy.keep_nodes(draft) == [[0, 2, 3], [0, 1]], "what lies behind a row's own nodes is padding"
    assert policy.fallbacks == 0
    torn = [[True, True, False, True], [False, True, False, False]]
    policy = guarded(torn)
    with pytest.warns(
        PolicyFaultWarning, match="it keeps tokens without those before them on their paths; using those"
    ):
        assert policy.keep_nodes(draft) == [[0, 1], [1]]
    assert policy.fallbacks == 1
    with pytest.raises(PolicyFault, match="without those before them"):
        guarded(torn, strict=True).keep_nodes(draft)
    assert draft.draft_length.tolist() == [4, 2]


@pytest.mark.parametrize("mask", [[[True] * 3] * 2, [[1] * 4] * 2, [[True] * 4], 3, [5, 0]])
def test_answers_that_are_no_mask_verify_the_whole_draft(mask: Any) -> None:
    draft = draft_of([[-1, 0, -1, 2], [-1, -1, 0, 0]], [4, 2])
    policy = guarded(mask)
    with pytest.warns(PolicyFaultWarning):
        assert policy.keep_nodes(draft) == [[0, 1, 2, 3], [0, 1]]
    assert policy.fallbacks == 1


def test_masks_of_chains_and_numbers_of_trees_are_their_first_tokens() -> None:
    chains = draft_of(None, [4, 2])
    assert guarded([[True, True, False, False], [True, True, True, True]]).truncate(chains) == [2, 2]
    torn = guarded([[True, False, True, False], [False, False, False, False]])
    with pytest.warns(PolicyFaultWarning, match="whose ancestors are all kept"):
        assert torn.truncate(chains) == [1, 0]
    assert guarded([3, 1]).keep_nodes(draft_of([[-1, -1, 0, 1], [-1, 0, 0, 0]], [4, 2])) == [[0, 1, 2], [0]]


def test_nodes_that_are_left_keep_their_parents() -> None:
    cpu = torch.device("cpu")
    made = VerifiedNodes.of([SHAPE, SHAPE], [[0, 2, 3, 5], [0, 1, 4, 6]], [9, 3], cpu)
    assert made.places == [[0, 2, 3, 5], [0, 1, 4]], "the last lies deeper than may be generated"
    assert made.tree is not None
    assert made.tree.parents == [[0, 0, 1, 2], [0, 1, 2]]
    assert made.tree.depth.tolist() == [[0, 1, 1, 2, 2], [0, 1, 2, 3, 0]]
    assert made.tokens(torch.arange(10, 17).expand(2, -1)).tolist() == [[10, 12, 13, 15], [10, 11, 14, 10]]
    path = VerifiedNodes.of([SHAPE, SHAPE], [[2, 5], []], [9, 9], cpu)
    assert path.tree is None, "a path is verified as a chain"
    assert path.tokens(torch.arange(10, 17).expand(2, -1)).tolist() == [[12, 15], [10, 10]]


def test_a_record_of_one_row_has_its_own_path(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, TreeDrafter(pair.target, 1, 0.9), "fixed:16", tokenizer=pair.tokenizer)
    with decoder.run_many(list(PROMPTS[:3]), max_new_tokens=12, temperature=0) as runs:
        steps = [record for record in runs if isinstance(record, Step)]
    step = next(step for step in steps if step.path is not None and len(set(step.num_accepted.tolist())) > 1)
    assert step.path is not None
    for row, accepted in enumerate(step.num_accepted.tolist()):
        own = step.row(row).path
        assert own is not None
        assert own.tolist() == [step.path[row, :accepted].tolist()]
    copied = step.clone()
    assert copied.path is not None
    copied.path.zero_()
    assert not step.path.equal(copied.path)


def test_what_a_pass_gives_at_columns() -> None:
    features = torch.arange(24.0).view(2, 4, 3)
    output = TargetOutput(torch.zeros(2, 4, 5), features, None)
    found = output.features_at([[0, 2], [0, 1, 3]])
    assert found is not None
    assert [part.tolist() for part in found] == [features[0, [0, 2]].tolist(), features[1, [0, 1, 3]].tolist()]
    assert TargetOutput(torch.zeros(1, 1, 1), None, None).features_at([[0]]) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_passes_and_trees_take_turns(pair: TinyPair, temperature: float) -> None:
    """Passes of the drafter, and of the target over chains, are captured; those over trees are not."""
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "seed": 5}
    made = [
        SpeculativeDecoder(pair.target, branching(pair), RandomNodes(3, 16), capture=capture, strict=True).generate(
            [pair.ids(prompt) for prompt in PROMPTS[:3]], batch_size=2, **options
        )
        for capture in ("off", "on")
    ]
    assert [one.tokens.tolist() for one in made[0]] == [one.tokens.tolist() for one in made[1]]


def test_members_of_an_ensemble_draft_chains(pair: TinyPair) -> None:
    from bpkit.draft.ensemble import EnsembleDrafter

    with pytest.raises(ValueError, match="drafts trees, and members of an ensemble draft chains"):
        EnsembleDrafter([pair.block_diffusion(), branching(pair)], pair.target)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_of_trees_read_the_device_twice(pair: TinyPair, temperature: float) -> None:
    """Chances, by which the host builds the tree, and what was decided; operands on two devices are errors."""
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": temperature, "seed": 5}
    host = SpeculativeDecoder(pair.target, branching(pair), "fixed:12", tokenizer=pair.tokenizer)
    with SimulatedDevice() as device:
        for policy in ("fixed:12", "tree:slope=0.001"):
            reads = device.count(device.decoder(host).with_policy(policy), PROMPTS[0], **options)
            assert list(reads.tokens) == host.generate(PROMPTS[0], **options).tokens[0].tolist()
            assert set(reads.steps) == {2}
