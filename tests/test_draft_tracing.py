"""Traced drafts equal those of the live decoder, brought to each position at block size 1 and asked for one block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from bpkit import Context, Policy, SpeculativeDecoder
from bpkit.decode.drafter import Drafter, DrafterSession, GoOn, Proposal
from bpkit.decode.features import draft_features
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.sampling import Draw, Processors
from bpkit.decode.text import RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.hierarchy import HierarchyDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.draft.stores.files import open_store
from bpkit.policy import State
from bpkit.testing import TinyPair
from bpkit.trace.collect import autoregressive as draft_autoregressive
from bpkit.trace.collect.autoregressive import Rollouts, trace_rollouts
from bpkit.trace.collect.drafts import Drafts, Finished, match_probability
from bpkit.trace.collect.pieces import HeldNoise, Positions
from bpkit.trace.collect.stepwise import trace_step_by_step
from bpkit.types import Feature, Step
from tests.tiny_store import tiny_store

PROMPT = "def f(a, b):"
REPETITIVE = "1, 2, 3, 1, 2, 3, 1, 2, "
BLOCK_SIZES = (2, 3, 5, 8)
LENGTH = 9
SEED, STREAM = 11, 3


@dataclass(frozen=True)
class Sampling:
    """One way of sampling, as options of `generate` and as the processors that a trace applies."""

    name: str
    temperature: float
    options: dict[str, Any] = field(default_factory=dict)
    processors: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name


SAMPLINGS = (
    Sampling("greedy", 0),
    Sampling("greedy repetition", 0, {"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
    Sampling("T=1 top-p", 1.0, {"top_k": 0, "top_p": 0.9}, [TopPLogitsWarper(0.9)]),
    Sampling(
        "T=0.7 repetition",
        0.7,
        {"top_k": 0, "repetition_penalty": 1.3},
        [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7)],
    ),
)


def decoded(target: PreTrainedModel, drafter: Drafter, policy: Policy | str, prompt: Tensor, sampling: Sampling) -> Any:
    """A run of the live decoder."""
    return SpeculativeDecoder(target, drafter, policy, strict=True).run(
        prompt,
        max_new_tokens=LENGTH,
        temperature=sampling.temperature,
        seed=SEED,
        stream_id=STREAM,
        eos_token_id=None,
        **sampling.options,
    )


def finish(
    target: PreTrainedModel,
    drafter: Drafter,
    prompt: Tensor,
    sampling: Sampling,
    block_sizes: tuple[int, ...] = BLOCK_SIZES,
    *,
    keep_hidden: bool = True,
) -> Finished:
    """An output, and all that its drafts are traced with."""
    ids = decoded(target, drafter, "fixed:1", prompt, sampling).finish().sequences
    processors, length = Processors(LogitsProcessorList(sampling.processors)), prompt.shape[1]
    with torch.no_grad():
        output = target(ids[:, :-1], output_hidden_states=True, use_cache=False)
    features = None
    if drafter.feature_layers:
        features = torch.cat([output.hidden_states[i + 1] for i in drafter.feature_layers], dim=-1)
    noise, probabilities = None, None
    if sampling.temperature > 0:
        count = ids.shape[1] - length
        noise = HeldNoise(SEED, STREAM, count + max(block_sizes), output.logits.shape[-1], ids.device)
        scores = processors(output.logits[:, length - 1 :], prompt, ids[:, length:])
        probabilities = held(scores[0].softmax(dim=-1))
    vocab_size = output.logits.shape[-1]
    return Finished(ids, length, features, block_sizes, processors, vocab_size, noise, probabilities, keep_hidden)


def held(rows: Tensor) -> Positions:
    """Rows of positions 0, 1, ..., float32 [positions, vocab], as a trace asks for them."""
    return Positions(len(rows), rows.shape[1], rows.__getitem__)


class OneBlock(Policy):
    """Block size 1 until a position, then one block."""

    wants = frozenset()

    def __init__(self, position: int, block_size: int) -> None:
        super().__init__()
        self.position, self.block_size = position, block_size

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size if int(context.position) == self.position else 1)


class Watched:
    """A drafter that keeps what its sessions propose."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.proposals: list[Proposal] = []
        for name in ("name", "kind", "trained_block_size", "max_block_size", "feature_layers", "provides", "work"):
            setattr(self, name, getattr(drafter, name))

    def begin(self, text: RunningText) -> DrafterSession:
        return WatchedSession(self, self.drafter.begin(text))


class WatchedSession:
    def __init__(self, watched: Watched, session: DrafterSession) -> None:
        self.watched, self.session = watched, session
        self.advance, self.keep, self.join = session.advance, session.keep, session.join

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        self.watched.proposals.append(self.session.draft(block_size, draw, go_on))
        return self.watched.proposals[-1]


def live(
    target: PreTrainedModel, drafter: Drafter, prompt: Tensor, sampling: Sampling, position: int, block_size: int
) -> tuple[Proposal, int]:
    """What the live decoder drafts at a position, and how much of it stands."""
    watched: Any = Watched(drafter)
    for record in decoded(target, watched, OneBlock(position, block_size), prompt, sampling):
        if watched.proposals:
            assert isinstance(record, Step)
            return watched.proposals[0], int(record.num_accepted)
    raise AssertionError("nothing was drafted")


def check_against_live(
    drafts: Drafts, finished: Finished, target: PreTrainedModel, drafter: Drafter, sampling: Sampling
) -> int:
    """Compare every draft; returns how many live drafts had an accepted token."""
    prompt, accepted = finished.ids[:, : finished.prompt_length], 0
    assert finished.rows == LENGTH - 1
    for row in range(finished.rows):
        for column, block_size in enumerate(finished.block_sizes):
            proposal, num_accepted = live(target, drafter, prompt, sampling, row + 1, block_size)
            length = proposal.tokens.shape[1]
            assert int(drafts.draft_length[row, column]) == length
            assert drafts.tokens[row, column, :length].equal(proposal.tokens[0])
            assert (drafts.tokens[row, column, length:] == -1).all()
            if length > 0:
                check_scores(drafts, finished, proposal, row, column)
            decided = finished.ids[0, finished.prompt_length + row + 1 :]
            compared = min(length, len(decided))
            same = drafts.tokens[row, column, :compared] == decided[:compared]
            # A step yields one token more than it accepts, which must still be within the output.
            assert num_accepted == min(int(same.cumprod(dim=0).sum()), len(decided) - 1)
            accepted += num_accepted > 0
    return accepted


def check_scores(drafts: Drafts, finished: Finished, proposal: Proposal, row: int, column: int) -> None:
    """Compare probabilities, entropies, hidden states and chances of a match with those of a live proposal."""
    length = proposal.tokens.shape[1]
    assert drafts.probability[row, column, length:].isnan().all()
    if proposal.scores is None:
        assert drafts.entropy[row, column].isnan().all()
        return
    features = draft_features(proposal, frozenset({Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY}))
    probability, entropy = features[Feature.DRAFT_PROBABILITY][0], features[Feature.DRAFT_ENTROPY][0]
    assert (drafts.probability[row, column, :length] - probability).abs().max() < 1e-5
    assert (drafts.entropy[row, column, :length] - entropy).abs().max() < 1e-5
    assert drafts.hidden is not None
    assert proposal.hidden is not None
    assert (drafts.hidden[row, column, :length] - proposal.hidden[0]).abs().max() < 1e-4
    assert drafts.hidden[row, column, length:].isnan().all()
    chances, target = drafts.match_probability[row, column, :length], finished.target_probabilities
    if target is None:
        assert chances.isnan().all()
        return
    inside = min(length, len(target) - row - 1)
    assert chances[inside:].isnan().all()
    if inside > 0:
        true = target[torch.arange(row + 1, row + 1 + inside)]
        wanted = matches_by_the_formula(true, proposal.scores[0, :inside].softmax(dim=-1))
        assert (chances[:inside] - wanted).abs().max() < 1e-5


def matches_by_the_formula(p: Tensor, q: Tensor) -> Tensor:
    """Sum over x of 1 / sum over y of max(p_y / p_x, q_y / q_x), for distributions [rows, vocab]."""
    chances = []
    for one, other in zip(p.double(), q.double(), strict=True):
        common = [x for x in range(len(one)) if one[x] > 0 and other[x] > 0]
        chances.append(sum(1 / float(torch.maximum(one / one[x], other / other[x]).sum()) for x in common))
    return torch.tensor(chances)


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """A random model whose distributions are neither flat nor certain."""
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight *= 4 / head.weight.norm(dim=-1).mean()
    return model.float().eval()


def family(name: str, vocab: int) -> PreTrainedModel:
    """A tiny random model of another family."""
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    }
    shape |= {"vocab_size": vocab, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
    gated = shape | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "llama":
            return scaled(LlamaForCausalLM(LlamaConfig(**gated)))
        if name == "llama eager":
            return scaled(LlamaForCausalLM(LlamaConfig(**gated, attn_implementation="eager")))
        if name == "sliding window":
            return scaled(MistralForCausalLM(MistralConfig(**gated, sliding_window=6)))
        if name == "absolute positions":
            return scaled(GPT2LMHeadModel(GPT2Config(**shape, n_positions=128)))
        return scaled(BloomForCausalLM(BloomConfig(**shape)))


@pytest.fixture(scope="module")
def drafters(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drafter]:
    store = open_store(tiny_store(tmp_path_factory.mktemp("store"), pair, [REPETITIVE]))
    llama = AutoregressiveDrafter(family("llama", len(pair.tokenizer)), pair.target, name="llama")
    return {
        "autoregressive": pair.autoregressive(),
        "early exit": pair.early_exit(),
        "llama": llama,
        "n-gram": NgramDrafter(),
        "hierarchy": HierarchyDrafter(store),
        "agreeable": pair.agreeable(0.3),
        "block diffusion": pair.block_diffusion(),
    }


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", ["autoregressive", "early exit", "llama"])
def test_rollouts_equal_the_live_drafts(
    pair: TinyPair, drafters: dict[str, Drafter], name: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = drafters[name]
    assert isinstance(drafter, AutoregressiveDrafter)
    finished = finish(pair.target, drafter, pair.ids(PROMPT), sampling)
    monkeypatch.setattr(draft_autoregressive, "trace_step_by_step", None)  # it must not come to that
    monkeypatch.setattr(draft_autoregressive, "ROLLOUTS_AT_ONCE", 3)  # several batches, the last one smaller
    drafts = trace_rollouts(drafter, finished)
    accepted = check_against_live(drafts, finished, pair.target, drafter, sampling)
    assert name == "llama" or accepted > 2


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", ["agreeable", "n-gram", "hierarchy", "block diffusion"])
def test_drafts_step_by_step_equal_the_live_drafts(
    pair: TinyPair, drafters: dict[str, Drafter], name: str, sampling: Sampling
) -> None:
    finished = finish(pair.target, drafters[name], pair.ids(REPETITIVE), sampling)
    drafts = trace_step_by_step(drafters[name], finished)
    accepted = check_against_live(drafts, finished, pair.target, drafters[name], sampling)
    assert name != "agreeable" or accepted > 2


def test_an_ngram_draft_does_not_look_ahead(pair: TinyPair) -> None:
    # The second half repeats the first, so that a store that saw it all would propose what comes.
    ids, processors = pair.ids("abcdefgh" * 2 + "abc"), Processors(LogitsProcessorList())
    finished = Finished(ids, 2, None, (2, 5), processors, len(pair.tokenizer))
    drafts = trace_step_by_step(NgramDrafter(), finished)
    assert drafts.draft_length[:6].sum() == 0
    # "abcdefgh a" is decided: what followed the first "a" is proposed, as far as it goes.
    assert drafts.draft_length[6:].tolist() == [[1, 4]] * len(drafts.draft_length[6:])
    assert drafts.tokens[6, 1, :4].equal(pair.ids("bcde")[0])
    assert drafts.tokens[6, 0].tolist() == [*pair.ids("b")[0].tolist(), -1, -1, -1]


@pytest.mark.parametrize("name", ["llama", "llama eager", "absolute positions", "sliding window", "distance bias"])
def test_rollouts_of_other_families_equal_their_own_drafts(pair: TinyPair, name: str) -> None:
    drafter = AutoregressiveDrafter(family(name, len(pair.tokenizer)), pair.target)
    finished = finish(pair.target, drafter, pair.ids(PROMPT), SAMPLINGS[2])
    with torch.no_grad():
        assert Rollouts(drafter, finished).begin() == (name not in ("sliding window", "distance bias"))
    check_same(trace_rollouts(drafter, finished), trace_step_by_step(drafter, finished))


def test_rollouts_of_a_narrower_vocabulary_equal_the_live_drafts(pair: TinyPair) -> None:
    drafter = AutoregressiveDrafter(family("llama", len(pair.tokenizer) - 8), pair.target)
    finished = finish(pair.target, drafter, pair.ids(PROMPT), SAMPLINGS[2])
    with torch.no_grad():
        assert Rollouts(drafter, finished).begin()
    check_same(trace_rollouts(drafter, finished), trace_step_by_step(drafter, finished))


def test_drafts_end_where_the_drafter_has_no_more_positions(pair: TinyPair) -> None:
    prompt = pair.ids(PROMPT)
    model = family("absolute positions", len(pair.tokenizer))
    drafter = AutoregressiveDrafter(model, pair.target)
    drafter.positions = prompt.shape[1] + 5
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        finished = finish(pair.target, drafter, prompt, SAMPLINGS[0])
        drafts = trace_rollouts(drafter, finished)
        check_against_live(drafts, finished, pair.target, drafter, SAMPLINGS[0])
    assert any("positions" in str(warning.message) for warning in told)
    assert drafts.draft_length[0].tolist() == [1, 2, 4, 5]
    assert drafts.draft_length[-1].tolist() == [0, 0, 0, 0]


class CountsPositions(Qwen3ForCausalLM):
    """A model that puts tokens where its cache ends, whatever position it is told."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **options: Any) -> Any:
        return super().forward(*args, **options)


def test_a_model_that_ignores_position_ids_is_found_out(pair: TinyPair) -> None:
    model = CountsPositions(pair.assistant.config).eval()
    model.load_state_dict(pair.assistant.state_dict())
    drafter = AutoregressiveDrafter(model, pair.target)
    finished = finish(pair.target, drafter, pair.ids(PROMPT), SAMPLINGS[0])
    with torch.no_grad():
        assert not Rollouts(drafter, finished).begin()
    check_same(trace_rollouts(drafter, finished), trace_rollouts(pair.autoregressive(), finished))


def check_same(one: Drafts, other: Drafts) -> None:
    assert one.draft_length.equal(other.draft_length)
    assert one.tokens.equal(other.tokens)
    assert one.hidden is not None
    assert other.hidden is not None
    for a, b, close in (
        (one.probability, other.probability, 1e-5),
        (one.entropy, other.entropy, 1e-5),
        (one.match_probability, other.match_probability, 1e-5),
        (one.hidden, other.hidden, 1e-4),
    ):
        assert a.isnan().equal(b.isnan())
        assert (a - b).nan_to_num().abs().max() < close


def test_hidden_states_are_kept_only_where_wanted(pair: TinyPair) -> None:
    for drafter in (pair.autoregressive(), pair.agreeable()):
        finished = finish(pair.target, drafter, pair.ids(PROMPT), SAMPLINGS[0], keep_hidden=False)
        trace: Callable[..., Drafts] = trace_rollouts if drafter.name == "assistant" else trace_step_by_step
        assert trace(drafter, finished).hidden is None


@pytest.mark.parametrize("count", [1, 2])
def test_outputs_of_one_and_two_tokens(pair: TinyPair, count: int) -> None:
    processors = Processors(LogitsProcessorList())
    ids = pair.ids(PROMPT)
    finished = Finished(ids, ids.shape[1] - count, None, (2, 4), processors, len(pair.tokenizer))
    for drafts in (
        trace_rollouts(pair.autoregressive(), finished),
        trace_step_by_step(pair.agreeable(), finished),
        trace_step_by_step(NgramDrafter(), finished),
    ):
        assert drafts.draft_length.shape == (count - 1, 2)


def test_held_noise_is_the_noise_and_ends_where_it_ends() -> None:
    rows = GumbelNoise(0, 3, 7, torch.device("cpu")).at(0, 5)
    noise = HeldNoise(0, 3, 5, 7, rows.device)
    for start, count in ((2, 3), (0, 2), (4, 1)):
        assert noise.at(start, count).equal(rows[start : start + count])
    with pytest.raises(IndexError, match="positions 4 to 5 were asked for, of 5"):
        noise.at(4, 2)


def distributions(count: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random distributions, some tokens of which either side or both never draw, [count, vocab] each."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        weights = torch.rand(count, vocab, generator=generator).pow(3)
        weights *= torch.rand(count, vocab, generator=generator) < 0.7
        weights[:, 0] += 0.01
        found.append(weights / weights.sum(dim=-1, keepdim=True))
    return found[0], found[1]


@pytest.mark.parametrize("vocab", [2, 3, 9])
def test_match_probability_is_the_published_sum(vocab: int) -> None:
    p, q = distributions(200, vocab, vocab)
    assert (match_probability(p, q) - matches_by_the_formula(p, q)).abs().max() < 1e-6
    assert (match_probability(p, q) - match_probability(q, p)).abs().max() < 1e-6
    assert (match_probability(p, p) - 1).abs().max() < 1e-6
    apart = torch.eye(2)
    assert match_probability(apart, apart.flip(0)).tolist() == [0, 0]


def test_match_probability_is_how_often_draws_with_the_same_noise_agree() -> None:
    p, q = distributions(6, 8, 0)
    draws = 40_000
    noise = GumbelNoise(5, 0, 8, torch.device("cpu")).at(0, draws)
    for one, other, chance in zip(p, q, match_probability(p, q), strict=True):
        same = (one.log() + noise).argmax(dim=-1) == (other.log() + noise).argmax(dim=-1)
        deviation = math.sqrt(float(chance * (1 - chance)) / draws)
        assert abs(float(same.float().mean() - chance)) < 4 * deviation + 1e-4
