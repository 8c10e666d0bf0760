"""Traces of drafts with branches, and their replay, which is the live decoder step for step."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bpkit.decode.clock import CostClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.trees import TreeShape
from bpkit.draft.best_first import best_first
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.judge.evaluation import evaluate
from bpkit.policy import Policy, State
from bpkit.prompts import Prompt, choose_prompts
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer, generation_options
from bpkit.trace.collect.drafts import ranks
from bpkit.trace.collect.job import describe, run_job
from bpkit.trace.cost import CostTable, flat
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.trace.store.joined import open_trace
from bpkit.trace.store.manifest import TraceError
from bpkit.types import Context, Draft, Feature, Plan, Step
from tests.test_server_replay import check as server_check

if TYPE_CHECKING:
    from tests.conftest import ShippedPair

COST = CostTable(
    draft={size: 0.001 + 0.0001 * size for size in range(2, 33)},
    catch_up={2: 1e-4, 8: 3e-4, 64: 1e-3},
    features=dict.fromkeys(range(2, 33), 0.0001),
    verify={width: {16: 0.005 + 0.0003 * width, 256: 0.006 + 0.0004 * width} for width in range(1, 70)},
    rest=2e-4,
)
TEXTS = ("f(x) = 2 * x", "abc abc abc abc ", "Q: 1+1?\nA:")
SAMPLED = {0.0: None, 1.0: 5}
"""Seeds of the noise, by temperature."""


class SomeNodes(Policy):
    """Random sizes and closed sets of nodes, by what it can see, so that live and replayed runs take the same."""

    wants = frozenset(
        {
            Feature.LAST_HIDDEN,
            Feature.DRAFT_TOKENS,
            Feature.DRAFT_PROBABILITY,
            Feature.DRAFT_ENTROPY,
            Feature.DRAFT_HIDDEN,
        }
    )

    def begin(self, context: Context) -> State:
        return {"paths": context.full(0)}

    def select(self, state: State, context: Context) -> Tensor:
        near = context["last_hidden"].double().mean(dim=1).abs().frac() + state["paths"].double() / 7
        size: Tensor = 1 + (near.frac() * context.spec.max_block_size).long()
        return size

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if draft.parents is None:
            return draft.draft_length
        assert draft.chances is not None
        kept = torch.ones(draft.parents.shape, dtype=torch.bool)
        for row, length in enumerate(draft.draft_length.tolist()):
            drawn = random.Random(int(draft[Feature.DRAFT_TOKENS][row, :length].sum()))
            sure = draft[Feature.DRAFT_PROBABILITY] * 9 - draft[Feature.DRAFT_ENTROPY]
            sure = sure + draft[Feature.DRAFT_HIDDEN].mean(dim=-1)
            for node, before in enumerate(draft.parents[row, :length].tolist()):
                stays = drawn.random() < 0.9 and float(draft.chances[row, node]) > 1e-6
                stays = stays and float(sure[row, node]) > -1.4
                kept[row, node] = stays and (before < 0 or bool(kept[row, before]))
        return kept

    def observe(self, state: State, step: Step) -> None:
        if step.path is not None:
            state["paths"] = state["paths"] + step.path.clamp(min=0).sum(dim=1)


class Shapes(SomeNodes):
    """The same nodes of trees that it asks for itself, every other time."""

    def select(self, state: State, context: Context) -> Any:
        shape = TreeShape.delayed(2 + int(state["paths"][0]) % 2, trunk=int(context.position[0]) % 3, length=2)
        if int(context.position[0]) % 2:
            return super().select(state, context)
        size = context.full(len(shape) + 1)
        return Plan(size, context.full(0), torch.tensor([shape.parents]), torch.tensor([shape.ranks]))


def branching(pair: TinyPair | ShippedPair, branches: int) -> BlockDiffusionDrafter:
    model = pair.drafter_model if isinstance(pair, TinyPair) else pair.drafter.model
    return BlockDiffusionDrafter(model, pair.target, branches=branches)


def options_of(temperature: float, sizes: range, new_tokens: int) -> TraceOptions:
    sampling = {"temperature": temperature}
    features = frozenset({Feature.LAST_HIDDEN, Feature.DRAFT_HIDDEN})
    return TraceOptions(tuple(sizes), new_tokens, sampling, SAMPLED[temperature], features)


def same_steps(decoder: SpeculativeDecoder, policy: Any, traces: list[PromptTrace], options: TraceOptions) -> int:
    """Run all prompts live and replayed, in order; returns how many steps accept others than the best candidates."""
    made = [policy() if isinstance(policy, type) else policy for _ in range(2)]
    live = SpeculativeDecoder(decoder.target, decoder.drafter, made[0], clock=CostClock(COST), strict=True)
    replayer = Replayer(live.spec, made[1], COST, seed=options.seed, strict=True)
    aside = 0
    for trace in traces:
        prompt = torch.tensor(trace.prompt_tokens).long()[None]
        result = live.run(prompt, stream_id=trace.index, **generation_options(options)).finish()
        replayed = replayer.run(trace)
        assert result.tokens[0].tolist() == trace.output_tokens.tolist()
        for name in ("block_size", "draft_length", "verify_length", "num_accepted"):
            assert getattr(replayed, name).tolist() == [int(getattr(step, name)) for step in result.steps], name
        assert replayed.seconds(COST) == pytest.approx(sum(step.seconds.total for step in result.steps), rel=1e-12)
        paths = [step.path[0].tolist() for step in result.steps if step.path is not None]
        aside += sum(path != list(range(len(path))) for path in paths)
    return aside


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_of_trees_is_the_live_decoder_step_for_step(pair: TinyPair, temperature: float) -> None:
    decoder = SpeculativeDecoder(pair.target, branching(pair, 3), "fixed:4", tokenizer=pair.tokenizer)
    options = options_of(temperature, range(2, decoder.spec.trained_block_size + 1), 20)
    tracer = Tracer(decoder, options)
    traces = [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(TEXTS)]
    for policy in ("fixed:3", "fixed:12", f"fixed:{decoder.spec.max_block_size}", "joint", "tree", SomeNodes, Shapes):
        same_steps(decoder, policy, traces, options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_server_of_trees_is_live_decoding_of_many_rows(pair: TinyPair, temperature: float) -> None:
    decoder = SpeculativeDecoder(pair.target, branching(pair, 3), "fixed:4", tokenizer=pair.tokenizer)
    options = options_of(temperature, range(2, decoder.spec.trained_block_size + 1), 12)
    tracer = Tracer(decoder, options)
    traces = [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(TEXTS)]
    for policy in ("fixed:8", "tree", "sequoia"):
        assert server_check(decoder, policy, traces, options, rows=2) > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_of_trees_on_the_shipped_pair(shipped: ShippedPair, temperature: float) -> None:
    decoder = SpeculativeDecoder(shipped.target, branching(shipped, 4), "fixed:6", tokenizer=shipped.tokenizer)
    options = options_of(temperature, range(2, 17), 32)
    tracer = Tracer(decoder, options)
    one_of_each_domain = list(enumerate(choose_prompts(None, [], 2)))[1::2]
    traces = [tracer.trace(i, prompt) for i, prompt in one_of_each_domain]
    for policy in ("fixed:16", "fixed:48", "tree", SomeNodes, Shapes):
        assert same_steps(decoder, policy, traces, options) > 0


def test_a_trace_with_candidates_is_one_of_chains_too(pair: TinyPair, tmp_path: Path) -> None:
    """What it says of chains is what a trace without branches says, and it comes back from disk whole."""
    prompts = [Prompt(str(i), "tiny", text) for i, text in enumerate(TEXTS)]
    opened = {}
    for branches in (1, 3):
        decoder = SpeculativeDecoder(pair.target, branching(pair, branches), "fixed:4", tokenizer=pair.tokenizer)
        options = TraceOptions((2, 4, decoder.spec.trained_block_size), 12, {"temperature": 1.0}, 3)
        folder = tmp_path / str(branches)
        run_job(folder, describe(decoder, prompts, options), prompts, Tracer(decoder, options))
        opened[branches] = open_trace(folder)
    chains, trees = opened[1], opened[3]
    assert trees.spec.branches == 3
    assert trees.spec.max_block_size == 3 * trees.spec.trained_block_size
    assert trees.spec.with_branches(1) == replace(chains.spec, drafter=trees.spec.drafter)
    for one, other in zip(chains, trees, strict=True):
        assert one.drafts.candidates is None
        for name in ("draft_length", "num_accepted", "tokens"):
            assert np.array_equal(getattr(one.drafts, name), getattr(other.drafts, name))
        found = other.drafts.candidates
        assert found is not None
        assert found.branches == 3
        drafted = other.drafts.tokens >= 0
        assert np.array_equal(found.tokens[..., 0], other.drafts.tokens)
        assert np.array_equal(found.ranks >= 0, drafted)
        assert np.array_equal(np.isnan(found.chances), ~drafted[..., None].repeat(3, axis=-1))
        assert (np.diff(found.chances[drafted], axis=-1) <= 0).all()
        leading = np.cumprod(found.ranks == 0, axis=-1).sum(axis=-1)
        left = other.output_length - 2 - np.arange(other.drafts.rows)
        assert np.array_equal(np.minimum(leading, left[:, None]), other.drafts.num_accepted)
    replayed = Replayer(trees.spec.with_branches(1), "fixed:4", COST, seed=3).run(trees[0])
    assert (
        replayed.num_accepted.tolist()
        == Replayer(chains.spec, "fixed:4", COST, seed=3).run(chains[0]).num_accepted.tolist()
    )


def test_policies_on_trees_are_judged_beside_chains(pair: TinyPair, tmp_path: Path) -> None:
    prompts = [Prompt(str(i), "tiny", text) for i, text in enumerate(TEXTS * 2)]
    decoder = SpeculativeDecoder(pair.target, branching(pair, 3), "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions((2, 4, decoder.spec.trained_block_size), 12)
    run_job(tmp_path / "trace", describe(decoder, prompts, options), prompts, Tracer(decoder, options))
    split = {prompt.id: ("train", "validation", "test")[i % 3] for i, prompt in enumerate(prompts)}
    found = {}
    for branches in (1, 2, None):
        opened = open_trace(tmp_path / "trace", branches)
        policies = {"fixed:4": "fixed:4", "fixed:8": "fixed:8"}
        found[branches] = evaluate(opened, opened.spec, policies, [flat(COST)], split=split, permutations=0)
    groups = {branches: one["cost_models"]["flat"]["overall"] for branches, one in found.items()}
    assert [one["settings"].get("branches") for one in found.values()] == [None, 2, 3]
    assert groups[1]["best_fixed"] == groups[2]["best_fixed"] == groups[None]["best_fixed"]
    lengths = [groups[branches]["policies"]["fixed:8"]["acceptance_length"]["value"] for branches in (1, 2, None)]
    assert lengths == sorted(lengths)
    assert any("trees of up to 3 branches" in note for note in found[None]["notes"])
    with pytest.raises(TraceError, match="cannot be read with 4 branches: its drafts have 3"):
        open_trace(tmp_path / "trace", 4)


def test_ranks_are_of_the_output() -> None:
    candidates = torch.tensor([[[[1, 2], [3, 4]]], [[[4, 1], [-1, -1]]]])
    assert ranks(candidates, torch.tensor([9, 2, 5])).tolist() == [[[1, 2]], [[2, -1]]]


def test_a_step_costs_what_its_block_costs(pair: TinyPair) -> None:
    """The pass of a tree of more nodes than the trained block has positions is the pass of that block."""
    decoder = SpeculativeDecoder(pair.target, branching(pair, 3), "fixed:4", tokenizer=pair.tokenizer)
    trained = decoder.spec.trained_block_size
    assert decoder.spec.sources[0].draft_size(3 * trained) == trained
    trace = Tracer(decoder, options_of(0.0, range(2, trained + 1), 12)).trace(0, Prompt("a", "tiny", TEXTS[0]))
    replayed = Replayer(decoder.spec, f"fixed:{2 * trained}", COST).run(trace)
    assert {work.draft_size for work in replayed.work} == {trained}
    assert int(replayed.draft_length[0]) == 2 * trained - 1
    found = trace.drafts.candidates
    assert found is not None
    column = trace.drafts.column(trained)
    nodes = best_first(found.chances[0, column].tolist(), 2 * trained - 1)
    depth = 0
    paths: dict[int, int] = {-1: 0}
    for place, node in enumerate(nodes):
        if node.parent in paths and found.ranks[0, column, node.position] == node.rank:
            paths[place] = node.position + 1
            depth = max(depth, node.position + 1)
    assert replayed.num_accepted[0] == min(depth, trace.output_length - 2)


def test_sizes_and_branches_that_no_trace_holds(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, branching(pair, 17), "fixed:4", tokenizer=pair.tokenizer)
    with pytest.raises(ValueError, match="17 branches, and a trace holds at most 16 candidates of a position"):
        Tracer(decoder, options_of(0.0, range(2, 5), 8))
    decoder = SpeculativeDecoder(pair.target, branching(pair, 2), "fixed:4", tokenizer=pair.tokenizer)
    trained = decoder.spec.trained_block_size
    with pytest.raises(ValueError, match=rf"block sizes to trace are 2 .. {trained} with this drafter"):
        Tracer(decoder, options_of(0.0, range(2, trained + 2), 8))
