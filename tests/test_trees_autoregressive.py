"""Trees of autoregressive drafters: level by level in a few passes, what each path gives that is read alone."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from bpkit import Context, Draft, Feature, Plan, Policy, SpeculativeDecoder, Step
from bpkit.decode import loop
from bpkit.decode.drafter import Drafter
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.decode.rows import Rows
from bpkit.decode.sampling import SOFTENING, Draw, Processors, Sampler, Samplers
from bpkit.decode.slot_target import SlotTarget
from bpkit.decode.text import RowText, RunningText
from bpkit.decode.trees import Level, TreeShape
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession, LevelWiseSession
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.early_exit import EarlyExitDrafter
from bpkit.draft.ensemble import EnsembleDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import State
from bpkit.testing import TinyPair
from bpkit.testing.simulated_device import SimulatedDevice
from tests.test_lossless import MORE_SAMPLINGS, SAMPLINGS, Outputs, Sampling, name_of_sampling
from tests.test_processors import Grammar, plain
from tests.test_rows import PROMPTS, limit_of
from tests.test_sessions import Reader, at
from tests.test_trees_shapes import Fixed, plan_of, random_shape
from tests.tiny_architectures import WINDOW, disturbed, repeating_causal_lm, tiny_causal_lm

if TYPE_CHECKING:
    from tests.conftest import PlainDecoding, ShippedPair

SEED, BRANCHES = 20, 3


@pytest.fixture(scope="module")
def outputs(pair: TinyPair, plain: PlainDecoding) -> Outputs:
    return Outputs(plain, pair.target)


def branching(pair: TinyPair, branches: int = BRANCHES, **options: Any) -> AutoregressiveDrafter:
    return AutoregressiveDrafter(pair.assistant, pair.target, branches=branches, **options)


# Levels in passes of their own


class LevelReader(Reader):
    """A reader that also reads random trees, level by level, of which a random path stands."""

    def grow(self) -> None:
        rows = range(len(self.texts))
        anchors = torch.tensor([[self.token()] for _ in rows])
        output = self.session.verify(anchors, [1] * len(rows))
        tokens, parents = [[int(token)] for token in anchors], [[-1] for _ in rows]
        found = [[at(output, row, 0, prompt=False)] for row in rows]
        newest, depths = [[0] for _ in rows], [[0] for _ in rows]
        levels = [self.random.randrange(5) for _ in rows]
        for depth in range(1, max(levels) + 1):
            counts = [self.random.randrange(1, 4) if depth <= levels[row] else 0 for row in rows]
            first = [len(own) for own in tokens]
            for row, count in enumerate(counts):
                before = [self.random.choice(newest[row]) for _ in range(count)]
                newest[row] = list(range(first[row], first[row] + count))
                parents[row] += before
                tokens[row] += [self.token() for _ in range(count)]
                depths[row] += [depth] * count
            fed = torch.tensor(
                [[*own[start:], *[1] * 4][: max(counts)] for own, start in zip(tokens, first, strict=True)]
            )
            columns = max(map(len, tokens))
            above = torch.zeros((len(rows), max(counts), columns), dtype=torch.bool)
            above[..., 0] = True
            for row, count in enumerate(counts):
                for column in range(count):
                    above[row, column, self.path(parents[row], first[row] + column)] = True
            known = torch.tensor([[*own, *[0] * (columns - len(own))] for own in depths])
            output = self.session.verify_trees(fed, Level(counts, first, known, above, depth))
            for row, count in enumerate(counts):
                found[row] += [at(output, row, column, prompt=False) for column in range(count)]
        stands = [self.path(own, self.random.randrange(len(own))) for own in parents]
        for row, path in enumerate(stands):
            self.texts[row] += [tokens[row][column] for column in path]
            self.found[row] += [found[row][column] for column in path]
        self.session.accept([len(own) for own in tokens], stands)
        assert self.session.held == [len(text) for text in self.texts]

    @staticmethod
    def path(parents: Sequence[int], column: int) -> list[int]:
        """Columns from the anchor to this one."""
        path = [column]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        return path


@pytest.mark.parametrize("attention", ["own", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss"])
def test_levels_give_what_their_paths_give(kind: str, attention: str) -> None:
    """Windows of 8 that paths and texts cross, soft caps, tables of positions, latent attention, sinks."""
    model = tiny_causal_lm(kind)
    if attention != "own":
        model.set_attn_implementation(attention)
    reader = LevelReader(model, feature_layers=(0, 1))
    with torch.inference_mode():
        reader.begin([1, 3 * WINDOW, 6], slots=4, capacity=200)
        for turn in range(12):
            reader.grow() if turn % 4 else reader.step()
        reader.keep([2, 0])
        reader.grow()
        reader.read([2, 1])
    assert max(map(len, reader.texts)) > 3 * WINDOW
    reader.check()


def test_levels_end_where_the_positions_do() -> None:
    """Rows that have no place in a level have none at a position that there is not, either."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    session = SlotTarget(model, rows=2, slots=2, capacity=40, feature_layers=(), keep_hidden=False)
    with torch.inference_mode():
        session.prefill(torch.ones((2, 16), dtype=torch.long), [16, 4], last=False)
        above = torch.tensor([[[True, False]], [[True, True]]])
        depth = torch.tensor([[0, 0], [0, 1]])
        made = session.verify_trees(torch.tensor([[1], [1]]), Level([0, 1], [1, 1], depth, above, 1))
        wanted = model(torch.ones((1, 5), dtype=torch.long)).logits[0, -1]
    assert torch.allclose(made.logits[1, 0], wanted, atol=1e-5)


# The tree is what EAGLE-2 says, each path read alone


class Watching(Policy):
    wants = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})

    def __init__(self, sizes: Sequence[int] = (9,), shapes: Sequence[TreeShape] = ()) -> None:
        super().__init__()
        self.sizes, self.shapes, self.turn = sizes, shapes, 0
        self.drafts: list[Draft] = []

    def select(self, state: State, context: Context) -> Any:
        self.turn += 1
        each = [self.turn + number for number in context.row_ids]
        if self.shapes:
            return plan_of(context, [self.shapes[place % len(self.shapes)] for place in each])
        return torch.tensor([self.sizes[place % len(self.sizes)] for place in each])

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if draft.parents is not None:
            self.drafts.append(draft)
        return draft.draft_length


class Slow:
    """What comes after a path, by a pass over all of it."""

    def __init__(self, model: PreTrainedModel, prefix: Tensor, position: int, sampling: Sampling, stream: int) -> None:
        self.model, self.prefix, self.position, self.sampling, self.stream = model, prefix, position, sampling, stream
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def after(self, path: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Chances of all tokens, processed scores, each [vocab], and the last hidden state."""
        if path not in self.known:
            ids = torch.cat([self.prefix, torch.tensor([path], dtype=torch.long)], dim=1)
            whole = self.model(ids, use_cache=False, output_hidden_states=True)
            scores = LogitsProcessorList(self.sampling.processors)(ids, whole.logits[:, -1].float())[0]
            noisy = scores
            if self.sampling.seed is not None:
                noise = GumbelNoise(SEED, self.stream, len(scores), scores.device)
                noise.forget_before(self.position + len(path))
                noisy = (scores + noise.at(self.position + len(path), 1)[0]) / SOFTENING
            self.known[path] = noisy.softmax(dim=-1), scores, whole.hidden_states[-1][0, -1]
        return self.known[path]

    def product(self, path: tuple[int, ...]) -> float:
        """Of the chances along a path."""
        value = 1.0
        for place, token in enumerate(path):
            value *= float(self.after(path[:place])[0][token])
        return value

    def best(self, branches: int, levels: int) -> list[tuple[int, ...]]:
        """All candidates of the tree, the best first."""
        expanded: list[tuple[int, ...]] = [()]
        came_up = []
        for _ in range(levels):
            level = [(*path, int(token)) for path in expanded for token in self.after(path)[0].topk(branches).indices]
            level = sorted((path for path in level if self.product(path) > 0), key=lambda path: -self.product(path))
            came_up += level
            expanded = level[:branches]
        return sorted(came_up, key=lambda path: -self.product(path))


def paths_of(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """Of a drafted tree the tokens from the anchor to each node."""
    assert draft.parents is not None
    paths: list[tuple[int, ...]] = [()]
    nodes = zip(draft.parents[row].tolist(), draft.tokens[row].tolist(), strict=True)
    for parent, token in list(nodes)[: int(draft.draft_length[row])]:
        paths.append((*paths[parent + 1], token))
    return paths[1:]


def check_features(draft: Draft, row: int, slow: Slow) -> None:
    """Chances and features are those of the token after its path."""
    assert draft.chances is not None
    for node, path in enumerate(paths_of(draft, row)):
        chances, scores, hidden = slow.after(path[:-1])
        probability = scores.softmax(dim=-1)
        entropy = -(probability * probability.clamp(min=1e-30).log()).sum()
        assert float(draft.chances[row, node]) == pytest.approx(float(chances[path[-1]]), rel=1e-3, abs=1e-6)
        found = float(draft[Feature.DRAFT_PROBABILITY][row, node])
        assert found == pytest.approx(float(probability[path[-1]]), rel=1e-3, abs=1e-6)
        assert float(draft[Feature.DRAFT_ENTROPY][row, node]) == pytest.approx(float(entropy), rel=1e-3, abs=1e-5)
        assert torch.allclose(draft[Feature.DRAFT_HIDDEN][row, node], hidden, atol=2e-4)


def drafts_of(
    model: PreTrainedModel, decoder: SpeculativeDecoder, policy: Watching, prompts: list[Tensor], sampling: Sampling
) -> list[tuple[Draft, int, Slow]]:
    """Every draft that is made of these prompts, row by row, with the slow way to it."""
    rows = [{"prompt": ids, "stream_id": i} for i, ids in enumerate(prompts)]
    made = decoder.generate(rows, max_new_tokens=14, seed=SEED, eos_token_id=None, **sampling.options)
    texts = [one.sequences for one in made]
    first = min(policy.drafts[0].context.row_ids)
    return [
        (
            draft,
            row,
            Slow(model, texts[number - first][:, :length], int(draft.context.position[row]), sampling, number - first),
        )
        for draft in policy.drafts
        for row, (number, length) in enumerate(
            zip(draft.context.row_ids, draft.context.context_length.tolist(), strict=True)
        )
        if int(draft.draft_length[row])
    ]


@pytest.mark.parametrize("sampling", [*SAMPLINGS, MORE_SAMPLINGS[2]], ids=name_of_sampling)
@torch.no_grad()
def test_trees_are_what_reading_each_path_gives(pair: TinyPair, sampling: Sampling) -> None:
    """Three rows of different texts and sizes, whose accepted paths were moved in the cache before."""
    policy = Watching((9, 14, 4, 1))
    decoder = SpeculativeDecoder(pair.target, branching(pair), policy, tokenizer=pair.tokenizer, strict=True)
    prompts = [pair.ids(prompt) for prompt in PROMPTS[3:6]]
    made, stood = drafts_of(pair.assistant, decoder, policy, prompts, sampling), 0
    for draft, row, slow in made:
        size, paths = int(draft.block_size[row]), paths_of(draft, row)
        wanted = slow.best(BRANCHES, min(5, size - 1))[: size - 1]
        assert len(set(paths)) == len(paths) == len(wanted)
        assert [slow.product(path) for path in paths] == pytest.approx(
            [slow.product(path) for path in wanted], rel=1e-2
        )
        assert set(paths) == set(wanted)
        check_features(draft, row, slow)
        stood += int(draft.draft_length[row]) > 0
    assert stood > 8


@pytest.mark.parametrize("kind", ["gemma2", "mistral", "gpt2"])
@torch.no_grad()
def test_trees_of_other_architectures(kind: str) -> None:
    """Texts longer than the window."""
    target = repeating_causal_lm(kind) if kind != "gpt2" else tiny_causal_lm(kind)
    model, policy = disturbed(target), Watching((12, 7))
    decoder = SpeculativeDecoder(target, AutoregressiveDrafter(model, target, branches=2), policy, strict=True)
    prompts = [torch.arange(2, 2 + length)[None] for length in (1, 20, 9)]
    made = drafts_of(model, decoder, policy, prompts, SAMPLINGS[0])
    for draft, row, slow in made:
        size = int(draft.block_size[row])
        assert set(paths_of(draft, row)) == set(slow.best(2, 5)[: size - 1])
        check_features(draft, row, slow)
    assert len(made) > 8


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=name_of_sampling)
@torch.no_grad()
def test_shapes_are_drafted_as_they_are(pair: TinyPair, sampling: Sampling) -> None:
    """Beside each other shapes of different depths, and of nodes in any order; only nodes with children are read."""
    shapes = [
        TreeShape.delayed(3, trunk=1, length=3),
        TreeShape((-1, -1, -1, 2, 0, 3, 0, 5, 7, 1), (2, 0, 1, 2, 0, 0, 1, 1, 2, 0)),
        TreeShape.chain(5),
        TreeShape((-1,), (1,)),
    ]
    policy, drafter = Watching(shapes=shapes), branching(pair)
    decoder = SpeculativeDecoder(pair.target, drafter, policy, tokenizer=pair.tokenizer, strict=True)
    prompts = [pair.ids(prompt) for prompt in PROMPTS[3:6]]
    seen = set()
    for draft, row, slow in drafts_of(pair.assistant, decoder, policy, prompts, sampling):
        assert draft.parents is not None
        length = int(draft.draft_length[row])
        shape = next(shape for shape in shapes if list(shape.parents) == draft.parents[row, :length].tolist())
        seen.add(shape)
        for path, rank in zip(paths_of(draft, row), shape.ranks, strict=True):
            assert path[-1] == int(slow.after(path[:-1])[0].topk(3).indices[rank])
        check_features(draft, row, slow)
    assert len(seen) == len(shapes)


def test_rows_with_shapes_and_rows_without(pair: TinyPair) -> None:
    """In one pass, of any widths, each drafts what it would alone."""
    wide = TreeShape((-1, -1, 0, 0, 1, 1, 2, 3, 4, 5), (0, 1, 0, 1, 0, 1, 0, 0, 0, 0))
    shapes = [TreeShape.delayed(3, trunk=0, length=4), None, wide, None]
    sizes = [13, 12, 11, 1]

    def drafted(rows: Sequence[int], turn: int) -> list[tuple[list[int], list[int]]]:
        text = RunningText([RowText(pair.ids(PROMPTS[row + 3]), 80) for row in rows])
        session, samplers = (
            branching(pair).begin(text),
            [Sampler(row, Processors(LogitsProcessorList()), None) for row in text.rows],
        )
        tokens = [[row + 5 * turn] for row in rows]
        text.append(torch.tensor(tokens), torch.tensor(tokens), tokens)
        session.advance(None)
        own = [shapes[row] for row in rows]
        made = session.draft([sizes[row] for row in rows], Draw(Samplers(samplers)), None, own)  # type: ignore[call-arg]
        assert made.parents is not None
        return [
            (made.tokens[place, :count].tolist(), made.parents[place, :count].tolist())
            for place, count in enumerate(made.counts)
        ]

    with torch.inference_mode():
        for turn in range(9):
            together = drafted([0, 1, 2, 3], turn)
            assert together[:3] == [drafted([row], turn)[0] for row in (0, 1, 2)]
            assert together[3] == ([], [])


def test_a_level_reads_only_nodes_with_children(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    verify_trees = SlotTarget.verify_trees

    def noted(self: SlotTarget, tokens: Tensor, tree: Any) -> Any:
        if isinstance(tree, Level):
            read.append(tree.counts)
        return verify_trees(self, tokens, tree)

    monkeypatch.setattr(SlotTarget, "verify_trees", noted)
    for wanted, policy in (
        ([[1], [1], [3], [3]], Watching(shapes=[TreeShape.delayed(3, trunk=2, length=3)])),
        ([[1], [1]], Watching(shapes=[TreeShape((-1, -1, 0, 0, 2, 2, 2), (0, 1, 0, 1, 0, 1, 2))])),
        ([[3]] * 4, Watching((20,))),
        ([[3]], Watching((3,))),
        ([], Watching((2,))),
    ):
        read.clear()
        decoder = SpeculativeDecoder(pair.target, branching(pair), policy, tokenizer=pair.tokenizer, strict=True)
        decoder.generate(PROMPTS[4], max_new_tokens=2, temperature=0)
        assert read == wanted


def test_smaller_drafts_are_beginnings_of_larger_ones(pair: TinyPair) -> None:
    drafts = []
    for size in (24, 9, 3):
        policy = Watching((size,))
        decoder = SpeculativeDecoder(pair.target, branching(pair), policy, tokenizer=pair.tokenizer, strict=True)
        decoder.generate(PROMPTS[4], max_new_tokens=2, temperature=1.0, top_k=0, seed=SEED)
        drafts.append(policy.drafts[0])
    large = drafts[0]
    assert large.parents is not None
    assert large.draft_length.tolist() == [23]
    for small in drafts[1:]:
        assert small.parents is not None
        width = small.tokens.shape[1]
        assert small.tokens.equal(large.tokens[:, :width])
        assert small.parents.equal(large.parents[:, :width])


def test_candidates_that_are_ruled_out_are_not_drafted(pair: TinyPair) -> None:
    for top_k, most in ((1, 5), (2, 8)):
        policy = Watching((9,))
        decoder = SpeculativeDecoder(pair.target, branching(pair), policy, tokenizer=pair.tokenizer, strict=True)
        decoder.generate(PROMPTS[4], max_new_tokens=16, temperature=1.0, top_k=top_k, seed=3)
        assert {int(draft.draft_length) for draft in policy.drafts} == {most}
        for draft in policy.drafts:
            assert draft.parents is not None
            parents = draft.parents[0].tolist()
            assert max(map(parents.count, parents)) <= top_k


# Texts are those of plain decoding, and what stands stays in the drafter's cache


class Anything(Policy):
    """Random sizes or shapes, now and then no draft, and of drafts the first nodes."""

    wants = frozenset({Feature.ANCHOR_ENTROPY, Feature.DRAFT_PROBABILITY})

    def __init__(self, seed: int, most: int) -> None:
        super().__init__()
        self.random, self.most = random.Random(seed), most

    def select(self, state: State, context: Context) -> Tensor | Plan:
        spec, rows = context.spec, context.batch_size
        if self.random.random() < 0.5:
            return torch.tensor([self.random.randrange(1, self.most + 1) for _ in range(rows)])
        branches, deepest = spec.branches, spec.trained_block_size - 1
        shapes = [random_shape(self.random, self.most, branches=branches, deepest=deepest) for _ in range(rows)]
        return plan_of(context, shapes)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if self.random.random() < 0.6:
            return draft.draft_length
        return torch.tensor([self.random.randrange(length + 1) for length in draft.draft_length.tolist()])


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of drafts that were kept, step by step; what a drafter holds must be what a fresh pass gives."""
    kept: list[int] = []
    step = loop.step

    def checked(rows: Rows, policy: Any) -> Step:
        before = [row.length for row in rows.text.rows]
        made = step(rows, policy)
        for session in rows.drafter.session.sessions:
            if isinstance(session, LevelWiseSession):
                assert session.held == session.reader.held
                kept.append(sum(max(0, own - length) for own, length in zip(session.held, before, strict=True)))
                for place, (row, held) in enumerate(zip(rows.text.rows, session.held, strict=True)):
                    assert held < row.length
                    check_cache(session, place, row.tokens[:held])
        return made

    monkeypatch.setattr(loop, "step", checked)
    return kept


def check_cache(session: LevelWiseSession, place: int, tokens: list[int]) -> None:
    """Keys and values of a row are those of its text, read at once."""
    if not tokens:
        return
    reader: Any = session.reader
    fresh = session.drafter.inner(torch.tensor([tokens]), use_cache=True).past_key_values
    for layer, wanted in zip(reader.slot_cache.slot_layers, fresh.layers, strict=True):
        for own, its in ((layer.keys, wanted.keys), (layer.values, wanted.values)):
            count = its.shape[2]  # of a window fewer
            assert torch.allclose(own[place, :, len(tokens) - count : len(tokens)], its[0], atol=1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=name_of_sampling)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tree_leaves_the_text_alone(
    pair: TinyPair, outputs: Outputs, moved: list[int], sampling: Sampling, data: st.DataObject
) -> None:
    seed, batch_size = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 3]))
    places = data.draw(st.permutations(range(16)))[: data.draw(st.integers(1, 5))]
    rows = [{"prompt": PROMPTS[i], "max_new_tokens": limit_of(i), "stream_id": i} for i in places]
    policy = Anything(seed, most=data.draw(st.integers(2, 24)))
    drafter = branching(pair, data.draw(st.integers(2, 5)), block_size=data.draw(st.integers(2, 8)))
    decoder = SpeculativeDecoder(pair.target, drafter, policy, tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate(rows, batch_size=batch_size, seed=SEED, **sampling.options)
    for place, one in zip(places, made, strict=True):
        assert one.error is None
        wanted = outputs(pair.ids(PROMPTS[place]), sampling, max_new_tokens=limit_of(place), stream_id=place)
        assert one.tokens[0].tolist() == wanted.tokens


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, *MORE_SAMPLINGS], ids=name_of_sampling)
def test_the_best_trees_leave_the_text_alone(
    pair: TinyPair, outputs: Outputs, moved: list[int], sampling: Sampling, batch_size: int
) -> None:
    decoder = SpeculativeDecoder(pair.target, branching(pair), "fixed:12", tokenizer=pair.tokenizer, strict=True)
    rows = [{"prompt": PROMPTS[i], "stream_id": i} for i in range(3)]
    made = decoder.generate(rows, max_new_tokens=16, batch_size=batch_size, seed=SEED, **sampling.options)
    for place, one in enumerate(made):
        wanted = outputs(pair.ids(PROMPTS[place]), sampling, max_new_tokens=16, stream_id=place)
        assert one.tokens[0].tolist() == wanted.tokens
    assert sum(moved) > 5


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_architectures(kind: str, temperature: float, moved: list[int]) -> None:
    """Texts longer than the window, of several rows."""
    target = repeating_causal_lm(kind)
    plain = SpeculativeDecoder(target, NgramDrafter(), "fixed:1")
    with torch.no_grad():
        drafter = AutoregressiveDrafter(disturbed(target), target, branches=2)
    trees = SpeculativeDecoder(target, drafter, Anything(5, 14), strict=True)
    ids = [torch.arange(2, 2 + length)[None] for length in (1, 9, 20)]
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "seed": 4, "eos_token_id": None}
    wanted, made = plain.generate(ids, **options), trees.generate(ids, **options)
    assert [one.tokens.tolist() for one in made] == [one.tokens.tolist() for one in wanted]
    assert sum(moved) > 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_shipped_assistant_accepts_more_of_a_tree(shipped: ShippedPair, temperature: float) -> None:
    prompt = shipped.tokenizer("def add(a, b):\n    return", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 48, "temperature": temperature, "seed": 1}
    made = {}
    for name in ("autoregressive:block_size=5", "autoregressive:block_size=5,branches=3"):
        decoder = SpeculativeDecoder(shipped.target, name, "fixed:5" if "branches" not in name else "fixed:13")
        made[name] = decoder.generate(prompt, **options)
    chain, tree = made.values()
    assert chain.tokens.equal(tree.tokens)
    assert tree.acceptance_length > chain.acceptance_length, "of as many passes"
    assert any(
        step.path is not None and step.path[0].tolist() != list(range(int(step.num_accepted))) for step in tree.steps
    )


def test_trees_beside_other_sources(pair: TinyPair, outputs: Outputs, moved: list[int]) -> None:
    """What another source drafted is read before the next tree."""

    class Turns(Policy):
        wants = frozenset({Feature.DRAFT_PROBABILITY})

        def select(self, state: State, context: Context) -> Plan:
            return Plan(context.full(7), (context.position + torch.arange(context.batch_size)) % 3)

    block_diffusion = BlockDiffusionDrafter(pair.drafter_model, pair.target, branches=2)
    drafters: list[Drafter] = [branching(pair), NgramDrafter(), block_diffusion]
    decoder = SpeculativeDecoder(pair.target, drafters, Turns(), tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate(list(PROMPTS[:4]), max_new_tokens=16, temperature=0)
    for prompt, one in zip(PROMPTS, made, strict=False):
        assert one.tokens[0].tolist() == outputs(pair.ids(prompt), SAMPLINGS[0], max_new_tokens=16).tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_early_exits_draft_trees_with_a_cache_of_their_own(
    pair: TinyPair, temperature: float, moved: list[int]
) -> None:
    exit = pair.early_exit()
    drafter = EarlyExitDrafter(exit.exit, pair.target, layer=exit.layer, branches=3)
    decoder = SpeculativeDecoder(pair.target, drafter, Anything(1, 12), tokenizer=pair.tokenizer, strict=True)
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "seed": 2}
    made = decoder.generate(list(PROMPTS[:3]), batch_size=2, **options)
    plain = decoder.with_policy("fixed:1").generate(list(PROMPTS[:3]), batch_size=2, **options)
    assert [one.tokens.tolist() for one in made] == [one.tokens.tolist() for one in plain]
    assert moved


# Processors that keep state or look at tokens


@pytest.mark.parametrize("sampled", [False, True])
def test_a_grammar_is_told_of_no_path_that_it_forbids(pair: TinyPair, sampled: bool) -> None:
    """Digits and letters take turns: some of 14 candidates are forbidden, and what comes after these is not asked."""
    decoder = SpeculativeDecoder(pair.target, branching(pair, 14), "fixed:12", tokenizer=pair.tokenizer, strict=True)
    for seed in range(2):
        options: dict[str, Any] = {"temperature": 1.3 * sampled, "max_new_tokens": 16, "seed": seed}
        made = decoder.generate(PROMPTS[3], logits_processor=LogitsProcessorList([Grammar(pair)]), **options)
        one = decoder.with_policy("fixed:1").generate(
            PROMPTS[3], logits_processor=LogitsProcessorList([Grammar(pair)]), **options
        )
        assert made.error is None
        assert made.tokens.equal(one.tokens)
        assert made.acceptance_length > 1.2


class Reading(LogitsProcessor):
    """Is told of one token after the other, and forbids one that depends on all of them."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = input_ids[0].tolist()
        assert not self.told or self.told == ids[:-1], "another path"
        self.told = ids
        scores[:, sum(ids) % 7 :: 7] = -torch.inf
        return scores

    def snapshot(self) -> list[int]:
        return self.told

    def restore(self, state: list[int]) -> None:
        self.told = state


def test_a_processor_is_rolled_back_from_path_to_path(pair: TinyPair) -> None:
    ours, theirs = Reading(), Reading()
    decoder = SpeculativeDecoder(pair.target, branching(pair), "fixed:9", tokenizer=pair.tokenizer, strict=True)
    wanted = plain(pair, theirs, eos_token_id=None)
    made = decoder.generate(
        "def f(a, b):\n    return ",
        temperature=0,
        max_new_tokens=24,
        logits_processor=LogitsProcessorList([ours]),
        eos_token_id=None,
    )
    assert made.sequences.equal(wanted)
    assert made.acceptance_length > 1.2
    assert ours.told == theirs.told


# What else holds


def test_one_branch_is_a_chain(pair: TinyPair) -> None:
    made = [
        SpeculativeDecoder(pair.target, drafter, "fixed:9").generate(pair.ids("x = "), max_new_tokens=12, seed=2)
        for drafter in (branching(pair, 1), pair.autoregressive())
    ]
    assert made[0].tokens.equal(made[1].tokens)
    assert [step.path for step in made[0].steps] == [None] * len(made[0].steps)
    assert [step.num_accepted for step in made[0].steps] == [step.num_accepted for step in made[1].steps]
    assert branching(pair, 1).max_block_size == pair.autoregressive().max_block_size == 32
    assert branching(pair, 8).max_block_size == 48
    assert SpeculativeDecoder(pair.target, branching(pair, 8)).spec.branches == 8


def test_sessions_of_chains_are_those_of_before(pair: TinyPair) -> None:
    text = RunningText([RowText(pair.ids("x = "), 20)])
    assert type(branching(pair, 1).begin(text)) is AutoregressiveSession
    assert type(branching(pair, 2).begin(text)) is LevelWiseSession


def test_options_name_branches(pair: TinyPair, tiny_folder: Path) -> None:
    drafter: Any = resolve_drafter(
        f"autoregressive:path={tiny_folder / 'assistant'},branches=4,block_size=8", pair.target
    )
    assert (drafter.branches, drafter.trained_block_size, drafter.max_block_size) == (4, 8, 32)
    drafter = resolve_drafter(f"early-exit:path={tiny_folder / 'exit'},branches=2", pair.target)
    assert isinstance(drafter, EarlyExitDrafter)
    assert drafter.branches == 2


def test_extend_is_not_asked_of_trees(pair: TinyPair) -> None:
    class Impatient(Watching):
        def extend(self, state: State, draft: Draft) -> Tensor:
            raise AssertionError("a tree is drafted whole")

    policy = Impatient((9,))
    decoder = SpeculativeDecoder(pair.target, branching(pair), policy, tokenizer=pair.tokenizer, strict=True)
    decoder.generate(PROMPTS[4], max_new_tokens=8, temperature=0)
    assert {int(draft.draft_length) for draft in policy.drafts} == {8}


def test_assistants_that_read_no_trees_are_refused(pair: TinyPair) -> None:
    for kind, why in (("qwen3_5_text", "one state for a whole text"), ("bloom", "it reads rows apart")):
        model = tiny_causal_lm(kind)
        with pytest.raises(
            ValueError, match=f"drafter assistant .* reads one path at a time, because .*{why}.*branches=1"
        ):
            AutoregressiveDrafter(model, model, branches=2)
        assert AutoregressiveDrafter(model, model).branches == 1
    with pytest.raises(ValueError, match="branches must be from 1 to 100, the target's vocabulary; got 0"):
        branching(pair, 0)
    with pytest.raises(ValueError, match="got 101"):
        branching(pair, 101)
    with pytest.raises(ValueError, match="drafts trees, and members of an ensemble draft chains"):
        EnsembleDrafter([pair.autoregressive(), branching(pair)], pair.target)
    with pytest.raises(ValueError, match=r"drafts trees \(branches=3\), and rule 'rejection' verifies chains alone"):
        SpeculativeDecoder(pair.target, branching(pair), rule="rejection")


def test_trees_are_as_deep_as_the_last_position_allows(pair: TinyPair) -> None:
    length = pair.ids(PROMPTS[4]).shape[1]
    config = GPT2Config(vocab_size=len(pair.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=length + 4)
    model = GPT2LMHeadModel(config).eval()
    policy = Watching((12,))
    decoder = SpeculativeDecoder(
        pair.target,
        AutoregressiveDrafter(model, pair.target, branches=2),
        policy,
        tokenizer=pair.tokenizer,
        strict=True,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = decoder.generate(PROMPTS[4], max_new_tokens=12, temperature=0)
    assert sum("positions and the text is longer" in str(warning.message) for warning in said) == 1
    assert made.tokens.equal(
        decoder.with_policy("fixed:1").generate(PROMPTS[4], max_new_tokens=12, temperature=0).tokens
    )
    depths = [max(map(len, paths_of(draft, 0))) for draft in policy.drafts]
    lengths = [int(draft.context.context_length) for draft in policy.drafts]
    assert depths == [min(5, length + 5 - read) for read in lengths]
    assert int(made.steps[-1].draft_length) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_passes_and_levels_take_turns(pair: TinyPair, temperature: float) -> None:
    """The pass over what is decided is captured, those over levels are not."""
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "seed": 5}
    made = [
        SpeculativeDecoder(pair.target, branching(pair), Anything(3, 16), capture=capture, strict=True).generate(
            [pair.ids(prompt) for prompt in PROMPTS[:3]], batch_size=2, **options
        )
        for capture in ("off", "on")
    ]
    assert [one.tokens.tolist() for one in made[0]] == [one.tokens.tolist() for one in made[1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_read_the_device_twice(pair: TinyPair, temperature: float) -> None:
    """What came up at all levels, after the last of them, and what was decided."""
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": temperature, "seed": 5}
    host = SpeculativeDecoder(pair.target, branching(pair), "fixed:12", tokenizer=pair.tokenizer)
    with SimulatedDevice() as device:
        for policy in ("fixed:12", Fixed(TreeShape.delayed(2, 1, 2))):
            reads = device.count(device.decoder(host).with_policy(policy), PROMPTS[0], **options)
            assert list(reads.tokens) == host.generate(PROMPTS[0], **options).tokens[0].tolist()
            assert set(reads.steps) == {2}
