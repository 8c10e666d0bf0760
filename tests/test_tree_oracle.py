"""Oracles of trees: against every tree of every step; trees of so many nodes by rule; and what replay makes of them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bpkit.decode.clock import price
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.trees import closed
from bpkit.draft.best_first import best_first
from bpkit.draft.ngram import NgramDrafter
from bpkit.draft.static_trees import best_static
from bpkit.judge.evaluation import evaluate
from bpkit.judge.evaluation.page import html_report
from bpkit.judge.evaluation.tables import print_evaluation
from bpkit.policy import Policy, State
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import flat
from bpkit.trace.oracle import budgets
from bpkit.trace.oracle.paths import oracle_step_truncate
from bpkit.trace.oracle.regret import KINDS, tree_regret
from bpkit.trace.oracle.trees import along_paths, fewest_steps, reach, room, steps_taken, sum_taken
from bpkit.trace.records import CandidateTable, Ints, PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.types import (
    AUTOREGRESSIVE,
    BLOCK_DIFFUSION,
    Context,
    CostModel,
    DecoderSpec,
    Draft,
    Feature,
    Plan,
    Work,
    work_of,
)
from tests.test_tree_traces import COST as TREE_COST
from tests.test_tree_traces import TEXTS, SomeNodes, branching, options_of, same_steps

WORK = work_of(BLOCK_DIFFUSION)
TREE_SPEC = DecoderSpec("target", "drafter", BLOCK_DIFFUSION, 6, 18, hidden_size=8, vocab_size=64, branches=3)


def prompt_of(ranks: Ints, chances: object, sizes: tuple[int, ...], spare: int = 8) -> PromptTrace:
    """A prompt whose drafts have these candidates: ranks [rows, sizes, width], chances [..., branches] of each."""
    rows, _, width = ranks.shape
    drafted = np.array(sizes, np.int32) - 1
    inside = np.arange(width) < drafted[:, None]
    chance = np.where(inside[..., None], np.asarray(chances, np.float32), np.float32(np.nan))
    ranks = np.where(inside, ranks, -1).astype(np.int32)
    left = room(rows)
    places = np.arange(chance.shape[-1], dtype=np.int32)
    tokens = np.where(ranks[..., None] == places, 1, 2 + places).astype(np.int32)  # the output is of ones
    candidates = CandidateTable(tokens, chance, chance, ranks)
    stands = np.minimum(np.logical_and.accumulate(ranks == 0, axis=2).sum(axis=2), left[:, None])
    made = synthetic_prompt(
        0, output_length=rows + 1, max_new_tokens=rows + 1 + spare, block_sizes=sizes, prompt_length=3
    )
    features = {Feature.DRAFT_PROBABILITY: chance[..., 0], Feature.DRAFT_ENTROPY: 1 - chance[..., 0]}
    drafts = replace(
        made.drafts,
        num_accepted=stands.astype(np.int32),
        candidates=candidates,
        match_probability=None,
        features=features,
    )
    return replace(made, drafts=drafts)


def random_prompt(seed: int, rows: int, sizes: tuple[int, ...], branches: int, spare: int = 8) -> PromptTrace:
    rng = np.random.default_rng(seed)
    width = max(sizes) - 1
    ranks = rng.choice(branches + 1, (rows, len(sizes), width), p=[0.5, *[0.5 / branches] * branches])
    beyond = np.arange(width) > room(rows)[:, None]
    ranks[np.broadcast_to(beyond[:, None], ranks.shape)] = branches
    chances = -np.sort(-rng.dirichlet(np.ones(branches + 2), ranks.shape)[..., :branches], axis=-1)
    return prompt_of(ranks.astype(np.int32), chances, sizes, spare)


class Rising:
    """Prices that do not fall where more is verified, and are in no order otherwise."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.draft, self.catch_up = rng.uniform(0, 0.6, 20), rng.uniform(0, 0.5, 60)
        self.verify = np.cumsum(rng.uniform(0, 0.3, 40) * rng.integers(0, 2, 40)) + rng.uniform(0.3, 1)

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return 0.1 if phase == "rest" else float(getattr(self, phase)[size])


# The least time


def trees_of(width: int, branches: int) -> Iterator[tuple[list[int], list[int]]]:
    """Parents and ranks of every tree of candidates of a draft."""
    paths = [path for depth in range(width) for path in itertools.product(range(branches), repeat=depth + 1)]
    parents = [paths.index(path[:-1]) if len(path) > 1 else -1 for path in paths]
    for kept in itertools.product([False, True], repeat=len(paths)):
        nodes = closed(kept, parents)
        if len(nodes) == sum(kept):
            yield [nodes.index(parents[i]) if parents[i] >= 0 else -1 for i in nodes], [paths[i][-1] for i in nodes]


def stands(parents: list[int], ranks: list[int], right: list[int]) -> int:
    """Nodes of a tree on the path of the output."""
    at, depth = -1, 0
    for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
        if parent == at and depth < len(right) and rank == right[depth]:
            at, depth = node, depth + 1
    return depth


def exhaustive(prompt: PromptTrace, cost: CostModel) -> float:
    """Least seconds over every sequence of drafted sizes and verified trees, priced as the runtime prices them."""
    candidates, sizes = prompt.drafts.candidates, prompt.drafts.block_sizes.tolist()
    assert candidates is not None
    trees = {size: [*trees_of(size - 1, candidates.branches)] for size in sizes}

    @cache
    def least(position: int, drafted_at: int | None) -> float:
        if position == prompt.output_length:
            return 0.0
        at, left = prompt.prompt_length + position, prompt.output_length - position - 1

        def seconds(size: int, nodes: int) -> float:
            waits = 0 if size == 1 else (at - 1 if drafted_at is None else position - drafted_at)
            return price(cost, Work(0 if size == 1 else size, waits, nodes + 1, at)).total

        best = seconds(1, 0) + least(position + 1, drafted_at)
        for column, size in enumerate(sizes):
            right = candidates.ranks[position - 1, column, : size - 1].tolist()
            for parents, ranks in trees[size]:
                accepted = min(stands(parents, ranks, right), left)
                if len(parents) <= prompt.most_verified(position):
                    best = min(best, seconds(size, len(parents)) + least(position + accepted + 1, position))
        return best

    return least(1, None)


@pytest.mark.parametrize("seed", range(6))
def test_no_sequence_of_trees_takes_less_time(seed: int) -> None:
    prompt, cost = random_prompt(seed, 4, (2, 3), branches=2, spare=seed), Rising(seed)
    oracle = oracle_step_truncate(along_paths(prompt, TREE_SPEC.sources), WORK, cost)
    assert oracle.seconds == pytest.approx(exhaustive(prompt, cost))
    assert oracle.seconds <= oracle_step_truncate(prompt, WORK, cost).seconds + 1e-9


def test_trees_win_where_second_candidates_are_right() -> None:
    ranks = np.ones((9, 1, 3), np.int32)
    prompt = prompt_of(ranks, np.full((9, 1, 3, 2), 0.4), (4,))
    cost = Rising(0)
    chain, tree = (oracle_step_truncate(each, WORK, cost) for each in (prompt, along_paths(prompt, TREE_SPEC.sources)))
    assert chain.steps == 9
    assert tree.steps < 9
    assert (
        along_paths(prompt, TREE_SPEC.with_branches(1).sources).drafts.num_accepted.tolist()
        == prompt.drafts.num_accepted.tolist()
    )
    alone = synthetic_prompt(0)
    assert along_paths(alone, TREE_SPEC.sources).drafts is alone.drafts


def test_reach_ends_with_the_candidates_and_with_the_output() -> None:
    ranks = np.array([[[0, 2, 1]], [[1, 0, 0]], [[2, 0, 0]], [[0, 0, 0]]], np.int32)
    chances = np.zeros((4, 1, 3, 2), np.float32)
    candidates = CandidateTable(np.zeros(chances.shape, np.int32), chances, chances, ranks)
    assert reach(candidates, room(4), 2).tolist() == [[1], [2], [0], [0]]
    assert reach(candidates, room(4), 1).tolist() == [[1], [0], [0], [0]]


def test_trees_that_were_traced_as_such_cost_what_their_positions_do() -> None:
    made = synthetic_prompt(0, output_length=3, block_sizes=(3, 9))
    length = made.drafts.draft_length.copy()
    length[0] = 0  # nothing was found
    drafts = replace(made.drafts, draft_length=length, parents=np.full((2, 2, 8), -1, np.int32))
    shown = along_paths(replace(made, drafts=drafts), TREE_SPEC.sources).drafts
    assert shown.draft_length.tolist() == [[0, 0], [2, 5]], "of six positions one is the anchor"
    assert shown.num_accepted is drafts.num_accepted


# The fewest steps


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 9))
def test_fewest_steps_are_those_of_the_search(seed: int, rows: int) -> None:
    prompt = random_prompt(seed, rows, (2, 4), branches=3)
    drafts = along_paths(prompt, TREE_SPEC.sources).drafts

    class OneEach:
        def seconds(self, phase: str, size: int, context_length: int) -> float:
            return float(phase == "verify")

    oracle = oracle_step_truncate(along_paths(prompt, TREE_SPEC.sources), WORK, OneEach())
    assert fewest_steps(drafts.num_accepted.max(axis=1)) == oracle.steps

    def every(row: int) -> int:
        if row == rows:
            return 0
        return 1 + min(every(row + 1 + count) for count in range(drafts.num_accepted[row, 1] + 1))

    assert fewest_steps(drafts.num_accepted[:, 1]) == every(0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 12))
def test_steps_follow_from_what_is_accepted(seed: int, rows: int) -> None:
    table = random_prompt(seed, rows, (2, 3, 5), branches=2).drafts.num_accepted
    values = np.random.default_rng(seed).integers(0, 9, table.shape).astype(np.int32)
    wanted, sums = [], []
    for column in range(3):
        row, steps, total = 0, 0, 0
        while row < rows:
            total += int(values[row, column])
            row, steps = row + 1 + int(table[row, column]), steps + 1
        wanted.append(steps)
        sums.append(total)
    assert steps_taken(table).tolist() == wanted
    assert int(steps_taken(table[:, 0])) == wanted[0]
    assert sum_taken(table, values).tolist() == sums


# Trees of so many nodes


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), branches=st.integers(1, 3), nodes=st.integers(0, 14))
def test_places_say_what_trees_have_accepted(seed: int, branches: int, nodes: int) -> None:
    """Of each rule, by building each tree and walking down from the anchor."""
    prompt = random_prompt(seed, 7, (3, 5), branches=3)
    candidates, left = prompt.drafts.candidates, room(7)
    assert candidates is not None
    ranks = candidates.ranks[:, 1]
    static = best_static(np.random.default_rng(seed).dirichlet(np.ones(branches + 1), 4)[:, :branches], 14)
    places = {
        "chain": budgets.of_chains(ranks),
        "best_first": budgets.of_best_first(candidates, 1, 14, branches)[0],
        "static": budgets.of_static(static, ranks),
        "path": budgets.of_paths(ranks, branches),
    }
    found = {name: budgets.accepted(each, nodes, left).tolist() for name, each in places.items()}
    for row in range(7):
        right = ranks[row].tolist()
        grown = best_first(candidates.chances[row, 1, :, :branches].astype(float).tolist(), nodes)
        static_tree = (static.parents[:nodes].tolist(), static.ranks[:nodes].tolist())
        wanted = {
            "chain": stands(list(range(-1, min(nodes, 4) - 1)), [0] * min(nodes, 4), right),
            "best_first": stands([node.parent for node in grown], [node.rank for node in grown], right),
            "static": stands(*static_tree, right),
            "path": min(nodes, next((k for k, rank in enumerate(right) if rank >= branches), 4)),
        }
        for name, depth in wanted.items():
            assert found[name][row] == min(depth, int(left[row])), name
            assert found[name][row] <= found["path"][row]


def test_drafts_of_smaller_sizes_have_no_nodes_behind_them() -> None:
    prompt = random_prompt(3, 9, (3, 5), branches=2)
    candidates = prompt.drafts.candidates
    assert candidates is not None
    for places in (
        budgets.of_best_first(candidates, 0, 20, 2)[0],
        budgets.of_static(best_static(np.full((4, 2), 0.4), 20), candidates.ranks[:, 0]),
        budgets.of_paths(candidates.ranks[:, 0], 2),
        budgets.of_chains(candidates.ranks[:, 0]),
    ):
        assert (places[:, 2:] == budgets.NEVER).all()
        assert (places[:, :2] != budgets.NEVER).any()


def test_ranks_are_counted_where_the_path_before_stands() -> None:
    ranks = np.array([[0, 1, 0], [1, 2, 0], [2, 0, 0], [0, -1, -1]])
    chances = budgets.rank_chances(ranks, 2)
    assert chances.tolist() == [[0.5, 0.25], [0.0, 0.5], [1.0, 0.0]]
    assert budgets.rank_chances(ranks[2:3], 2).tolist() == [[0.0, 0.0]] * 3
    candidates = random_prompt(0, 3, (4,), branches=2).drafts.candidates
    assert candidates is not None
    known = budgets.known_ranks(candidates, 0, room(3))
    assert (known >= 0).tolist() == [[True, True, True], [True, True, False], [True, False, False]]


# Against replay


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replays_take_the_steps_that_places_say(pair: TinyPair, temperature: float) -> None:
    """Of the best-first tree and of a static one, which a policy asks for; of drafts of the trained size and below."""
    decoder = SpeculativeDecoder(pair.target, branching(pair, 3), "fixed:4", tokenizer=pair.tokenizer)
    trained = decoder.spec.trained_block_size
    options = options_of(temperature, range(2, trained + 1), 20)
    tracer = Tracer(decoder, options)
    tree = best_static(np.array([[0.5, 0.3, 0.1], [0.3, 0.3, 0.1], [0.2, 0.1, 0.0]]), 9)

    class Static(Policy):
        wants = frozenset()

        def select(self, state: State, context: Context) -> Plan:
            parents, ranks = (torch.from_numpy(values)[None] for values in (tree.parents, tree.ranks))
            return Plan(context.full(len(tree.ranks) + 1), context.full(0), parents, ranks)

    for index, text in enumerate(TEXTS):
        prompt = tracer.trace(index, Prompt(str(index), "tiny", text))
        candidates, left = prompt.drafts.candidates, room(prompt.drafts.rows)
        assert candidates is not None
        for size in (3, 12, 20):
            column = prompt.drafts.column(min(size, trained))
            places, _ = budgets.of_best_first(candidates, column, size - 1, 3)
            replayed = Replayer(decoder.spec, f"fixed:{size}", TREE_COST, seed=options.seed).run(prompt)
            assert steps_taken(budgets.accepted(places, size - 1, left)) == replayed.steps
            paths = budgets.of_paths(candidates.ranks[:, column], 3)
            assert fewest_steps(budgets.accepted(paths, size - 1, left)) <= replayed.steps
        column = prompt.drafts.column(2 + int(tree.depths.max()))
        places = budgets.of_static(tree, candidates.ranks[:, column])
        replayed = Replayer(decoder.spec, Static(), TREE_COST, seed=options.seed).run(prompt)
        assert steps_taken(budgets.accepted(places, 9, left)) == replayed.steps
        oracle = oracle_step_truncate(along_paths(prompt, decoder.spec.sources), WORK, TREE_COST)
        for policy in ("fixed:12", "tree", "sequoia", SomeNodes()):
            replayed = Replayer(decoder.spec, policy, TREE_COST, seed=options.seed).run(prompt)
            assert replayed.seconds(TREE_COST) > oracle.seconds


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replays_of_sequoia_are_the_live_decoder_step_for_step(pair: TinyPair, temperature: float) -> None:
    decoder = SpeculativeDecoder(pair.target, branching(pair, 3), "fixed:4", tokenizer=pair.tokenizer)
    options = options_of(temperature, range(2, decoder.spec.trained_block_size + 1), 20)
    tracer = Tracer(decoder, options)
    traces = [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(TEXTS)]
    for policy in ("sequoia", "sequoia:block_size=18"):
        same_steps(decoder, policy, traces, options)


# Where the time goes


class RandomTrees(Policy):
    """Random static trees, and random numbers of their nodes."""

    wants = frozenset()

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def select(self, state: State, context: Context) -> Plan:
        tree = best_static(self.rng.uniform(0.1, 0.4, (int(self.rng.integers(1, 6)), 3)), int(self.rng.integers(1, 18)))
        parents, ranks = (torch.from_numpy(values)[None] for values in (tree.parents, tree.ranks))
        return Plan(context.full(len(tree.ranks) + 1), context.full(0), parents, ranks)

    def truncate(self, state: State, draft: Draft) -> torch.Tensor:
        return draft.full(int(self.rng.integers(0, 18))).minimum(draft.draft_length)


def test_regret_sums_to_what_policies_on_trees_take_more_than_the_oracle() -> None:
    kinds = np.zeros(len(KINDS))
    for seed in range(4):
        prompt = random_prompt(seed, 30, (2, 3, 4, 5, 6), branches=3)
        shown = along_paths(prompt, TREE_SPEC.sources)
        known = oracle_step_truncate(shown, WORK, TREE_COST)
        for policy in ("fixed:1", "fixed:3", "fixed:16", "tree", "sequoia:slope=0.01", RandomTrees(seed)):
            taken = Replayer(TREE_SPEC, policy, TREE_COST).run(prompt)
            regret = tree_regret(shown, WORK, TREE_COST, known, taken)
            assert regret.shape == (taken.steps, len(KINDS))
            assert regret.min() >= -1e-12
            assert regret.sum() == pytest.approx(taken.seconds(TREE_COST) - known.seconds, abs=1e-12)
            kinds += regret.sum(axis=0)
        assert tree_regret(shown, WORK, TREE_COST, known, known).sum() == pytest.approx(0, abs=1e-12)
    assert bool((kinds > 0).all()), "they make every mistake"


def test_an_evaluation_of_trees_measures_gaps_up_to_the_best_nodes() -> None:
    prompts = [
        replace(random_prompt(seed, 30, (2, 3, 4, 5, 6), branches=3), index=seed, id=str(seed)) for seed in range(12)
    ]
    split = {prompt.id: ("train", "validation", "test")[i % 3] for i, prompt in enumerate(prompts)}
    policies, reports = {"fixed": "fixed:6", "sequoia": "sequoia", "tree": "tree"}, []
    for branches in (1, 3):
        spec = TREE_SPEC.with_branches(branches)
        reports.append(evaluate(prompts, spec, policies, [flat(TREE_COST)], split=split, permutations=0))
    chains, trees = (report["cost_models"]["flat"]["overall"] for report in reports)
    assert "tree" not in chains["oracle"]
    assert trees["oracle"]["step_truncate"] == chains["oracle"]["step_truncate"]
    rate = {name: entry["tokens_per_second"] for name, entry in trees["oracle"].items()}
    assert rate["tree"] > rate["step_truncate"]
    gap = rate["tree"] - trees["best_fixed"]["tokens_per_second"]
    assert trees["gap"]["tokens_per_second"] == pytest.approx(gap)
    for entry in trees["policies"].values():
        assert entry["tokens_per_second"] < rate["tree"]
        assert sum(entry["regret"].values()) == pytest.approx(1)
        assert entry["regret"]["oracle"] == pytest.approx(entry["tokens_per_second"] / rate["tree"], rel=0.01)
    assert "oracle.tree" in reports[1]["definitions"]
    assert "oracle.tree" not in reports[0]["definitions"]
    page, told = html_report(reports[1]), io.StringIO()
    print_evaluation(reports[1], Console(file=told, width=200))
    printed = told.getvalue()
    assert "oracle.tree (bound)" in printed
    assert "to oracle.tree" in printed
    assert "The bound of choosing size and nodes at every step" in page


def test_regret_is_left_out_where_drafters_have_read_unknown_nodes() -> None:
    prompts = [replace(random_prompt(seed, 12, (2, 3, 6), branches=3), index=seed, id=str(seed)) for seed in range(3)]
    split = {prompt.id: ("train", "validation", "test")[i] for i, prompt in enumerate(prompts)}
    spec = replace(TREE_SPEC, drafter_kind=AUTOREGRESSIVE, work=work_of(AUTOREGRESSIVE))
    report = evaluate(prompts, spec, {"fixed": "fixed:6"}, [flat(TREE_COST)], split=split, permutations=0)
    group = report["cost_models"]["flat"]["overall"]
    assert group["oracle"]["tree"]["tokens_per_second"] > group["policies"]["fixed"]["tokens_per_second"]
    assert "autoregressive drafter has read" in group["policies"]["fixed"]["regret"]["reason"]
    assert "autoregressive drafter has read" in group["best_fixed"]["regret"]["reason"]


def test_regret_of_store_trees_sums_alike(pair: TinyPair) -> None:
    """Trees that were traced node by node, one for each size; where nothing is found, nothing is drafted."""
    decoder = SpeculativeDecoder(pair.target, NgramDrafter(branches=3), "fixed:4", tokenizer=pair.tokenizer)
    tracer = Tracer(decoder, TraceOptions(tuple(range(2, 13)), 24, {"temperature": 1.0}, 5))
    for index, text in enumerate(("f(x) = 2 * x", "1, 2, 1, 2, 1, 3, 1, 2")):
        prompt = tracer.trace(index, Prompt(str(index), "tiny", text))
        shown = along_paths(prompt, decoder.spec.sources)
        known = oracle_step_truncate(shown, decoder.spec.work, TREE_COST)
        for policy in ("fixed:3", "fixed:12", "tree:block_size=12"):
            taken = Replayer(decoder.spec, policy, TREE_COST, seed=5).run(prompt)
            regret = tree_regret(shown, decoder.spec.work, TREE_COST, known, taken)
            assert regret.min() >= -1e-12
            assert regret.sum() == pytest.approx(taken.seconds(TREE_COST) - known.seconds, abs=1e-12)
