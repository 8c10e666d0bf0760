"""The policy `tree`: which nodes pay, of one row and of several, and what it learns of their chances."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from bpkit_load.node_chances import BOUNDS, KEPT, SHAPE, SUREST, UNKNOWN, WEIGHT, NodeChances, Paths
from bpkit_load.node_prices import NodePrices, PassCosts
from bpkit_load.tree import TreePolicy
from hypothesis import given, settings
from hypothesis import strategies as st

from bpkit import SpeculativeDecoder
from bpkit.decode.trees import closed
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.policy import PolicyError
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.trace.cost import CostTable
from bpkit.types import Draft, Feature
from tests.conftest import ShippedPair
from tests.records import bound, context, decoder, step


def tree(parents: list[list[int]], chances: list[list[float]]) -> Draft:
    """A draft of these nodes of each row, which may be of several lengths."""
    width, length = max(map(len, parents)), torch.tensor([len(row) for row in parents])
    padded = [[*row, *[7] * (width - len(row))] for row in parents]
    values = [[*row, *[float("nan")] * (width - len(row))] for row in chances]
    tokens = torch.zeros(len(parents), width, dtype=torch.long)
    return Draft(
        context(len(parents)), length + 1, length, tokens, parents=torch.tensor(padded), chances=torch.tensor(values)
    )


def kept(policy: TreePolicy, draft: Draft) -> list[list[int]]:
    state = policy.begin(draft.context)
    assert policy.select(state, draft.context).tolist() == [policy.most + 1] * len(draft.draft_length)
    mask = policy.truncate(state, draft)
    assert mask.dtype == torch.bool
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_nodes_that_pay_by_hand() -> None:
    """Products 0.9, 0.72, 0.08 and 0.36; k nodes give 1 + the k largest for 1 + slope k plain steps."""
    draft = tree([[-1, 0, -1, 1]], [[0.9, 0.8, 0.08, 0.5]])
    assert kept(bound(TreePolicy(slope=0.2)), draft) == [[0, 1]], "2.62 / 1.4 is more than 1.9 / 1.2 and 2.98 / 1.6"
    assert kept(bound(TreePolicy(slope=0.1)), draft) == [[0, 1, 3]], "the third is less likely than the fourth"
    assert kept(bound(TreePolicy(slope=0.0)), draft) == [[0, 1, 2, 3]]
    assert kept(bound(TreePolicy(slope=2.0)), draft) == [[]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_other_trees_have_more_tokens_for_their_time(data: st.DataObject) -> None:
    """All rows have one budget: all closed sets of nodes are tried."""
    slope = data.draw(st.sampled_from([0.05, 0.2, 0.4]))
    parents = [[data.draw(st.integers(-1, i - 1)) for i in range(data.draw(st.integers(1, 4)))] for _ in range(2)]
    chances = [[data.draw(st.floats(0.5, 0.95)) for _ in row] for row in parents]
    draft = tree(parents, chances)

    def worth(chosen: tuple[tuple[bool, ...], ...]) -> float:
        tokens, count = 2.0, 0
        for row, own, before in zip(chosen, chances, parents, strict=True):
            if closed(row, before) != [node for node, keeps in enumerate(row) if keeps]:
                return 0.0
            tokens += sum(s for s, keeps in zip(products(own, before), row, strict=True) if keeps)
            count += sum(row)
        return tokens / (2 + slope * count)

    made = kept(bound(TreePolicy(slope=slope)), draft)
    mine = tuple(tuple(node in own for node in range(len(row))) for own, row in zip(made, parents, strict=True))
    every = itertools.product(*(itertools.product([False, True], repeat=len(row)) for row in parents))
    assert worth(mine) == pytest.approx(max(map(worth, every)))


def products(chances: list[float], parents: list[int]) -> list[float]:
    found: list[float] = []
    for chance, before in zip(chances, parents, strict=True):
        found.append(chance * (found[before] if before >= 0 else 1.0))
    return found


def test_depths_and_products_follow_parents() -> None:
    parents, chances = np.array([[-1, 0, -1, 1, 2], [-1, -1, -1, 0, 3]]), np.full((2, 5), 0.5)
    paths = Paths(parents)
    assert paths.depths.tolist() == [[0, 1, 0, 2, 1], [0, 0, 0, 1, 2]]
    assert paths.products(chances).tolist() == [[0.5, 0.25, 0.5, 0.125, 0.25], [0.5, 0.5, 0.5, 0.25, 0.125]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_paths_of_any_tree(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(0, 20))
    rows = [[data.draw(st.integers(-1, i - 1)) for i in range(nodes)] for _ in range(data.draw(st.integers(1, 3)))]
    chances = [[data.draw(st.floats(0.1, 1.0)) for _ in row] for row in rows]
    paths = Paths(np.array(rows, np.int64).reshape(len(rows), nodes))
    found = paths.products(np.array(chances).reshape(len(rows), nodes))
    for place, row in enumerate(rows):
        assert found[place].tolist() == pytest.approx(products(chances[place], row))
        assert (2.0 ** -paths.depths[place]).tolist() == pytest.approx(products([0.5] * nodes, row), rel=1.01)


def test_a_chain_is_a_tree_of_one_path() -> None:
    """Its chances are the drafter's probabilities, of a drafter without any one that is usual."""
    chances = [[0.9, 0.8, 0.5]]
    nodes = tree([[-1, 0, 1]], chances)
    chain = replace(nodes, parents=None, chances=None, features={Feature.DRAFT_PROBABILITY: torch.tensor(chances)})

    def length(slope: float, draft: Draft) -> int:
        policy = bound(TreePolicy(slope=slope))
        state = policy.begin(draft.context)
        policy.select(state, draft.context)
        return int(policy.truncate(state, draft)[0])

    for slope in (0.1, 0.2, 0.4):
        assert kept(bound(TreePolicy(slope=slope)), nodes) == [list(range(length(slope, chain)))]
    bare = replace(chain, features={})
    assert length(0.3, bare) == 2, "1 + 0.7 + 0.49 for 1.6, more than 1.7 for 1.3"
    assert bound(TreePolicy()).wants_optional == {Feature.DRAFT_PROBABILITY}
    assert bound(TreePolicy(), replace(decoder(), branches=2)).wants_optional == frozenset()
    assert UNKNOWN == 0.7


def test_so_many_nodes_are_drafted_as_pay() -> None:
    """Of twelve nodes the first two stand half the time, and the others never."""
    policy = bound(TreePolicy(slope=0.1), replace(decoder(trained=8, largest=13), branches=3))
    state, sizes = policy.begin(context()), []
    for turn in range(80):
        size = int(policy.select(state, context())[0])
        sizes.append(size)
        draft = tree([[-1, *range(size - 2)]], [[0.7, 0.7, *[0.05] * 10][: size - 1]])
        mask = policy.truncate(state, draft)
        stands = min(2, int(mask.sum())) * (turn % 2)
        policy.observe(state, replace(step([int(mask.sum())], [stands]), path=torch.arange(stands)[None]))
    assert sizes[:4] == [13] * 4
    assert set(sizes[4:]) == {3, 13}
    assert 3 <= sizes[4:].count(13) <= 5, "one in sixteen is of the most nodes"
    assert bound(TreePolicy(block_size=12)).most == 11
    assert bound(TreePolicy(block_size=99)).most == 15
    assert int(bound(TreePolicy(block_size=5)).select(policy.begin(context()), context())[0]) == 5


def test_a_number_of_nodes_is_verified_whatever_it_costs() -> None:
    """The best by what was counted: second candidates have always stood, and first ones never."""
    policy = bound(TreePolicy(nodes=2, slope=9.0), replace(decoder(), branches=2))
    draft, state = tree([[-1, 0, -1], [-1, 0, -1]], [[0.6, 0.5, 0.3], [0.6, 0.5, 0.0]]), policy.begin(context(2))
    seen = []
    for _ in range(40):
        assert policy.select(state, draft.context).tolist() == [policy.most + 1] * 2
        mask = policy.truncate(state, draft)
        seen.append([row.nonzero()[:, 0].tolist() for row in mask])
        policy.observe(state, replace(step([2, 2], [1, 0]), path=torch.tensor([[2], [-1]])))
    assert seen[0] == [[0, 1], [0, 1]]
    assert seen[-1][0] == [0, 2]


def test_larger_trees_are_drafted_at_the_price_of_the_block() -> None:
    cost = CostTable(draft={2: 0.1, 8: 0.4}, verify={width: 0.9 + 0.1 * width for width in range(1, 34)}, rest=0.1)
    source = replace(decoder(trained=8, largest=32), branches=4).sources[0]
    passes = PassCosts(cost, source)
    assert passes.seconds("draft", 32, 10) == passes.seconds("draft", 8, 10) == cost.seconds("draft", 8, 10)
    assert passes.seconds("verify", 32, 10) == cost.seconds("verify", 32, 10)
    prices = NodePrices(passes, range(2, 33), 1, 10, features=False, slope=0.0)
    assert prices.drafts[[0, 1, 7, 31]].tolist() == pytest.approx([0.0, 0.1, 0.4, 0.4])
    assert prices.nodes[[0, 8, 31]].tolist() == pytest.approx([1.1, 1.9, 4.2])
    assert prices.draft_length(np.full(31, 0.3), 0.0, range(2, 33)) == 31, "10.3 tokens in 4.6 s, and one in 1.1 s"
    assert prices.draft_length(np.full(31, 0.1), 0.0, range(2, 33)) == 0, "4.1 tokens in 4.6 s"
    assert prices.draft_length(np.array([0.9, 0.9, 0.1]), 0.0, range(2, 33)) == 2, (
        "2.8 in 1.7 s, 1.9 in 1.3 s, 2.9 in 1.8 s"
    )
    assert prices.draft_length(np.array([0.9, 0.9, 0.1]), 0.0, [2, 4]) == 3, "of the sizes that there are"
    assert bound(TreePolicy(), replace(decoder(trained=8, largest=32), branches=4), cost).most == 31
    assert bound(TreePolicy(block_sizes=[2, 4])).sizes == [2, 4]
    assert bound(TreePolicy(block_sizes=[2, 4]), replace(decoder(trained=8, largest=16), branches=4)).most == 15


def test_what_was_tested_is_counted() -> None:
    counted = NodeChances()
    chances = np.array([[0.55, 0.25, 0.55, 0.02], [0.55, 0.55, 0.9, 0.55]])
    parents = np.array([[-1, -1, 0, 1], [-1, 0, 1, -1]])
    cells = counted.cells(chances, Paths(parents).depths)
    assert counted.calibrated(chances, cells) == pytest.approx(chances)
    cells[1, 3] = -1  # not verified
    counted.count(cells, parents, np.array([[1, -1], [0, 1]]), np.array([False, True]))
    # Of row 0 the first node failed, the second stands, its child failed, and that of the first was not reached. Row 1
    # ended after two, whatever follows.
    at = np.searchsorted(BOUNDS, [0.55, 0.25, 0.02], side="right").tolist()
    assert counted.tested[0, at].tolist() == [2, 1, 0]
    assert counted.tested[1, at].tolist() == [1, 0, 1]
    assert counted.accepted[0, at].tolist() == [1, 1, 0]
    assert counted.accepted[1, at].tolist() == [1, 0, 0]
    assert counted.tested.sum() == 5
    first = counted.calibrated(np.array([[0.55]]), counted.cells(np.array([[0.55]]), np.array([[0]])))
    broad = (2 + WEIGHT * 0.55) / (3 + WEIGHT)
    assert float(first[0, 0]) == pytest.approx((1 + WEIGHT * broad) / (2 + WEIGHT))
    counted.count(np.full((1, 1), -1), np.full((1, 1), -1), np.zeros((1, 0), np.int64), np.array([False]))
    assert counted.tested.sum() == pytest.approx(5 * KEPT)
    counted.accepted += 1e9
    counted.tested += 1e9
    assert counted.calibrated(chances, counted.cells(chances, Paths(parents).depths)).max() == SUREST
    assert counted.cells(np.array([[np.nan]]), np.array([[0]])).tolist() == [[SHAPE[1] - 1]]


def test_nodes_that_never_stand_are_left_out_in_time() -> None:
    policy = bound(TreePolicy(slope=0.1))
    draft = tree([[-1, -1]] * 2, [[0.6, 0.3]] * 2)
    state = policy.begin(draft.context)
    sizes = []
    for _ in range(60):
        policy.select(state, draft.context)
        sizes.append(policy.truncate(state, draft)[0].tolist())
        policy.observe(state, replace(step([sum(sizes[-1])] * 2, [1, 1]), path=torch.tensor([[0], [0]])))
    assert sizes[0] == [True, True]
    assert sizes[-1] == [True, False]


def test_memory_survives_json_and_strangers_are_refused() -> None:
    policy, draft = bound(TreePolicy()), tree([[-1, -1], [-1]], [[0.6, 0.3], [0.5]])
    assert policy.state_dict() == {}
    state = policy.begin(draft.context)
    policy.select(state, draft.context)
    policy.truncate(state, draft)
    policy.observe(state, replace(step([2, 1], [1, 0]), path=torch.tensor([[1], [-1]])))
    fresh = bound(TreePolicy())
    fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert fresh.memory.model_dump() == policy.memory.model_dump()
    assert fresh.memory.rates.keys() == {2}
    assert kept(fresh, draft) == kept(policy, draft)
    for strange in (
        {"something": 1},
        {"accepted": policy.state_dict()["accepted"]},
        {"accepted": [[1.0]], "tested": [[1.0]]},
    ):
        with pytest.raises(PolicyError, match="this is no memory of TreePolicy"):
            fresh.load_state_dict(strange)


def test_sizes_without_a_price_are_not_drafted() -> None:
    policy = bound(TreePolicy(), cost=CostTable(draft={6: 0.2}, verify={1: 1.0, 6: 2.0}, rest=0.1))
    assert policy.most == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_with_trees_run_without_faults(pair: TinyPair, temperature: float) -> None:
    prompts = [pair.ids(text) for text in ("def f(x):", "1, 2, 3, 1, 2,", "a b a b", "x = 1", "y")]
    drafter = BlockDiffusionDrafter(pair.drafter_model, pair.target, branches=3)
    made, plain = (
        SpeculativeDecoder(pair.target, drafter, policy, strict=True).generate(
            prompts, batch_size=3, max_new_tokens=16, temperature=temperature, seed=1
        )
        for policy in (resolve_policy("tree:block_size=20,slope=0.001"), "fixed:1")
    )
    assert [each.tokens.tolist() for each in made] == [each.tokens.tolist() for each in plain]


def test_the_shipped_pair_verifies_fewer_nodes_where_they_cost_more(shipped: ShippedPair) -> None:
    prompt = shipped.tokenizer("def add(a, b):\n    return", return_tensors="pt")["input_ids"]
    drafter = BlockDiffusionDrafter(shipped.drafter.model, shipped.target, branches=4)
    widths, lengths, texts = [], [], []
    for slope in (0.3, 0.05, 0.01):
        policy = TreePolicy(slope=slope)
        made = SpeculativeDecoder(shipped.target, drafter, policy, strict=True).generate(prompt, max_new_tokens=48)
        widths.append(float(np.mean([int(one.verify_length) for one in made.steps])))
        lengths.append(made.acceptance_length)
        texts.append(made.tokens.tolist())
        counted = policy.counted
        assert counted.tested.sum() > 0
        assert bool((counted.accepted <= counted.tested).all())
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] / 2
    assert lengths[0] < lengths[-1]
    assert texts[0] == texts[1] == texts[2]
