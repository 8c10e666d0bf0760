"""Trees that a policy names node by node: drafted as they are, of any source that drafts trees, and mended if wrong."""

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

from bpkit import Context, Draft, Feature, Plan, Policy, SpeculativeDecoder
from bpkit.decode.drafter import Drafter, EachRow, GoOn, Proposal
from bpkit.decode.guard import GuardedPolicy, PolicyFault, PolicyFaultWarning
from bpkit.decode.sampling import Draw
from bpkit.decode.sources import source_spec
from bpkit.decode.text import RowText, RunningText
from bpkit.decode.trees import Shapes, TreeShape
from bpkit.decode.two_devices import OtherDevice
from bpkit.draft.best_first import shaped
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import State
from bpkit.testing import TinyPair
from bpkit.testing.models import AgreeableDrafter, AgreeableSession
from bpkit.types import DecoderSpec, SourceSpec, work_of
from tests.test_lossless import SAMPLINGS, Outputs, Sampling, name_of_sampling
from tests.test_rows import PROMPTS, limit_of

if TYPE_CHECKING:
    from tests.conftest import PlainDecoding, ShippedPair

SEED = 20


@pytest.fixture(scope="module")
def outputs(pair: TinyPair, plain: PlainDecoding) -> Outputs:
    return Outputs(plain, pair.target)


def random_shape(chance: random.Random, most: int, *, branches: int, deepest: int) -> TreeShape:
    """A tree of up to `most` nodes, whose order is any in which parents come first."""
    parents, ranks, depths = list[int](), list[int](), {-1: 0}
    for _ in range(chance.randrange(1, most + 1)):
        free = [
            (parent, rank)
            for parent in range(-1, len(parents))
            for rank in range(branches)
            if depths[parent] < deepest and (parent, rank) not in zip(parents, ranks, strict=True)
        ]
        if not free:
            break
        parent, rank = chance.choice(free)
        depths[len(parents)] = depths[parent] + 1
        parents.append(parent)
        ranks.append(rank)
    return TreeShape(tuple(parents), tuple(ranks))


def plan_of(context: Context, shapes: Sequence[TreeShape], source: int = 0) -> Plan:
    """That drafts a tree of each row, with numbers that mean nothing behind it."""
    width = max(map(len, shapes)) + 1
    parents, ranks = (
        torch.tensor([[*getattr(shape, name), *[97] * (width - len(shape))] for shape in shapes])
        for name in ("parents", "ranks")
    )
    return Plan(torch.tensor([len(shape) + 1 for shape in shapes]), context.full(source), parents, ranks)


class Shaping(Policy):
    """Random trees, of which it verifies all or a few; a row may have no draft."""

    wants = frozenset({Feature.DRAFT_PROBABILITY})

    def __init__(self, seed: int, most: int) -> None:
        super().__init__()
        self.random, self.most = random.Random(seed), most
        self.shapes: list[TreeShape] = []
        self.drafts: list[tuple[list[TreeShape], Draft]] = []

    def select(self, state: State, context: Context) -> Plan:
        spec = context.spec
        self.shapes = [
            random_shape(self.random, self.most, branches=spec.branches, deepest=spec.trained_block_size - 1)
            if self.random.random() < 0.9
            else TreeShape((), ())
            for _ in context.row_ids
        ]
        return plan_of(context, self.shapes)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if draft.parents is not None:
            self.drafts.append((self.shapes, draft))
        return draft.draft_length if self.random.random() < 0.7 else draft.draft_length // 2


class ShapedDrafter(AgreeableDrafter):
    """The target's own continuation at a rank that goes by the depth, and other tokens beside it."""

    def __init__(self, target: Any, name: str = "shaped") -> None:
        super().__init__(target, corruption=0.0)
        self.branches = 3
        self.name, self.max_block_size = name, 24

    def begin(self, text: RunningText) -> ShapedSession:
        return ShapedSession(self, text)


class ShapedSession(AgreeableSession):
    drafter: ShapedDrafter

    def draft(
        self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None, shapes: Shapes | None = None
    ) -> Proposal:
        assert shapes is not None, "handed over where a plan has trees"
        trees = [shape or TreeShape((), ()) for shape in shapes]
        assert [len(tree) + 1 for tree in trees] == list(block_size)
        chain = super().draft([tree.deepest + 1 for tree in trees], draw, None)
        assert chain.scores is not None
        width, vocab = max(block_size) - 1, chain.scores.shape[-1]
        rows = []
        for tree, own in zip(trees, chain.tokens.tolist(), strict=True):
            tokens = [
                (own[depth - 1] + (rank - depth) % self.drafter.branches) % vocab
                for rank, depth in zip(tree.ranks, tree.depths, strict=True)
            ]
            columns = (tokens, tree.parents, [depth - 1 for depth in tree.depths])
            rows.append([[*column, *[0] * (width - len(column))] for column in columns])
        tokens, parents, places = torch.tensor(rows).transpose(0, 1)
        return dataclasses.replace(
            chain,
            tokens=tokens,
            parents=parents,
            places=places,
            chances=torch.full(parents.shape, 0.5),
            counts=[len(tree) for tree in trees],
        )


def drafted(shapes: list[TreeShape], draft: Draft) -> bool:
    """Whether a draft is the trees of a plan."""
    assert draft.parents is not None
    return all(
        draft.parents[row, :length].tolist() == list(shapes[row].parents)
        for row, length in enumerate(draft.draft_length.tolist())
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=name_of_sampling)
@pytest.mark.parametrize("kind", ["block diffusion", "agreeable"])
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes_leave_the_text_alone(
    pair: TinyPair, outputs: Outputs, kind: str, sampling: Sampling, data: st.DataObject
) -> None:
    """Temperature 0 and 1 with all manner of processors, one row and three."""
    seed, batch_size = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 3]))
    places = data.draw(st.permutations(range(16)))[: data.draw(st.integers(1, 5))]
    rows = [{"prompt": PROMPTS[i], "max_new_tokens": limit_of(i), "stream_id": i} for i in places]
    drafter: Drafter = branching(pair) if kind == "block diffusion" else ShapedDrafter(pair.target)
    policy = Shaping(seed, most=data.draw(st.integers(1, 20)))
    decoder = SpeculativeDecoder(pair.target, drafter, policy, tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate(rows, batch_size=batch_size, seed=SEED, **sampling.options)
    for place, one in zip(places, made, strict=True):
        assert one.error is None
        wanted = outputs(pair.ids(PROMPTS[place]), sampling, max_new_tokens=limit_of(place), stream_id=place)
        assert one.tokens[0].tolist() == wanted.tokens
    if kind == "agreeable" or sampling.options["temperature"] == 0:  # where no candidate is ruled out
        assert all(drafted(*each) for each in policy.drafts)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_stands_of_a_shape_is_its_path(pair: TinyPair, batch_size: int) -> None:
    """Depth d has the target's token at rank d modulo 3."""
    shape = TreeShape((-1, -1, 1, 1, 2, 3, 5), (0, 1, 0, 2, 0, 0, 1))
    policy = Fixed(shape)
    decoder = SpeculativeDecoder(pair.target, ShapedDrafter(pair.target), policy, tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate(list(PROMPTS[:3]), batch_size=batch_size, max_new_tokens=30, temperature=0)
    paths = [step.path[0].tolist() for one in made for step in one.steps[:-1] if step.path is not None]
    assert paths.count([1, 3, 5, 6]) == len(paths) > 3


class Fixed(Policy):
    wants = frozenset()

    def __init__(self, shape: TreeShape, source: int = 0) -> None:
        super().__init__()
        self.shape, self.source = shape, source
        self.drafts: list[Draft] = []

    def select(self, state: State, context: Context) -> Plan:
        return plan_of(context, [self.shape] * context.batch_size, self.source)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        self.drafts.append(draft)
        return draft.draft_length


# Block diffusion


def branching(pair: TinyPair, branches: int = 3) -> BlockDiffusionDrafter:
    return BlockDiffusionDrafter(pair.drafter_model, pair.target, branches=branches)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_block_diffusion_drafts_the_candidates_that_are_named(shipped: ShippedPair, temperature: float) -> None:
    prompt = shipped.tokenizer("def add(a, b):\n    return", return_tensors="pt")["input_ids"]
    drafter = BlockDiffusionDrafter(shipped.drafter.model, shipped.target, branches=3)
    shape, options = TreeShape.delayed(3, trunk=1, length=2), {"max_new_tokens": 24, "temperature": temperature}
    policy = Fixed(shape)
    made = SpeculativeDecoder(shipped.target, drafter, policy, strict=True).generate(prompt, seed=1, **options)
    chain = Fixed(TreeShape.chain(3))
    plain = SpeculativeDecoder(shipped.target, drafter, chain, strict=True).generate(prompt, seed=1, **options)
    assert made.tokens.equal(plain.tokens)
    first, best = policy.drafts[0], chain.drafts[0]
    assert first.parents is not None
    assert first.chances is not None
    assert first.parents[0].tolist() == list(shape.parents)
    assert first.tokens[0, :3].equal(best.tokens[0]), "a block of as many positions as the tree is deep"
    assert first.tokens[0, [2, 4, 6]].equal(best.tokens[0, [2, 2, 2]])
    beside = [0, 1, 3, 5]
    assert len(set(first.tokens[0, beside[1:]].tolist())) == 3
    chances = first.chances[0, beside[1:]].tolist()
    assert chances == sorted(chances, reverse=True)
    assert made.acceptance_length >= plain.acceptance_length


def test_candidates_that_are_ruled_out_are_left_out() -> None:
    shape = TreeShape((-1, -1, 0, 1, 0, 4, 3), (0, 1, 2, 0, 1, 0, 0))
    nodes = shaped([[1.0, 0.0], [0.7, 0.3], [1.0]], shape)
    assert [(node.parent, node.position, node.rank) for node in nodes] == [(-1, 0, 0), (0, 1, 1), (1, 2, 0)]


# Sources and rows


def test_sources_of_trees_and_of_chains(pair: TinyPair, outputs: Outputs) -> None:
    """Each row's shape goes to its source; a chain is what sources of chains draft anyway."""

    class Turns(Policy):
        wants = frozenset({Feature.DRAFT_PROBABILITY})

        def select(self, state: State, context: Context) -> Plan:
            source = (context.position + torch.arange(context.batch_size)) % 3
            shapes = {0: TreeShape((-1, -1, 1), (0, 1, 2)), 1: TreeShape.chain(4), 2: TreeShape((-1, 0, 0), (1, 2, 0))}
            plan = plan_of(context, [shapes[place] for place in source.tolist()])
            return Plan(plan.block_size, source, plan.parents, plan.ranks)

    drafters: list[Drafter] = [ShapedDrafter(pair.target, "one"), NgramDrafter(), ShapedDrafter(pair.target, "other")]
    decoder = SpeculativeDecoder(pair.target, drafters, Turns(), tokenizer=pair.tokenizer, strict=True)
    assert [source.branches for source in decoder.spec.sources] == [3, 1, 3]
    made = decoder.generate(list(PROMPTS[:4]), max_new_tokens=16, temperature=0)
    for prompt, one in zip(PROMPTS, made, strict=False):
        assert one.tokens[0].tolist() == outputs(pair.ids(prompt), SAMPLINGS[0], max_new_tokens=16).tokens
        assert {0, 2} & {int(step.source) for step in one.steps if step.path is not None and step.path.numel()}


class ByRow(ShapedDrafter):
    """Each row by itself."""

    def begin(self, text: RunningText) -> Any:
        return EachRow(text, lambda row: OneRow(self, row))


class OneRow:
    def __init__(self, drafter: ShapedDrafter, text: RowText) -> None:
        self.session = ShapedSession(drafter, RunningText([text], slots=1))

    def advance(self, features: Tensor | None) -> None:
        self.session.advance(None)

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None, shape: TreeShape | None = None) -> Proposal:
        return self.session.draft([block_size], draw, go_on, [shape])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_that_draft_by_themselves_get_their_own_shape(pair: TinyPair, outputs: Outputs, batch_size: int) -> None:
    policy = Shaping(3, 9)
    decoder = SpeculativeDecoder(pair.target, ByRow(pair.target), policy, tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate(list(PROMPTS[:3]), batch_size=batch_size, max_new_tokens=12, temperature=0)
    for prompt, one in zip(PROMPTS, made, strict=False):
        assert one.tokens[0].tolist() == outputs(pair.ids(prompt), SAMPLINGS[0], max_new_tokens=12).tokens
    assert policy.drafts
    assert all(drafted(*each) for each in policy.drafts)


def test_a_drafter_elsewhere_is_handed_shapes(pair: TinyPair, outputs: Outputs) -> None:
    drafter = OtherDevice(ShapedDrafter(pair.target), torch.device("cpu"))
    decoder = SpeculativeDecoder(
        pair.target, drafter, Fixed(TreeShape((-1, -1), (0, 1))), tokenizer=pair.tokenizer, strict=True
    )
    made = decoder.generate(PROMPTS[5], max_new_tokens=12, temperature=0)
    assert made.tokens[0].tolist() == outputs(pair.ids(PROMPTS[5]), SAMPLINGS[0], max_new_tokens=12).tokens
    assert [step.path[0].tolist() for step in made.steps[:-1] if step.path is not None] == [[1]] * len(made.steps[:-1])


# Shapes


@pytest.mark.parametrize(("branches", "trunk", "length"), [*itertools.product(range(1, 5), range(5), range(5))])
def test_delayed_trees(branches: int, trunk: int, length: int) -> None:
    shape = TreeShape.delayed(branches, trunk, length)
    assert len(shape) == len(shape.ranks) == trunk + branches * length
    assert shape.deepest == trunk + length
    first = TreeShape.chain(trunk + length)
    assert (shape.parents[: len(first)], shape.ranks[: len(first)]) == (first.parents, first.ranks)
    beside = [node for node, parent in enumerate(shape.parents) if parent == trunk - 1]
    assert [shape.ranks[node] for node in beside] == list(range(branches if length else 0))
    assert sum(shape.ranks) == sum(range(branches)) * bool(length), "all others go on with the best"
    leaves = set(range(len(shape))) - set(shape.parents)
    assert len(leaves) == (branches if length else bool(trunk))


# Faults


TREES = SourceSpec("trees", "block-diffusion", 4, 12, work_of("block-diffusion"), branches=3)
CHAINS = SourceSpec("chains", "n-gram", 4, 12, work_of("n-gram"))
SPEC = DecoderSpec("t", "trees", "block-diffusion", 4, 12, 8, 9, branches=3, others=(CHAINS,))


class Answering(Policy):
    wants = frozenset()

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def select(self, state: State, context: Context) -> Plan:
        return self.plan


def asked(sizes: list[int], sources: list[int], parents: Any, ranks: Any, *, strict: bool = True) -> Any:
    plan = Plan(torch.tensor(sizes), torch.tensor(sources), parents, ranks)
    counts = torch.ones(len(sizes), dtype=torch.long)
    policy = GuardedPolicy(Answering(plan), SPEC, strict=strict)
    return policy, policy.select(Context(SPEC, counts, counts * 50, counts * 9, torch.Generator()))


def test_shapes_of_each_row() -> None:
    parents, ranks = torch.tensor([[-1, -1, 0], [-1, 0, 1], [9, 9, 9]]), torch.tensor([[0, 2, 1], [0, 0, 0], [7, 7, 7]])
    policy, selected = asked([4, 4, 1], [0, 1, 1], parents, ranks)
    sizes, sources, shapes = selected
    assert (sizes, sources) == ([4, 4, 1], [0, 1, 0])
    assert shapes == [TreeShape((-1, -1, 0), (0, 2, 1)), None, TreeShape((), ())]
    assert policy.fallbacks == 0
    assert asked([4, 4], [1, 1], parents[[1, 1]], ranks[[1, 1]])[1].shapes is None, "chains of chains"
    assert asked([4, 4], [0, 1], None, None)[1].shapes is None
    assert asked([1, 1], [0, 0], parents[:2], ranks[:2])[1].shapes is None


ROW = torch.tensor([[-1, 0, 1]])
FAULTS: dict[str, tuple[int, Any, Any, str]] = {
    "no ranks": (0, ROW, None, r"ranks of its Plan: None, not int64 \[batch, nodes\]"),
    "no parents": (0, None, ROW, r"parents of its Plan: None, not int64"),
    "a list": (0, [[-1, 0, 1]], ROW, r"parents of its Plan: a list, not int64"),
    "floats": (0, ROW.float(), ROW, r"parents of its Plan: torch.float32, not int64"),
    "no batch axis": (0, ROW[0], ROW[0], r"parents of its Plan have shape \[3\], not \[1, 3\]"),
    "a row too many": (0, ROW, ROW.expand(2, 3), r"ranks of its Plan have shape \[2, 3\], not \[1, 3\]"),
    "too few nodes": (0, ROW[:, :2], ROW[:, :2], r"shape \[1, 2\], not \[1, 3\]: a row of a tree has block_size - 1"),
    "itself": (0, torch.tensor([[-1, 1, 0]]), ROW * 0, "node 1 of its Plan has parent 1, which is not before it"),
    "before the anchor": (0, torch.tensor([[-2, 0, 0]]), ROW * 0, "node 0 of its Plan has parent -2"),
    "a rank too many": (0, ROW, torch.tensor([[0, 3, 0]]), "node 1 of its Plan has rank 3, of 3 candidates"),
    "a negative rank": (0, ROW, torch.tensor([[-1, 0, 0]]), "node 0 of its Plan has rank -1"),
    "one twice": (0, torch.tensor([[-1, 0, 0]]), torch.tensor([[0, 1, 1]]), "two nodes of rank 1 after node 0"),
    "a tree of chains": (1, torch.tensor([[-1, 0, 0]]), ROW * 0, "its Plan has a tree for chains, which drafts chains"),
    "a second-best chain": (1, ROW, torch.tensor([[1, 0, 0]]), "its Plan has a tree for chains"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_shapes_are_mended(fault: str) -> None:
    source, parents, ranks, said = FAULTS[fault]
    with pytest.raises(PolicyFault, match=said):
        asked([4], [source], parents, ranks)
    with pytest.warns(PolicyFaultWarning, match=f"{said}.*; using the trees that the drafter chooses instead"):
        policy, selected = asked([4], [source], parents, ranks, strict=False)
    assert selected == ([4], [source], None), "sizes and sources hold"
    assert policy.fallbacks == 1


def test_shapes_are_at_most_as_deep_as_blocks() -> None:
    chain = TreeShape.chain(4)
    parents, ranks = torch.tensor([chain.parents]), torch.tensor([chain.ranks])
    with pytest.raises(PolicyFault, match="a path of 4 nodes, above trained_block_size - 1, 3 of trees"):
        asked([5], [0], parents, ranks)
    assert asked([5], [1], parents, ranks)[1].shapes is None, "chains may be longer"
    parents[0, 3] = 0
    ranks[0, 3] = 1
    assert asked([5], [0], parents, ranks)[1].shapes == [TreeShape((-1, 0, 1, 0), (0, 0, 0, 1))]


def test_a_plan_that_is_mended_otherwise_has_no_trees() -> None:
    with pytest.warns(PolicyFaultWarning, match="above 12.*; using 12 instead"):
        policy, selected = asked([99], [0], ROW, ROW * 0, strict=False)
    assert selected == ([12], [0], None)
    assert policy.fallbacks == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_faulty_shape_costs_no_text(pair: TinyPair, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    policy = Fixed(TreeShape((-1, 0, 0), (0, 1, 1)))
    decoder = SpeculativeDecoder(pair.target, branching(pair), policy, tokenizer=pair.tokenizer)
    with pytest.warns(PolicyFaultWarning, match="two nodes of rank 1"):
        made = decoder.generate(PROMPTS[4], **options)
    assert made.tokens.equal(decoder.with_policy("fixed:1").generate(PROMPTS[4], **options).tokens)
    assert made.fallbacks == len(made.steps)
    assert all(step.path is not None for step in made.steps[:-1]), "trees that the drafter chose"


def test_sources_say_how_many_branches_they_have(pair: TinyPair) -> None:
    assert source_spec(branching(pair, 4)).branches == 4
    assert source_spec(NgramDrafter()).branches == 1
    spec = SpeculativeDecoder(pair.target, branching(pair, 4)).spec
    assert (spec.branches, spec.sources[0].branches) == (4, 4)


def test_steps_of_shapes_read_the_device_as_often(pair: TinyPair) -> None:
    """Chances, of which those that are ruled out are left out, and what was decided."""
    from bpkit.testing.simulated_device import SimulatedDevice

    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "seed": 5}
    host = SpeculativeDecoder(pair.target, branching(pair), "fixed:12", tokenizer=pair.tokenizer)
    with SimulatedDevice() as device:
        policy = Fixed(TreeShape.delayed(2, 1, 2))
        reads = device.count(device.decoder(host).with_policy(policy), PROMPTS[0], **options)
        assert list(reads.tokens) == host.generate(PROMPTS[0], **options).tokens[0].tolist()
        assert set(reads.steps) == {2}
