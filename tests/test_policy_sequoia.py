"""The policy `sequoia`: the best static tree by what was counted, and how large one pays."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bpkit_load.rank_counts import FIRST, SECOND, RankCounts, expected_chances, nodes_left
from bpkit_load.sequoia import MOST_STEPS, Sequoia
from hypothesis import given, settings
from hypothesis import strategies as st

from bpkit import Plan, SpeculativeDecoder
from bpkit.draft.best_first import shaped
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.static_trees import best_static
from bpkit.policy import PolicyError
from bpkit.testing import TinyPair
from bpkit.trace.cost import CostTable
from bpkit.types import DecoderSpec, Draft
from tests.conftest import ShippedPair
from tests.records import bound, context, decoder, step

WEIGHT = 4.0


def of_trees(trained: int = 8, largest: int = 64, branches: int = 4) -> DecoderSpec:
    return replace(decoder(trained, largest), branches=branches)


def drafted(policy: Sequoia, rows: int = 1) -> tuple[Any, list[list[int]], list[list[int]]]:
    """The state after a decision, and parents and ranks of each row's tree."""
    state = policy.begin(context(rows))
    plan = policy.select(state, context(rows))
    assert isinstance(plan, Plan)
    assert plan.source.tolist() == [0] * rows
    assert plan.parents is not None
    assert plan.ranks is not None
    assert set(plan.block_size.tolist()) == {1 + plan.parents.shape[1]}
    return state, plan.parents.tolist(), plan.ranks.tolist()


def sizes(policy: Sequoia, state: Any, rows: int = 1) -> list[int]:
    answer = policy.select(state, context(rows))
    block_size: list[int] = (answer.block_size if isinstance(answer, Plan) else answer).tolist()
    return block_size


def nodes(policy: Sequoia) -> int:
    return sizes(policy, policy.begin(context()))[0] - 1


def knowing(policy: Sequoia, chances: list[list[float]], tested: float = 1e6) -> Sequoia:
    """A policy that has counted so often that only that matters."""
    policy.load_state_dict(
        {"accepted": (tested * np.array(chances)).tolist(), "tested": [[tested] * len(row) for row in chances]}
    )
    return policy


# Decisions


def test_the_tree_of_so_many_nodes_is_the_best() -> None:
    chances = [[0.5, 0.3, 0.1, 0.0], [0.9, 0.05, 0.0, 0.0], *[[0.4, 0.1, 0.0, 0.0]] * 5]
    policy = knowing(bound(Sequoia(block_size=6), of_trees()), chances)
    state, parents, ranks = drafted(policy, rows=2)
    assert parents == [[-1, 0, -1, 2, 1]] * 2
    assert ranks == [[0, 0, 1, 0, 0]] * 2, "0.5, 0.45, 0.3, 0.27 and 0.18"
    assert state["parents"][:, :5].tolist() == parents
    assert state["cells"].tolist() == [[0, 4, 1, 4, 8]] * 2
    wide = knowing(bound(Sequoia(block_size=4), of_trees()), [[0.4, 0.35, 0.3, 0.0], [0.1, 0.1, 0.1, 0.1]])
    assert drafted(wide)[2] == [[0, 1, 2]]
    assert drafted(wide)[1] == [[-1, -1, -1]]


def test_what_is_counted_little_leans_on_the_depth_before() -> None:
    counted = RankCounts(3, 2)
    assert expected_chances(3).tolist() == pytest.approx([FIRST, SECOND, SECOND / 2**1.2])
    assert counted.chances(WEIGHT).tolist() == [[FIRST, SECOND]] * 3
    counted.accepted[0] = [6.0, 0.0]
    counted.tested[0] = [8.0, 4.0]
    first = [(6 + WEIGHT * FIRST) / (8 + WEIGHT), WEIGHT * SECOND / (4 + WEIGHT)]
    assert counted.chances(WEIGHT).ravel().tolist() == pytest.approx(first * 3)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_as_many_nodes_as_pay(data: st.DataObject) -> None:
    """Against all sizes and depths at the prices of the cost model, each with its best tree."""
    rows = data.draw(st.lists(st.lists(st.floats(0.01, 0.6), min_size=3, max_size=3), min_size=4, max_size=4))
    drafts = {size: 0.1 + 0.05 * size for size in range(2, 6)}
    prices = data.draw(st.lists(st.floats(0.0, 0.3), min_size=20, max_size=20))
    verify: dict[int, Any] = {width + 1: 1.0 + float(price) for width, price in enumerate(np.cumsum(prices))}
    policy = knowing(
        bound(Sequoia(), of_trees(5, 20, branches=3), CostTable(draft=drafts, verify=verify, rest=0.1)), rows
    )
    chances = policy.known().chances(WEIGHT)

    def rate(depth: int, count: int) -> float:
        expected = 1 + float(best_static(chances[:depth], count).reached.sum())
        return expected / float((drafts[depth + 1] if count else 0.0) + verify[count + 1] + 0.1)

    best = max(rate(depth, count) for depth in range(1, 5) for count in range(20))
    answer = policy.select(policy.begin(context()), context())
    if isinstance(answer, Plan):
        assert answer.parents is not None
        depths = [0]
        for parent in answer.parents[0].tolist():
            depths.append(depths[parent + 1] + 1)
        assert rate(max(depths), len(depths) - 1) == pytest.approx(best)
    else:
        assert answer.tolist() == [1]
        assert rate(1, 0) == pytest.approx(best)


def test_dearer_steps_have_fewer_nodes() -> None:
    found = [nodes(bound(Sequoia(slope=slope), of_trees())) for slope in (0.0, 0.01, 0.05, 0.2, 2.0)]
    assert found[0] == 63
    assert found[0] > found[1] > found[2] > found[3] > found[4] == 0


def test_many_rows_pay_for_each_others_nodes() -> None:
    class Shared:
        """A pass costs by the positions of all rows, from some number on."""

        def seconds(self, phase: str, size: int, context_length: int) -> float:
            return self.batch_seconds(phase, size, context_length, 1, size)

        def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
            return max(1.0, positions / 16) if phase == "verify" else 0.05

    policy = bound(Sequoia(), of_trees(), Shared())
    one, many = drafted(policy)[1], drafted(policy, rows=8)[1]
    assert len(one[0]) > 8
    assert len(many) == 8
    assert len(many[0]) <= 3


def test_limits_of_the_decoder_and_of_the_prices() -> None:
    assert nodes(bound(Sequoia(block_size=99), of_trees(largest=30))) == 29
    assert nodes(bound(Sequoia(block_size=99), of_trees(trained=3, largest=99, branches=2))) == 6, "all there are"
    assert nodes(bound(Sequoia(slope=0.0), of_trees(largest=999))) == 64
    assert nodes(bound(Sequoia(block_size=1), of_trees())) == 0
    priced = CostTable(draft={2: 0.1, 4: 0.1}, verify={1: 1.0, 9: 1.0}, rest=0.1)
    policy = bound(Sequoia(), of_trees(), priced)
    parents = drafted(policy)[1][0]
    assert len(parents) == 8
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    assert max(depths) <= 3


def test_with_chains_it_chooses_their_length() -> None:
    policy = knowing(bound(Sequoia(slope=0.1)), [[0.9]] * 3 + [[0.05]] * 12)
    assert sizes(policy, policy.begin(context(2)), 2) == [4, 4]
    assert nodes(bound(Sequoia(block_size=12))) == 11
    assert nodes(bound(Sequoia(block_size=99))) == 15


# Learning


def test_what_was_tested_is_counted() -> None:
    policy = bound(Sequoia(block_size=5, discount=1.0), of_trees())
    state, parents, ranks = drafted(policy, rows=2)
    assert (parents[0], ranks[0]) == ([-1, 0, 1, 2], [0, 0, 0, 0]), "at first the chain"
    state["parents"][:, :4] = torch.tensor([-1, -1, 0, 1])
    state["cells"][:, :4] = torch.tensor([0, 1, 4, 5])
    made = replace(step([4, 4], [2, 0]), path=torch.tensor([[1, 3], [-1, -1]]))
    policy.observe(state, made)
    known = policy.known()
    assert known.tested[:2].tolist() == [[2, 2, 0, 0], [0, 1, 0, 0]]
    assert known.accepted[:2].tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    ended = replace(step([4, 4], [1, 0]), path=torch.tensor([[0], [-1]]), stopped=(True, True))
    policy.observe(state, ended)
    assert policy.known().tested[:2].tolist() == [[3, 2, 0, 0], [0, 1, 0, 0]], "what follows the end was not tested"


def test_chains_are_counted_and_counts_fade() -> None:
    policy = bound(Sequoia(block_size=5, discount=0.5))
    state = policy.begin(context(2))
    policy.select(state, context(2))
    policy.observe(state, step([4, 2], [2, 2], drafted=[4, 2]))
    assert policy.known().tested.tolist() == [[2], [2], [1], [0]]
    assert policy.known().accepted.tolist() == [[2], [2], [0], [0]]
    policy.observe(state, step([0, 0], [0, 0], drafted=[0, 0], block_size=[1, 1]))
    assert policy.known().tested[:3, 0].tolist() == [1, 1, 0.5]


def test_nodes_that_were_ruled_out_are_not_counted() -> None:
    parents, ranks = [-1, -1, 0, 0, 1, 2], [0, 1, 0, 1, 0, 0]
    assert nodes_left(parents, ranks, [-1, 0, 1]) == [0, 2, 5]
    policy = bound(Sequoia(block_size=9, discount=1.0), of_trees())
    state = policy.begin(context())
    state["parents"][0] = torch.tensor([*parents, -1, -1])  # the last two are of an earlier, larger tree
    state["cells"][0] = torch.tensor([0, 1, 4, 5, 4, 8, 2, 3])
    length, tokens = torch.tensor([3]), torch.zeros(1, 3, dtype=torch.long)
    draft = Draft(context(), torch.tensor([7]), length, tokens, parents=torch.tensor([[-1, 0, 1]]))
    assert policy.truncate(state, draft).tolist() == [3]
    assert state["cells"][0, :3].tolist() == [0, 4, 8]
    made = step([3], [2], block_size=[7])
    policy.observe(state, replace(made, draft_length=length, path=torch.tensor([[0, 1]])))
    assert policy.known().tested[:3].tolist() == [[1, 0, 0, 0]] * 3
    assert policy.known().accepted[:3, 0].tolist() == [1, 1, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_which_nodes_were_ruled_out_follows_from_parents(data: st.DataObject) -> None:
    from bpkit.decode.trees import TreeShape

    tree = best_static(np.random.default_rng(data.draw(st.integers(0, 999))).uniform(0, 0.5, (4, 3)), 12)
    chances = [[0.5] * (kept := data.draw(st.integers(0, 3))) + [0.0] * (3 - kept) for _ in range(4)]
    shape = TreeShape(tuple(tree.parents.tolist()), tuple(tree.ranks.tolist()))
    made = shaped(chances, shape)
    left = nodes_left(shape.parents, shape.ranks, [node.parent for node in made])
    assert [(shape.depths[i] - 1, shape.ranks[i]) for i in left] == [(node.position, node.rank) for node in made]


def test_a_tree_stays_a_while_and_requests_begin_with_what_is_known() -> None:
    policy = knowing(bound(Sequoia(block_size=3), of_trees()), [[0.6, 0.1, 0, 0], [0.5, 0, 0, 0]], 1e4)
    state, before, _ = drafted(policy)
    knowing(policy, [[0.6, 0.5, 0, 0], [0.1, 0, 0, 0]], 1e4)
    found = []
    for _ in range(MOST_STEPS):
        policy.select(state, context())
        found.append(state["parents"].tolist())
    assert found == [before] * (MOST_STEPS - 1) + [[[-1, -1]]]
    knowing(policy, [[0.6, 0.1, 0, 0], [0.5, 0, 0, 0]], 1e4)
    assert drafted(policy)[1] == before


def test_memory_survives_json_and_strangers_are_refused() -> None:
    policy = bound(Sequoia(block_size=9), of_trees())
    assert policy.state_dict() == {}
    state, _, _ = drafted(policy)
    policy.observe(state, replace(step([8], [2]), path=torch.tensor([[0, 1]])))
    fresh = bound(Sequoia(block_size=9), of_trees())
    fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert fresh.memory.model_dump() == policy.memory.model_dump()
    assert drafted(fresh)[1:] == drafted(policy)[1:]
    other = bound(Sequoia(), of_trees(trained=4, branches=2))
    other.load_state_dict(policy.state_dict())
    assert other.known().tested.tolist() == policy.known().tested[:3, :2].tolist()
    for strange in (
        {"something": 1},
        {"accepted": policy.state_dict()["accepted"]},
        {"accepted": [[1.0]], "tested": [[1.0, 2.0]]},
        {"accepted": [[1.0], [1.0, 2.0]], "tested": [[1.0], [1.0, 2.0]]},
    ):
        with pytest.raises(PolicyError, match="this is no memory of Sequoia"):
            fresh.load_state_dict(strange)


# In a decoder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{"block_size": 20}, {"slope": 0.001}])
def test_rows_with_static_trees_run_without_faults(pair: TinyPair, temperature: float, options: dict[str, Any]) -> None:
    prompts = [pair.ids(text) for text in ("def f(x):", "1, 2, 3, 1, 2,", "a b a b", "x = 1", "y")]
    drafter = BlockDiffusionDrafter(pair.drafter_model, pair.target, branches=3)
    made, plain = (
        SpeculativeDecoder(pair.target, drafter, policy, strict=True).generate(
            prompts, batch_size=3, max_new_tokens=16, temperature=temperature, seed=1
        )
        for policy in (Sequoia(**options), "fixed:1")
    )
    assert [each.tokens.tolist() for each in made] == [each.tokens.tolist() for each in plain]


def test_the_shipped_pair_learns_where_second_candidates_are_right(shipped: ShippedPair) -> None:
    drafter = BlockDiffusionDrafter(shipped.drafter.model, shipped.target, branches=4)
    prompt = shipped.tokenizer("def add(a, b):\n    return", return_tensors="pt")["input_ids"]
    lengths = []
    for policy in (Sequoia(block_size=17), Sequoia(slope=0.01)):
        runner = SpeculativeDecoder(shipped.target, drafter, policy, strict=True)
        made = [runner.generate(prompt, max_new_tokens=48, temperature=1.0, seed=seed) for seed in range(3)]
        steps = [int(one.draft_length) for each in made for one in each.steps]
        lengths.append(np.mean([each.acceptance_length for each in made]))
        counted = policy.known()
        assert bool((counted.accepted <= counted.tested + 1e-9).all())
        assert counted.accepted[0, 1] > 0
        if policy.config.block_size:
            assert set(steps) == {16}
    chain = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:16", strict=True)
    alone = [chain.generate(prompt, max_new_tokens=48, temperature=1.0, seed=seed) for seed in range(3)]
    assert lengths[0] > np.mean([each.acceptance_length for each in alone])
