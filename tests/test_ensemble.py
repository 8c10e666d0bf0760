"""Ensembles: what a mixture drafts, whose word counts how much in it, and what may be a member."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from bpkit import SpeculativeDecoder
from bpkit.decode.drafter import Drafter, own_features
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.resolve_drafter import resolve_drafter, resolve_drafters
from bpkit.decode.sampling import Draw, Processors, Sampler, Samplers
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.ensemble import AssistantsSession, EnsembleDrafter
from bpkit.draft.mixture import FixedWeights, MixedDraw, MixtureWeights, mixed
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import PolicyError
from bpkit.testing import TinyPair, tiny_pair
from bpkit.testing.simulated_device import SimulatedDevice
from bpkit.trace.collect.tracer import TraceOptions, Tracer
from bpkit.trace.fingerprint import fingerprint_models
from bpkit.types import Feature, Step
from tests.test_draft_rows import run
from tests.test_noise import ENOUGH, exact_law, p_values, small_model
from tests.test_rows import PROMPTS, RandomPolicy, Reference

SEED = 11


@pytest.fixture(scope="module")
def blocks(pair: TinyPair) -> list[BlockDiffusionDrafter]:
    """Two block-diffusion drafters, which read other layers of the target in another order."""
    other = copy.deepcopy(tiny_pair(seed=1).drafter_model)
    other.config.target_layer_ids = [2, 1]
    return [pair.block_diffusion(), BlockDiffusionDrafter(other, pair.target)]


@pytest.fixture(scope="module")
def assistants(pair: TinyPair) -> list[AutoregressiveDrafter]:
    """The pair's assistant, and the target of another seed, which knows nothing."""
    return [pair.autoregressive(), AutoregressiveDrafter(tiny_pair(seed=1).target, pair.target)]


@pytest.fixture(params=["blocks", "assistants"])
def members(request: pytest.FixtureRequest) -> list[Any]:
    made: list[Any] = request.getfixturevalue(request.param)
    return made


@pytest.fixture(scope="module")
def reference(pair: TinyPair, plain: Any) -> Reference:
    return Reference(pair, plain)


def logits(*probabilities: Sequence[float]) -> Tensor:
    """[1, 1, members, vocab]"""
    return torch.tensor(probabilities).log()[None, None]


def draw_after(tokens: list[int], noise: GumbelNoise | None = None, *processors: Any) -> Draw:
    text = RowText(torch.tensor([tokens]), 100)
    return Draw(Samplers([Sampler(text, Processors(LogitsProcessorList(processors)), noise)]))


# What is drawn.


def test_the_mixture_is_the_weighted_mean_and_its_best_token_is_drafted() -> None:
    members = logits([0.6, 0.4, 0.0], [0.0, 0.4, 0.6])
    token, scores = MixedDraw(draw_after([0]), torch.tensor([[0.5, 0.5]]), keep=False)(members)
    assert token.tolist() == [[1]], "neither member's first choice"
    torch.testing.assert_close(scores.exp(), torch.tensor([[[0.3, 0.4, 0.3]]]))
    token, scores = MixedDraw(draw_after([0]), torch.tensor([[1.0, 0.0]]), keep=False)(members)
    assert token.tolist() == [[0]]
    torch.testing.assert_close(scores.exp(), torch.tensor([[[0.6, 0.4, 0.0]]]))


def test_each_members_scores_are_processed_before_they_are_mixed() -> None:
    members = logits([0.8, 0.1, 0.1], [0.1, 0.6, 0.3])
    processors = [RepetitionPenaltyLogitsProcessor(2.0), TemperatureLogitsWarper(0.5)]
    draw = draw_after([0], None, *processors)
    _, scores = MixedDraw(draw, torch.tensor([[0.3, 0.7]]), keep=False)(members)
    ids, expected = torch.tensor([[0]]), torch.zeros(3)
    for weight, own in zip((0.3, 0.7), members[0, 0], strict=True):
        for processor in processors:
            own = processor(ids, own.clone()[None] if own.ndim == 1 else own)
        expected += weight * own[0].softmax(-1)
    torch.testing.assert_close(scores[0, 0].exp(), expected)


def test_with_noise_the_mixture_is_drawn_with_that_of_the_position() -> None:
    members, weights = torch.randn(1, 6, 2, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.2, 0.8]])
    noise = GumbelNoise(5, 3, 9, torch.device("cpu"))
    tokens, scores = MixedDraw(draw_after([0, 1], noise), weights, keep=False)(members)
    expected = (weights[0, :, None] * members.softmax(-1)).sum(dim=2).log()
    torch.testing.assert_close(scores, expected)
    assert tokens.equal((expected + noise.at(0, 6)).argmax(-1))


# Whose word counts how much.


def learned(weights: MixtureWeights, members: Tensor, tokens: list[int]) -> list[float]:
    draw = MixedDraw(draw_after([0]), weights.now, keep=True)
    draw(members)
    weights.learn(draw, torch.tensor([tokens]), [len(tokens)])
    return [round(value, 6) for value in weights.now[0].tolist()]


def test_weights_go_to_the_mixture_that_agreed_most_often_and_of_those_to_the_likeliest() -> None:
    weights = MixtureWeights(1, 2, torch.device("cpu"))
    assert weights.now.tolist() == [[0.5, 0.5]]
    # The first token is agreed on where the first member has a third or more; of these the likeliest has it all.
    assert learned(weights, logits([0.9, 0.1], [0.3, 0.7]), [0]) == [1.0, 0.0]
    # The third is the second member's: all are agreed on from 0.4 to 0.6.
    assert learned(weights, logits([0.2, 0.8], [0.4, 0.6]), [1]) == [1.0, 0.0]
    assert learned(weights, logits([0.7, 0.3], [0.1, 0.9]), [1]) == [0.6, 0.4]
    grid = weights.grid[:, 0]
    chances = (0.9, 0.3), (0.8, 0.6), (0.3, 0.9)
    assert weights.agreed[0].tolist() == [sum(w * a + (1 - w) * b > 0.5 for a, b in chances) for w in grid.tolist()]


def test_positions_behind_the_first_wrong_token_teach_nothing() -> None:
    weights = MixtureWeights(2, 2, torch.device("cpu"))
    members = torch.cat([logits([0.9, 0.1], [0.2, 0.8])] * 3, dim=1)
    texts = [RowText(torch.tensor([[0]]), 10) for _ in range(2)]
    samplers = Samplers([Sampler(text, Processors(LogitsProcessorList()), None) for text in texts])
    draw = MixedDraw(Draw(samplers), weights.now, keep=True)
    draw(members.expand(2, -1, -1, -1))
    weights.learn(draw, torch.tensor([[0, 1, 1], [1, 1, 1]]), [1, 0])
    assert weights.now.tolist() == [[1.0, 0.0], [0.5, 0.5]], "the second row drafted nothing"
    weights.keep([1])
    other = MixtureWeights(1, 2, torch.device("cpu"))
    weights.join(other)
    assert weights.agreed.sum() == 0


def test_weights_of_rows_that_change_places_go_with_them() -> None:
    fixed = FixedWeights(2, [3, 1], torch.device("cpu"))
    fixed.keep([1])
    fixed.join(FixedWeights(1, [3, 1], torch.device("cpu")))
    assert fixed.now.tolist() == [[0.75, 0.25]] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_member_that_is_right_is_listened_to(pair: TinyPair, temperature: float) -> None:
    """The target itself beside a model that knows nothing: the draft becomes the target's."""
    stranger = AutoregressiveDrafter(tiny_pair(seed=1).target, pair.target)
    drafter = EnsembleDrafter([stranger, AutoregressiveDrafter(pair.target, pair.target)], pair.target)
    decoder = SpeculativeDecoder(pair.target, drafter, "fixed:6", strict=True)
    steps: list[Step] = []
    for seed in range(4):
        ids = pair.ids(PROMPTS[seed])
        made = decoder.generate(ids, max_new_tokens=40, temperature=temperature, seed=seed, eos_token_id=None)
        steps += made.steps[2:-1]
    accepted, verified = (sum(int(getattr(step, name)) for step in steps) for name in ("num_accepted", "verify_length"))
    assert accepted >= 0.9 * verified > 0


# Losslessness.


@pytest.mark.parametrize("weights", [None, (0.3, 0.7)], ids=["following", "fixed"])
@pytest.mark.parametrize("sampling", ["greedy", "T=1"])
def test_texts_of_rows_that_come_and_go_are_those_of_plain_decoding(
    reference: Reference, members: list[Drafter], sampling: str, weights: tuple[float, ...] | None
) -> None:
    target = reference.pair.target
    drafter = EnsembleDrafter(members, target, weights=weights)
    end, temperature = reference.end(sampling), 0.0 if sampling == "greedy" else 1.0
    decoder = SpeculativeDecoder(target, drafter, RandomPolicy(seed=1), strict=True)
    for batch_size in (1, 3):
        made = decoder.generate(
            [
                {"prompt": reference.pair.ids(PROMPTS[place]), "max_new_tokens": 1 + 7 * place % 23}
                for place in range(9)
            ],
            batch_size=batch_size,
            eos_token_id=end,
            seed=SEED if temperature else None,
            temperature=temperature,
            **({"top_k": 0, "top_p": 0.9} if temperature else {}),
        )
        for place, one in enumerate(made):
            assert one.error is None
            reference.text(sampling, place, end).near_tie_where_it_differs(one.tokens)


def test_rows_draft_together_what_each_drafts_alone(pair: TinyPair, members: list[Drafter]) -> None:
    drafter = EnsembleDrafter(members, pair.target, weights=(1, 2))
    with torch.inference_mode():
        assert sum(run(drafter, pair, seed) for seed in range(2)) > 5


@pytest.mark.slow
def test_outputs_under_rejection_have_the_targets_distribution() -> None:
    target = small_model(0)
    drafter = EnsembleDrafter([AutoregressiveDrafter(small_model(seed, spread=0.5), target) for seed in (1, 2)], target)
    decoder = SpeculativeDecoder(target, drafter, "fixed:3", rule="rejection", strict=True)
    assert min(p_values(decoder, exact_law(target))) > ENOUGH


def test_under_rejection_the_proposal_is_the_mixture(pair: TinyPair, members: list[Drafter]) -> None:
    drafter = EnsembleDrafter(members, pair.target, weights=(0.4, 0.6))
    ids, seen = pair.ids("def f(a"), []
    texts = [RunningText([RowText(ids, 60)]) for _ in range(3)]
    with torch.inference_mode():
        hidden = pair.target(ids, output_hidden_states=True).hidden_states
        for text, one in zip(texts, (*members, drafter), strict=True):
            session = one.begin(text)
            text.append(torch.tensor([[7]]), torch.tensor([[7]]), [[7]])
            layers = [hidden[layer + 1][0] for layer in one.feature_layers]
            session.advance([torch.cat(layers, dim=-1)] if layers else None)
            sampler = Sampler(text.rows[0], Processors(LogitsProcessorList()), None)
            seen.append(session.draft([2], Draw(Samplers([sampler])), None))
    first, second, both = (proposal.scores.softmax(-1) for proposal in seen if proposal.scores is not None)
    torch.testing.assert_close(both, 0.4 * first + 0.6 * second)


# Features, devices, traces.


def test_each_member_gets_its_own_layers() -> None:
    features = torch.arange(12.0).view(2, 6)
    (own,) = own_features([features], (1, 3, 8), (8, 1)) or ()
    assert own.tolist() == [[4, 5, 0, 1], [10, 11, 6, 7]]


def test_weights_follow_the_target_without_a_read_of_the_device(pair: TinyPair, members: list[Drafter]) -> None:
    prompt, options = "1, 2, 3, 1, 2,", {"max_new_tokens": 10, "temperature": 1.0, "seed": 5}
    drafter = EnsembleDrafter(members, pair.target)
    host = SpeculativeDecoder(pair.target, drafter, "fixed:4", tokenizer=pair.tokenizer)
    wanted = host.generate(prompt, **options).tokens[0].tolist()
    with SimulatedDevice() as device:
        target, there = copy.deepcopy((pair.target, members))
        for model in {id(model): model for model in (target, *(cast(Any, member).model for member in there))}.values():
            device.put(model)
        decoder = SpeculativeDecoder(
            target, EnsembleDrafter(there, target), "fixed:4", tokenizer=pair.tokenizer, capture="off", strict=True
        )
        reads = device.count(decoder, prompt, **options)
    assert list(reads.tokens) == wanted
    assert max(reads.steps) == 1, "policy `fixed` looks at nothing; one read after verification"


def test_only_fixed_weights_can_be_traced(pair: TinyPair, blocks: list[Drafter], plain: Any) -> None:
    options = TraceOptions(block_sizes=(3, 5), max_new_tokens=8)
    following = SpeculativeDecoder(pair.target, EnsembleDrafter(blocks, pair.target), tokenizer=pair.tokenizer)
    with pytest.raises(ValueError, match="drafts by what was drafted and verified before"):
        Tracer(following, options)
    fixed = SpeculativeDecoder(pair.target, EnsembleDrafter(blocks, pair.target, weights=(1, 1)))
    Tracer(fixed, options)
    swapped = SpeculativeDecoder(pair.target, EnsembleDrafter(blocks[::-1], pair.target, weights=(1, 1)))
    (_, one), (_, other) = map(fingerprint_models, (fixed, swapped))
    assert None is not one != other


# What may be written.


def test_an_ensemble_is_written_as_a_list_or_in_one_line(pair: TinyPair, tiny_folder: Path) -> None:
    paths = [str(tiny_folder / name) for name in ("assistant", "target")]
    spelled: list[Any] = [
        {"name": "ensemble", "members": paths},
        {"name": "ensemble", "members": [{"name": "autoregressive", "path": path} for path in paths]},
        f"ensemble:{'+'.join(paths)}",
        f"ensemble:members={'+'.join(paths)},weights=0.6+0.2",
    ]
    for spec in spelled:
        made = resolve_drafters(spec, pair.target)
        assert isinstance(made, EnsembleDrafter)
        assert [member.name for member in made.members] == paths
        assert made.kind == "ensemble"
        assert made.depends_on_steps is (made.weights is None)
    assert isinstance(made, EnsembleDrafter)
    assert made.weights == (0.6, 0.2)
    text = RunningText([RowText(torch.tensor([[1]]), 9)])
    session = made.begin(text)
    assert isinstance(session, AssistantsSession)
    torch.testing.assert_close(session.weights.now, torch.tensor([[0.75, 0.25]]))


def test_what_cannot_draft_together_is_refused(
    pair: TinyPair, blocks: list[Drafter], assistants: list[Drafter]
) -> None:
    def ensemble(*members: Drafter, weights: Sequence[float] | None = None) -> None:
        EnsembleDrafter(members, pair.target, weights=weights)

    with pytest.raises(ValueError, match=r"DFlash \(block-diffusion\) and assistant \(autoregressive\) cannot draft"):
        ensemble(blocks[0], assistants[0])
    with pytest.raises(ValueError, match=r"n-gram .* cannot be a member"):
        ensemble(blocks[0], NgramDrafter())
    with pytest.raises(ValueError, match="two members or more, got 1"):
        ensemble(blocks[0])
    with pytest.raises(ValueError, match=r"up to 4 members, and these are 5: .*weights=1\+1\+1\+1\+1"):
        ensemble(*blocks[:1] * 5)
    ensemble(*blocks[:1] * 5, weights=[1] * 5)
    for spec, said in {
        "ensemble": "members",
        "ensemble:members=ngram+ngram": "cannot be a member",
        "ensemble:members=ngram+ngram,weights=1": "2 members need as many weights",
        "ensemble:members=ngram+ngram,weights=0+0": "not all 0",
        "ensemble:members=ngram": "at least 2",
    }.items():
        with pytest.raises((ValueError, PolicyError), match=said):
            resolve_drafter(spec, pair.target)


def test_a_member_whose_positions_end_ends_the_drafts_of_all(pair: TinyPair, assistants: list[Any]) -> None:
    short = copy.copy(assistants[1])
    short.positions = 12
    decoder = SpeculativeDecoder(pair.target, EnsembleDrafter([assistants[0], short], pair.target), "fixed:5")
    with pytest.warns(UserWarning, match="has 12 positions"):
        made = decoder.generate(pair.ids("x = "), max_new_tokens=24, temperature=0, eos_token_id=None)
    alone = SpeculativeDecoder(pair.target, assistants[0], "fixed:5")
    assert made.tokens.equal(
        alone.generate(pair.ids("x = "), max_new_tokens=24, temperature=0, eos_token_id=None).tokens
    )
    assert int(made.steps[-1].draft_length) == 0 < int(made.steps[0].draft_length)


def test_what_policies_may_see_of_it(pair: TinyPair, members: list[Drafter]) -> None:
    drafter = EnsembleDrafter(members, pair.target)
    assert Feature.DRAFT_HIDDEN not in drafter.provides
    for policy in ("threshold", "svip", "goodput"):
        made = SpeculativeDecoder(pair.target, drafter, policy, strict=True).generate(
            pair.ids("x = "), max_new_tokens=9
        )
        assert made.tokens.shape[1] == 9


def test_the_mean_of_one_is_itself() -> None:
    own = torch.randn(2, 3, 1, 5).log_softmax(-1)
    torch.testing.assert_close(mixed(own, torch.zeros(1)), own[:, :, 0])
