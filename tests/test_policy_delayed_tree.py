"""`delayed_tree`: its trees, labels against walks, what it learns, and files that decide as it does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpkit_trees.delayed_counts import accepted_of, seconds_left
from bpkit_trees.delayed_networks import SCALARS, AfterStep, TreePrices, TreeScores
from bpkit_trees.delayed_shapes import DelayedTree, delayed_trees
from bpkit_trees.delayed_training import DelayedTreeModule, DelayedTreeOptions, throughput_loss
from bpkit_trees.delayed_tree import VECTORS, DelayedTreeConfig, DelayedTreePolicy
from numpy.typing import NDArray

from bpkit.decode.clock import CostClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.trees import TreeShape
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.export.curves import CostCurves
from bpkit.learn import TrainedPolicy
from bpkit.policy import PolicyError
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.types import Context, DecoderSpec, Feature, Plan

TRAINED, BRANCHES = 8, 3
SIZES = (2, 3, 4, 6, 8)
COST = CostTable(
    draft={size: 0.2 + 0.02 * size for size in range(2, TRAINED + 1)},
    verify={width: {64: 1 + 0.02 * width, 640: 1 + 0.03 * width} for width in range(1, TRAINED * BRANCHES + 1)},
    rest=0.05,
)
FEATURES = frozenset({*VECTORS, Feature.ANCHOR_ENTROPY, Feature.ANCHOR_LOG_PROBABILITY, Feature.DRAFT_HIDDEN})


# Shapes


def test_every_tree_is_there_once() -> None:
    found = delayed_trees(4, 16)
    shapes = [TreeShape.delayed(*tree) for tree in found]
    assert len({(shape.parents, shape.ranks) for shape in shapes}) == len(found) == 17 + 3 * 9 * 8
    assert [(len(shape), shape.deepest) for shape in shapes] == [(tree.nodes, tree.deepest) for tree in found]
    every = {(k, trunk, length) for k in range(1, 5) for trunk in range(9) for length in range(9)}
    drawn = {(shape.parents, shape.ranks) for shape in (TreeShape.delayed(*sizes) for sizes in every)}
    assert drawn == {(shape.parents, shape.ranks) for shape in shapes}
    assert found[0] == (1, 0, 0)
    assert sorted(tree.nodes for tree in found) == [tree.nodes for tree in found]


def test_trees_are_those_that_a_drafter_has() -> None:
    assert all(tree.branches == 1 for tree in delayed_trees(1, 15))
    assert len(delayed_trees(1, 15)) == 16
    assert max(tree.deepest for tree in delayed_trees(3, 7)) == 7
    assert max(tree.branches for tree in delayed_trees(3, 7)) == 3


# Labels


def walked(own: NDArray[np.int32], shape: TreeShape, left: int) -> int:
    """Tokens of a tree that stand, node after node.

    Args:
        own: ranks of the output's own tokens, [width]. left: most that may stand.
    """
    node, depth = -1, 0
    while depth < min(left, len(own)):
        children = {rank: child for child, (parent, rank) in enumerate(zip(*_of(shape), strict=True)) if parent == node}
        if own[depth] not in children:
            break
        node, depth = children[own[depth]], depth + 1
    return depth


def _of(shape: TreeShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shape.parents, shape.ranks


def test_labels_are_what_walks_down_the_trees_count() -> None:
    random = np.random.default_rng(5)
    sizes, trees = [*range(2, 17)], delayed_trees(4, 15)
    ranks = random.choice(6, size=(40, len(sizes), 15), p=[0.7, 0.12, 0.08, 0.05, 0.03, 0.02]).astype(np.int32)
    ranks[ranks == 5] = 16  # none of them
    for column, size in enumerate(sizes):
        ranks[:, column, size - 1 :] = -1
    found = accepted_of(ranks, sizes, trees)
    for place, tree in enumerate(trees):
        shape = TreeShape.delayed(*tree)
        column = max(tree.deepest - 1, 0)
        by_hand = [walked(ranks[row, column, : tree.deepest], shape, 39 - row) for row in range(40)]
        assert found[:, place].tolist() == by_hand, tree
    assert len(np.unique(found)) > 12


# A tiny pair


def branching(pair: TinyPair, branches: int = BRANCHES) -> BlockDiffusionDrafter:
    return BlockDiffusionDrafter(pair.drafter_model, pair.target, branches=branches)


def decoder_of(pair: TinyPair, policy: Any, branches: int = BRANCHES) -> SpeculativeDecoder:
    return SpeculativeDecoder(
        pair.target,
        branching(pair, branches),
        policy,
        tokenizer=pair.tokenizer,
        clock=CostClock(COST),
        strict=True,
    )


@pytest.fixture(scope="module")
def traces(pair: TinyPair) -> list[PromptTrace]:
    tracer = Tracer(decoder_of(pair, "fixed:4"), TraceOptions(SIZES, 32, features=FEATURES))
    return [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(("abc abc ab", "x = y + 1", "1, 2"))]


def told(prompt: PromptTrace, seed: int) -> PromptTrace:
    """A trace in which the sign of a number in the target's hidden state says what will stand, and nothing else does.

    Where it is positive, the best candidates; else none but the second at the first position. It is the same in a third
    of the output, so that few steps look beyond it.
    """
    random, drafts = np.random.default_rng(seed), prompt.drafts
    assert drafts.candidates is not None
    rows = drafts.rows
    easy = np.repeat(random.permutation([True, False, seed % 2 == 0]), rows // 3 + 1)[:rows]
    ranks = np.where(easy[:, None, None], 0, np.where(np.arange(drafts.tokens.shape[2]) == 0, 1, BRANCHES))
    ranks = np.where(drafts.candidates.ranks < 0, -1, ranks).astype(np.int32)
    hidden = random.normal(size=prompt.features[Feature.LAST_HIDDEN].shape).astype(np.float32)
    hidden[:rows, 0] = np.where(easy, 3.0, -3.0)
    table = replace(drafts.candidates, ranks=ranks)
    return replace(
        prompt,
        drafts=replace(drafts, candidates=table),
        features={**prompt.features, Feature.LAST_HIDDEN: hidden},
    )


def trained(
    spec: DecoderSpec, traces: list[PromptTrace], turns: int, **options: Any
) -> tuple[DelayedTreeModule, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    policy = DelayedTreePolicy.untrained(DelayedTreeConfig(**options))
    module = DelayedTreeModule(policy, spec, COST, DelayedTreeOptions(dropout=0.0))
    examples = [module.examples(trace) for trace in traces]
    data = {name: torch.cat([e[name] for e in examples]) for name in examples[0]}
    module.prepare(data)
    module.on_train_start()
    optimizer = torch.optim.AdamW(module.networks.parameters(), lr=3e-3)
    for _ in range(turns):
        optimizer.zero_grad()
        module.loss(data).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    module.eval()
    return module, data


@pytest.mark.parametrize("last_draft", [True, False])
def test_it_learns_which_tree_a_feature_asks_for(pair: TinyPair, traces: list[PromptTrace], last_draft: bool) -> None:
    spec = decoder_of(pair, "fixed:4").spec
    made = [told(trace, seed) for seed, trace in enumerate(traces * 4)]
    module, data = trained(spec, made[:9], 30, last_draft=last_draft)
    policy, agree = module.finished(), list[bool]()
    assert isinstance(policy, DelayedTreePolicy)
    assert float(module.loss(data).detach()) < -0.1
    for trace in made[9:]:
        context = context_of(spec, trace)
        plan = policy.select(policy.begin(context), context)
        assert isinstance(plan, Plan)
        easy = (trace.features[Feature.LAST_HIDDEN][: trace.drafts.rows, 0] > 0).tolist()
        # What stands of easy ones is on the path of the best, of others the second candidate of the first position.
        for place, is_easy in zip(places_of(policy, plan), easy, strict=True):
            branches, trunk, length = policy.trees[place]
            agree.append(trunk == TRAINED - 1 if is_easy else (branches, trunk) == (2, 0) and length <= 2)
    assert np.mean(agree) > 0.85


def context_of(spec: DecoderSpec, trace: PromptTrace) -> Context:
    """All positions of a trace as rows."""
    rows = trace.drafts.rows
    position = torch.arange(1, rows + 1)
    features = {name: torch.from_numpy(value[:rows]) for name, value in trace.features.items() if len(value) > rows}
    return Context(spec, position, 100 - position, trace.prompt_length + position, torch.Generator(), features)


def places_of(policy: DelayedTreePolicy, plan: Plan) -> list[int]:
    """Which of the policy's trees each row is to draft; those of a plan are whole."""
    assert plan.parents is not None
    assert plan.ranks is not None
    shapes = {_of(TreeShape.delayed(*tree)): place for place, tree in enumerate(policy.trees)}
    rows = zip(plan.block_size.tolist(), plan.parents.tolist(), plan.ranks.tolist(), strict=True)
    return [shapes[tuple(parents[: size - 1]), tuple(ranks[: size - 1])] for size, parents, ranks in rows]


def finished(pair: TinyPair, traces: list[PromptTrace], **options: Any) -> DelayedTreePolicy:
    """A policy whose decisions differ from row to row."""
    module, _ = trained(decoder_of(pair, "fixed:4").spec, traces, 0, **options)
    network = module.networks["scores"]
    assert isinstance(network, TreeScores)
    with torch.no_grad():
        network.output.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    policy = module.finished()
    assert isinstance(policy, DelayedTreePolicy)
    return policy


@pytest.mark.parametrize("branches", [1, 2, BRANCHES])
def test_the_text_is_that_of_plain_decoding_and_replay_is_what_is_live(
    pair: TinyPair, traces: list[PromptTrace], branches: int
) -> None:
    policy = finished(pair, traces)
    live = decoder_of(pair, policy, branches)
    prompt = traces[1]
    for temperature in (0.0, 1.0):
        made = live.generate("x = y + 1", max_new_tokens=32, temperature=temperature, seed=3)
        plain = live.generate("x = y + 1", max_new_tokens=32, temperature=temperature, seed=3, policy="fixed:1")
        assert made.tokens.tolist() == plain.tokens.tolist()
    assert policy.branches == branches
    made = live.generate("x = y + 1", max_new_tokens=32, temperature=0.0)
    replayed = Replayer(live.spec, finished(pair, traces), COST, strict=True).run(prompt)
    steps = [(int(s.block_size), int(s.draft_length), int(s.num_accepted)) for s in made.steps]
    names = ("block_size", "draft_length", "num_accepted")
    assert steps == list(zip(*(getattr(replayed, name).tolist() for name in names), strict=True))
    assert len({size for size, *_ in steps}) > 1


def test_the_last_draft_is_what_the_drafter_knew_of_the_anchor(pair: TinyPair, traces: list[PromptTrace]) -> None:
    """What `observe` keeps after a step is what examples of training hold for a position."""
    policy = finished(pair, traces)
    policy.bind(spec := decoder_of(pair, "fixed:4").spec, COST)
    seen: list[tuple[int, torch.Tensor]] = []
    observe = policy.observe

    def watched(state: Any, step: Any) -> None:
        observe(state, step)
        seen.append((int(step.position[0]) + int(step.num_accepted[0]) + 1, state["last_draft"][0].clone()))

    policy.observe = watched  # type: ignore[method-assign]
    steps = Replayer(spec, policy, COST, strict=True).run(traces[0])
    drafts, known = traces[0].drafts, 0
    ends = zip(seen, steps.position, steps.num_accepted, steps.block_size, strict=True)
    for (position, last), begun, accepted, size in ends:
        assert position == begun + accepted + 1
        trees = [tree for tree in policy.trees if tree.nodes == size - 1]
        if last[-1]:
            found = []
            for tree in trees:
                column = drafts.column(tree.deepest + 1) if tree.nodes else 0
                hidden = torch.from_numpy(drafts.features[Feature.DRAFT_HIDDEN][begun - 1, column, accepted])
                wanted = torch.cat([policy.networks["drafter"](hidden), torch.tensor([1.0])])
                found.append(torch.allclose(wanted, last, atol=1e-5))
            assert any(found)
            known += 1
        else:
            assert not last.any()
            assert any(tree.deepest == accepted for tree in trees)
    assert known > 3


def test_what_is_not_known_of_the_last_draft_is_zero() -> None:
    kept = torch.arange(24.0).view(3, 2, 4) + 1
    accepted, drafted, depth = torch.tensor([1, 2, 1]), torch.tensor([3, 3, 1]), torch.tensor([2, 2, 2])
    found = AfterStep()(accepted, drafted, depth, kept)
    assert found.tolist() == [[5, 6, 7, 8, 1], [0] * 5, [0] * 5]


def test_a_network_that_says_nothing_drafts_the_best_static_tree(pair: TinyPair, traces: list[PromptTrace]) -> None:
    policy, spec = finished(pair, traces, last_draft=False), decoder_of(pair, "fixed:4").spec
    with torch.no_grad():
        for network in (policy.networks["scores"],):
            assert isinstance(network, TreeScores)
            network.output.weight.zero_()
            network.output.bias.zero_()
    silent = DelayedTreePolicy.trained(policy.config, policy.facts, policy.networks, spec)
    held = DelayedTreePolicy.trained(
        policy.config.model_copy(update={"margin": 1000.0}),
        policy.facts,
        finished(pair, traces, last_draft=False).networks,
        spec,
    )
    loud = finished(pair, traces, last_draft=False)
    for dear in (1.0, 20.0):
        cost = COST.model_copy(
            update={"verify": {width: 1 + 0.02 * dear * width for width in range(1, TRAINED * BRANCHES + 1)}}
        )
        seconds = [
            cost.seconds("verify", tree.nodes + 1, 64)
            + cost.rest
            + (cost.seconds("draft", tree.deepest + 1, 64) if tree.nodes else 0.0)
            for tree in map(DelayedTree._make, policy.facts["trees"])
        ]
        best = int(np.argmax(np.array(policy.facts["yields"]) / seconds))
        context = context_of(spec, traces[2])
        for one in (silent, held):
            one.bind(spec, cost)
            plan = one.select(one.begin(context), context)
            assert isinstance(plan, Plan)
            assert set(places_of(one, plan)) == {best}
        loud.bind(spec, cost)
        plan = loud.select({}, context)
        assert isinstance(plan, Plan)
        assert (len(set(places_of(loud, plan))) > 1) == (dear == 1.0), "it was trained for other costs"


# Files


def test_a_folder_decides_as_what_was_saved(pair: TinyPair, traces: list[PromptTrace], tmp_path: Path) -> None:
    policy, spec = finished(pair, traces), decoder_of(pair, "fixed:4").spec
    policy.save_pretrained(tmp_path / "policy")
    again = TrainedPolicy.from_pretrained(tmp_path / "policy")
    assert isinstance(again, DelayedTreePolicy)
    again.bind(spec, COST)
    policy.bind(spec, COST)
    context = context_of(spec, traces[0])
    plans = [one.select(one.begin(context), context) for one in (policy, again)]
    assert places_of(policy, plans[0]) == places_of(again, plans[1])  # type: ignore[arg-type]
    assert len(set(places_of(policy, plans[0]))) > 1  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("last_draft", [True, False])
def test_exported_files_decide_as_the_policy(
    pair: TinyPair, traces: list[PromptTrace], tmp_path: Path, last_draft: bool
) -> None:
    pytest.importorskip("onnxscript")
    from bpkit.export.policy import Onnx
    from bpkit.export.write import export_policy

    policy, spec = finished(pair, traces, last_draft=last_draft), decoder_of(pair, "fixed:4").spec
    told = export_policy(policy, traces, spec, tmp_path / "made", name="made", summary="For tests.", cost=COST)
    assert told.branches == BRANCHES
    assert sorted(told.networks) == (
        ["observe.onnx", "select.onnx", "truncate.onnx"] if last_draft else ["policy.onnx"]
    )
    assert all(found.agree == found.rows > 30 for found in told.validation.values())
    kinds = set()
    for text in ("abc abc ab", "1, 2, 3, 1, 2"):
        results = [
            decoder_of(pair, one).generate(text, max_new_tokens=24, temperature=0.0)
            for one in (finished(pair, traces, last_draft=last_draft), Onnx(path=str(tmp_path / "made")))
        ]
        paths = [
            [(int(s.block_size), s.path.tolist() if s.path is not None else None) for s in r.steps] for r in results
        ]
        assert paths[0] == paths[1]
        kinds |= {size for size, _ in paths[0]}
    assert len(kinds) > 1
    onnx = Onnx(path=str(tmp_path / "made"))
    with pytest.raises(PolicyError, match=r"trees of up to 3 branches, and drafts of this decoder have 2.*branches=3"):
        onnx.bind(replace(spec, branches=2), COST)


# What is refused


def test_traces_of_trees_that_the_drafter_chose_are_refused(pair: TinyPair, traces: list[PromptTrace]) -> None:
    module = DelayedTreeModule(
        DelayedTreePolicy.untrained(DelayedTreeConfig()), decoder_of(pair, "fixed:4").spec, COST, DelayedTreeOptions()
    )
    drafts = replace(traces[0].drafts, candidates=None, parents=traces[0].drafts.tokens)
    with pytest.raises(PolicyError, match=r"trees that its drafter chose.*block-diffusion:branches=4"):
        module.examples(replace(traces[0], drafts=drafts))


def test_of_a_trace_of_chains_it_learns_chains(pair: TinyPair, traces: list[PromptTrace]) -> None:
    chains = [replace(trace, drafts=replace(trace.drafts, candidates=None)) for trace in traces]
    module, data = trained(decoder_of(pair, "fixed:4").spec, chains, 0)
    trees = [DelayedTree(*sizes) for sizes in module.facts["trees"]]
    assert [tree.deepest + 1 for tree in trees] == [1, *SIZES]
    assert all(tree.branches == 1 for tree in trees)
    accepted = np.concatenate([trace.drafts.num_accepted for trace in chains])
    assert data["accepted"][:, 1:].tolist() == accepted.tolist()


def test_trees_are_those_that_are_traced_and_priced(pair: TinyPair, traces: list[PromptTrace]) -> None:
    short = COST.model_copy(update={"verify": dict.fromkeys(range(1, 10), 1.0)})
    spec = decoder_of(pair, "fixed:4").spec
    module = DelayedTreeModule(DelayedTreePolicy.untrained(DelayedTreeConfig()), spec, short, DelayedTreeOptions())
    module.prepare(module.examples(traces[0]))
    trees = [DelayedTree(*sizes) for sizes in module.facts["trees"]]
    assert {tree.deepest + 1 for tree in trees} == {1, *SIZES}
    assert max(tree.nodes for tree in trees) == 8
    wide = module.finished()
    assert isinstance(wide, DelayedTreePolicy)
    wide.bind(spec, COST.model_copy(update={"verify": {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}}))
    assert max(tree.nodes for tree in wide.trees) == 3


# The loss


def test_the_loss_is_the_time_of_the_same_tokens_and_a_penalty_on_the_worst() -> None:
    seconds = torch.tensor([[1.0, 2.0]] * 3)
    after = torch.tensor([[8.0, 6.0], [5.0, 5.0], [9.0, 4.0]])
    chances, static = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 1])
    # Of the three rows: until the tokens of the static tree are decided, beside the 2 seconds of that.
    ours = [0.5 * (1 + 8 - 6) + 0.5 * 2, 1 + 5 - 5, 2.0]
    more = [value / 2 - 1 for value in ours]
    assert more == [0.25, -0.5, 0.0]
    for weights in ([1.0, 1.0, 1.0], [0.5, 0.25, 2.0]):
        ratio = sum(w * own for w, own in zip(weights, ours, strict=True)) / (2 * sum(weights))
        both = (weights[0] * more[0] + weights[2] * more[2]) / (weights[0] + weights[2])
        for share, worst in ((1 / 3, more[0]), (2 / 3, both), (0.01, more[0])):
            loss = throughput_loss(
                chances, seconds, after, static, torch.tensor(weights), worst_share=share, worst_weight=0.5
            )
            assert float(loss) == pytest.approx(math.log(ratio) + 0.5 * worst, abs=1e-6)


def test_seconds_left_are_those_of_a_walk() -> None:
    random = np.random.default_rng(2)
    accepted = np.minimum(random.integers(0, 4, (12, 3)), np.arange(11, -1, -1)[:, None]).astype(np.int16)
    seconds = random.uniform(1, 2, (12, 3))
    found = seconds_left(accepted, seconds)
    assert found.shape == (13, 3)
    for place in range(3):
        for begin in range(13):
            row, total = begin, 0.0
            while row < 12:
                total += seconds[row, place]
                row += 1 + accepted[row, place]
            assert found[begin, place] == pytest.approx(total)


def test_prices_are_those_of_the_cost_model() -> None:
    trees = delayed_trees(3, 7)
    random = np.random.default_rng(1)
    yields = random.uniform(1, 4, len(trees)).tolist()
    prices = TreePrices(trees, yields)
    curves = CostCurves(COST, sorted({tree.nodes + 1 for tree in trees} - {1}), longest_draft=8)(100)
    static, seconds, latencies = (found[0] for found in prices.of(torch.tensor([prices.row(curves)])))
    by_hand = [
        (COST.seconds("draft", tree.deepest + 1, 128) if tree.nodes else 0.0)
        + COST.seconds("verify", tree.nodes + 1, 128)
        + COST.rest
        for tree in trees
    ]
    assert seconds.tolist() == pytest.approx(by_hand, rel=1e-5)
    best = int(np.argmax(np.array(yields) / by_hand))
    gains = [found / yields[best] - taken / by_hand[best] for found, taken in zip(yields, by_hand, strict=True)]
    assert static.tolist() == pytest.approx(gains, abs=1e-5)
    assert static.argmax() == best
    assert static[best] == 0
    plain = COST.seconds("verify", 1, 128) + COST.rest
    wide = COST.seconds("verify", 22, 128) - COST.seconds("verify", 1, 128)
    assert latencies.tolist() == pytest.approx([COST.seconds("draft", 8, 128) / plain, wide / plain], rel=1e-4)


def test_scalars_are_standardised_and_projected_numbers_are_not() -> None:
    network, x = TreeScores(10, 4), torch.randn(50, 10) * 3 + 1
    network.fit(x)
    made = network.standard(x)
    torch.testing.assert_close(made[:, :-SCALARS], x[:, :-SCALARS])
    torch.testing.assert_close(made[:, -SCALARS:].mean(dim=0), torch.zeros(SCALARS), atol=1e-5, rtol=0)
    static = torch.tensor([0.0, -0.2, -0.5, -1.0])
    network.begin_at(static, scale=0.1)
    for most in (1.0, 0.02):  # first scores differ by chance, and hardly when training begins
        scores = 0.1 * network(x) + static
        assert most / 50 < scores.abs().max() < most
        network.quieten(scale=0.1)
