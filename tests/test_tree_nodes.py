"""Traces of trees that are kept node by node: of stores, and of drafters that are known by their protocol alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import Drafter, GoOn, Proposal
from bpkit.decode.parts import new_layer
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.config import HierarchyConfig
from bpkit.draft.early_exit import EarlyExitDrafter
from bpkit.draft.hierarchy import HierarchyDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.draft.stores.files import open_store
from bpkit.policy import Policy, State
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.testing.models import EXIT_LAYER
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.collect.drafts import nodes_accepted, num_accepted
from bpkit.trace.collect.job import describe, run_job
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.trace.store.joined import open_trace
from bpkit.trace.store.manifest import TraceError
from bpkit.types import Context, Draft, DraftWork, Feature, Plan
from tests.test_tree_traces import COST, SAMPLED, Shapes, SomeNodes, same_steps
from tests.test_trees import SecondRight, SecondRightSession
from tests.tiny_store import tiny_store

TEXTS = ("1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, ", "abcabdabcabe ab", "Q: 1+1?\nA:")


class PairsOfSiblings(SecondRight):
    """Trees with scores and hidden states, that say what they cost."""

    work = DraftWork("nothing", "one")

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.max_block_size = 9

    def begin(self, text: RunningText) -> PairsSession:
        return PairsSession(self, text)


class PairsSession(SecondRightSession):
    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        made = super().draft(block_size, draw, go_on)
        counts = [min(count, size - 1) for count, size in zip(made.counts, block_size, strict=True)]
        own = {name: getattr(made, name)[:, : max(counts)] for name in ("tokens", "parents", "chances", "places")}
        positions = [min(size, self.drafter.trained_block_size) for size in block_size]
        return replace(made, read=0, counts=counts, positions=positions, **own)


class StoreNodes(Policy):
    """Random sizes, sources and closed sets of nodes, by what it can see of stores."""

    wants = frozenset({Feature.DRAFT_TOKENS, Feature.SOURCE_OFFER, Feature.SOURCE_SHARE})

    def select(self, state: State, context: Context) -> Any:
        drawn = random.Random(f"{context.position.tolist()} {context['source_share'].tolist()}")
        size = 1 + (int(context["source_offer"].sum()) + drawn.randrange(99)) % context.spec.max_block_size
        return Plan(context.full(size), context.full(drawn.randrange(len(context.spec.sources))))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if draft.parents is None:
            return draft.draft_length
        kept = torch.zeros(draft.parents.shape, dtype=torch.bool)
        for row, length in enumerate(draft.draft_length.tolist()):
            drawn = random.Random(int(draft[Feature.DRAFT_TOKENS][row, :length].sum()))
            for node, before in enumerate(draft.parents[row, :length].tolist()):
                kept[row, node] = drawn.random() < 0.9 and (before < 0 or bool(kept[row, before]))
        return kept


@pytest.fixture(scope="module")
def drafters(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drafter]:
    store = open_store(tiny_store(tmp_path_factory.mktemp("store"), pair, TEXTS))
    return {
        "n-gram": NgramDrafter(branches=3, max_ngram=2, block_size=6),
        "hierarchy": HierarchyDrafter(store, HierarchyConfig(branches=3)),
        "pairs": PairsOfSiblings(pair.target),
        "level by level": AutoregressiveDrafter(pair.target, pair.target, block_size=5, branches=2),
        "assistant": AutoregressiveDrafter(pair.assistant, pair.target, branches=3),
        "exit": EarlyExitDrafter(new_layer(pair.target, -1), pair.target, layer=EXIT_LAYER, branches=3),
    }


def traced(decoder: SpeculativeDecoder, temperature: float, **more: Any) -> tuple[list[PromptTrace], TraceOptions]:
    sampling, sizes = {"temperature": temperature}, tuple(range(2, decoder.spec.max_block_size + 1))
    options = TraceOptions(sizes, 16, sampling, SAMPLED[temperature], frozenset(more.get("features", ())))
    tracer = Tracer(decoder, options)
    return [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(TEXTS)], options


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["n-gram", "hierarchy"])
def test_replay_of_stores_is_the_live_decoder(
    pair: TinyPair, drafters: dict[str, Drafter], name: str, temperature: float
) -> None:
    decoder = SpeculativeDecoder(pair.target, drafters[name], "fixed:4", tokenizer=pair.tokenizer)
    traces, options = traced(decoder, temperature)
    aside = 0
    for policy in ("fixed:3", "fixed:12", f"fixed:{decoder.spec.max_block_size}", "tree", "portfolio", StoreNodes):
        aside += same_steps(decoder, policy, traces, options)
    assert aside > 0 or name == "n-gram"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_of_other_trees_is_the_live_decoder(
    pair: TinyPair, drafters: dict[str, Drafter], temperature: float
) -> None:
    """With the features of their nodes."""
    decoder = SpeculativeDecoder(pair.target, drafters["pairs"], "fixed:4", tokenizer=pair.tokenizer)
    traces, options = traced(decoder, temperature, features=[Feature.LAST_HIDDEN, Feature.DRAFT_HIDDEN])
    policies: tuple[Any, ...] = ("fixed:3", "joint", "tree", SomeNodes)
    assert sum(same_steps(decoder, policy, traces, options) for policy in policies) > 9
    for trace in traces:
        assert trace.drafts.match_probability is None, "the target's distribution after other tokens is not known"
        assert np.array_equal(np.isnan(trace.drafts.features[Feature.DRAFT_ENTROPY]), trace.drafts.tokens < 0)
    with pytest.raises(TraceError, match="its traces hold those that it chooses itself"):
        Replayer(decoder.spec, Shapes(), COST, seed=options.seed, strict=True).run(traces[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["level by level", "assistant", "exit"])
def test_replay_of_trees_that_grow_level_by_level_is_the_live_decoder(
    pair: TinyPair, drafters: dict[str, Drafter], name: str, temperature: float
) -> None:
    """With what waits for the drafter: it has read some of the nodes that stand, and not others."""
    decoder = SpeculativeDecoder(pair.target, drafters[name], "fixed:4", tokenizer=pair.tokenizer)
    traces, options = traced(decoder, temperature, features=[Feature.LAST_HIDDEN, Feature.DRAFT_HIDDEN])
    policies: tuple[Any, ...] = ("fixed:4", "fixed:14", "tree", SomeNodes)
    aside = sum(same_steps(decoder, policy, traces, options) for policy in policies)
    assert aside > 0 or name != "level by level"


def test_drafters_that_have_read_nobody_knows_what_are_refused(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, SecondRight(pair.target), "fixed:4", tokenizer=pair.tokenizer)
    with pytest.raises(ValueError, match="of a SecondRight it is not known which nodes it has read"):
        Tracer(decoder, TraceOptions((2, 3), 8))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_of_a_store_beside_blocks_of_a_model(
    pair: TinyPair, drafters: dict[str, Drafter], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_tree_traces.COST", COST.with_sources([COST, COST]))
    several = [pair.block_diffusion(), drafters["n-gram"], drafters["hierarchy"]]
    alone = [SpeculativeDecoder(pair.target, drafter, "fixed:4", tokenizer=pair.tokenizer) for drafter in several]
    made = [traced(decoder, temperature) for decoder in alone]
    prompts = [
        replace(first, others=tuple(other.drafts for other in others))
        for first, *others in zip(*(traces for traces, _ in made), strict=True)
    ]
    decoder = SpeculativeDecoder(pair.target, several, "fixed:4", tokenizer=pair.tokenizer)
    for policy in ("portfolio", "fixed:9,source=1", StoreNodes):
        same_steps(decoder, policy, prompts, made[0][1])


@pytest.mark.parametrize("name", ["n-gram", "hierarchy", "assistant"])
def test_smaller_trees_are_the_beginning_of_larger_ones(
    pair: TinyPair, drafters: dict[str, Drafter], name: str
) -> None:
    """And each is what the drafter drafts when it is asked for that size alone."""
    decoder = SpeculativeDecoder(pair.target, drafters[name], "fixed:4", tokenizer=pair.tokenizer)
    traces, options = traced(decoder, 0.0)
    for column in (0, 8):
        size = options.block_sizes[column]
        own = Tracer(decoder, replace(options, block_sizes=(size,)))
        for i, trace in enumerate(traces[:2]):
            alone, all_sizes = own.trace(i, Prompt(str(i), "tiny", TEXTS[i])).drafts, trace.drafts
            assert all_sizes.parents is not None
            assert alone.parents is not None
            assert np.array_equal(alone.parents[:, 0], all_sizes.parents[:, column, : size - 1])
            assert np.array_equal(alone.tokens[:, 0], all_sizes.tokens[:, column, : size - 1])
            assert np.array_equal(alone.num_accepted[:, 0], all_sizes.num_accepted[:, column])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_how_deep_a_tree_stands(data: st.DataObject) -> None:
    output = data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=7))
    rows, nodes = len(output) - 1, data.draw(st.integers(1, 8))
    tokens, parents = torch.full((2, rows, 1, nodes), -1)
    expected = []
    for row in range(rows):
        paths: list[tuple[int, ...]] = [()]
        for node in range(data.draw(st.integers(0, nodes))):
            parent, token = data.draw(st.integers(-1, node - 1)), data.draw(st.integers(0, 2))
            tokens[row, 0, node], parents[row, 0, node] = token, parent
            paths.append((*paths[parent + 1], token))
        right = output[row + 1 :]
        deepest = max(len(path) for path in paths if tuple(right[: len(path)]) == path)
        expected.append([min(deepest, len(right) - 1)])
    assert nodes_accepted(tokens, parents, torch.tensor(output)).tolist() == expected


def test_a_chain_is_a_tree() -> None:
    drawn = random.Random(3)
    output = torch.tensor([drawn.randrange(2) for _ in range(30)])
    tokens = torch.tensor([[[drawn.randrange(2) for _ in range(5)]] * 2 for _ in range(29)])
    parents = torch.arange(-1, 4).expand_as(tokens)
    assert nodes_accepted(tokens, parents, output).equal(num_accepted(tokens, output))


def test_nodes_come_back_from_disk(pair: TinyPair, drafters: dict[str, Drafter], tmp_path: Path) -> None:
    prompts = [Prompt(str(i), "tiny", text) for i, text in enumerate((*TEXTS, "x"))]
    decoder = SpeculativeDecoder(pair.target, drafters["n-gram"], "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions((2, 5, 9, 32), 12)
    tracer = Tracer(decoder, options)
    run_job(tmp_path / "trace", describe(decoder, prompts, options), prompts, tracer)
    opened = open_trace(tmp_path / "trace")
    assert (opened.spec.branches, opened.spec.trained_block_size, opened.spec.max_block_size) == (3, 6, 32)
    for place, prompt in enumerate(prompts):
        made, read = tracer.trace(place, prompt).drafts, opened[place].drafts
        for name in ("tokens", "parents", "chances", "num_accepted", "draft_length", "match_length", "match_share"):
            width = int(made.draft_length.max(initial=0)) if getattr(made, name).ndim == 3 else None
            wanted = getattr(made, name)
            assert np.array_equal(getattr(read, name)[..., :width], wanted[..., :width], equal_nan=name == "chances"), (
                name
            )
    with pytest.raises(TraceError, match="cannot be read with 2 branches"):
        open_trace(tmp_path / "trace", 2)
