"""The noise is a pure function of its key and independent between keys; what is drawn with it has the right law."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare, gumbel_r, kstest, poisson
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bpkit import Context, DecoderSpec, Draft, Feature, Policy, PolicyError, SpeculativeDecoder
from bpkit.decode import noise as noise_module
from bpkit.decode.drafter import Drafter
from bpkit.decode.noise import ACCEPT_SALT, DRAFT_SALT, POLICY_SALT, TARGET_SALT, GumbelNoise, uniform
from bpkit.decode.sampling import Processors, Sampler, Samplers, noisy
from bpkit.decode.text import RowText
from bpkit.decode.verify import Coupled, Rejection
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.policy import State
from bpkit.testing import AgreeableDrafter, TinyPair

CPU = torch.device("cpu")
ENOUGH = 1e-3  # the tests draw with fixed seeds: one that passes once passes always

# What the noise is.


def test_the_same_key_gives_the_same_noise_and_any_other_key_gives_other_noise() -> None:
    reference = GumbelNoise(3, 5, 50, CPU, salt=TARGET_SALT).at(7, 1)
    assert GumbelNoise(3, 5, 50, CPU, salt=TARGET_SALT).at(7, 1).equal(reference)
    others = [
        GumbelNoise(4, 5, 50, CPU).at(7, 1),
        GumbelNoise(3, 6, 50, CPU).at(7, 1),
        GumbelNoise(3, 5, 50, CPU).at(8, 1),
        GumbelNoise(5, 3, 50, CPU).at(7, 1),
        GumbelNoise(3, 7, 50, CPU).at(5, 1),
        *(GumbelNoise(3, 5, 50, CPU, salt=salt).at(7, 1) for salt in (DRAFT_SALT, ACCEPT_SALT, POLICY_SALT)),
    ]
    for one, other in itertools.combinations([reference, *others], 2):
        assert not (one == other).any()


def test_the_noise_is_what_it_was_in_earlier_versions() -> None:
    # Recorded outputs name a seed: the same seed must go on giving the same text.
    u = uniform(2**40 + 1, 12, 345, 2, 3, CPU, TARGET_SALT)
    assert u.dtype == torch.float64
    keys = [noise_module.hashed(2**40 + 1, 12, position, TARGET_SALT) for position in (345, 346)]
    for row, key in zip(u.tolist(), keys, strict=True):
        assert row == pytest.approx([splitmix(key, counter) for counter in (1, 2, 3)], rel=1e-15)


def splitmix(key: int, counter: int) -> float:
    """SplitMix64 after Steele, Lea & Flood 2014 in plain integers, scaled to (0, 1)."""
    mask = 2**64 - 1
    z = (key + counter * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return float(((z ^ (z >> 31)) + 0.5) * 2.0**-64)


def test_noise_in_chunks_equals_noise_at_once() -> None:
    whole = GumbelNoise(1, 2, 20, CPU).at(0, 12)
    chunks = GumbelNoise(1, 2, 20, CPU)
    assert torch.cat([chunks.at(0, 1), chunks.at(1, 5), chunks.at(6, 6)]).equal(whole)
    assert GumbelNoise(1, 2, 20, CPU).at(9, 3).equal(whole[9:])
    overlapping = GumbelNoise(1, 2, 20, CPU)
    for start, count in ((0, 8), (2, 8), (9, 1), (4, 8), (0, 12)):
        assert overlapping.at(start, count).equal(whole[start : start + count])


def test_forgetting_decided_positions_leaves_the_others_alone() -> None:
    whole = GumbelNoise(1, 2, 20, CPU).at(0, 40)
    some = GumbelNoise(1, 2, 20, CPU)
    some.at(0, 6)
    for keep_from, start, count in ((3, 3, 4), (6, 8, 3), (20, 20, 1), (25, 30, 10)):
        some.forget_before(keep_from)
        assert some.at(start, count).equal(whole[start : start + count])


def test_wider_vocabularies_extend_the_noise_of_narrower_ones() -> None:
    assert GumbelNoise(1, 2, 30, CPU).at(0, 3)[:, :20].equal(GumbelNoise(1, 2, 20, CPU).at(0, 3))


def test_the_tails_are_finite_and_reach_45(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = 0x9E3779B97F4A7C15
    monkeypatch.setattr(noise_module, "hashed", lambda *key: -golden % 2**64)  # the mixer maps 0 to 0
    lowest = uniform(0, 0, 0, 1, 1, CPU, TARGET_SALT)
    assert lowest.item() == 2.0**-65
    assert GumbelNoise(0, 0, 1, CPU).at(0, 1).item() == pytest.approx(45.05, abs=0.01)
    extremes = torch.tensor([[2.0**-65, 2.0**-60, 2.0**-30, 0.5, 1 - 2.0**-53]], dtype=torch.float64)
    monkeypatch.setattr(noise_module, "uniform", lambda *key: extremes)
    values = GumbelNoise(0, 0, 5, CPU).at(0, 1)[0]
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([45.054, 41.589, 20.794, 0.3665, -3.603], abs=1e-3)


def test_uniforms_stay_inside_0_and_1_and_keep_small_values_apart() -> None:
    u = uniform(5, 0, 0, 2000, 1000, CPU, TARGET_SALT).flatten()
    assert u.min() > 0
    assert u.max() < 1
    small = u[u < 1e-4]
    assert len(small) > 100
    # A float32 uniform is a multiple of 2^-24; ours must have bits far below that.
    assert ((small * 2**24) % 1 != 0).all()
    assert len(np.unique(u.numpy())) == len(u)


def test_the_noise_is_standard_gumbel_also_in_the_tail_that_decides() -> None:
    values = GumbelNoise(11, 0, 1000, CPU).at(0, 2000).flatten().double().numpy()
    assert kstest(values[:200_000], gumbel_r.cdf).pvalue > ENOUGH
    for height in (6.0, 9.0, 11.0):
        expected = len(values) * gumbel_r.sf(height)
        found = int((values > height).sum())
        assert poisson.cdf(found, expected) > ENOUGH
        assert poisson.sf(found - 1, expected) > ENOUGH


# What is drawn with it: single positions, and joints, since noise that is used twice passes the single positions.

P = torch.tensor([0.4, 0.3, 0.2, 0.1])
PAIRS = 3000
STEPS = {"next position": (0, 0, 1), "next seed": (1, 0, 0), "next stream": (0, 1, 0)}
DIAGONALS = {"next seed, earlier position": (1, 0, -1), "next stream, earlier position": (0, 1, -1)}


def drawn(keys: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """One token from P for each (seed, stream, position), as the coupled rule chooses it."""
    tokens = []
    for seed, stream, position in keys:
        noise = GumbelNoise(seed, stream, len(P), CPU)
        noise.forget_before(position)  # a fresh one would make the noise of all positions before as well
        tokens.append(int(noisy(P.log()[None, None], noise, position).argmax()))
    return np.array(tokens)


def start_keys(step: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Keys along the axis that the step moves on, two apart, so that each pair of neighbours is used once."""
    axis = next(i for i, moved in enumerate(step) if moved)
    base = [(40, 9, 3)] * PAIRS
    return [(*key[:axis], key[axis] + 2 * i, *key[axis + 1 :]) for i, key in enumerate(base)]  # type: ignore[misc]


def moved(keys: Sequence[tuple[int, int, int]], step: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    return [(s + step[0], r + step[1], t + step[2]) for s, r, t in keys]


def p_of_joint(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """p-value of independent draws from P."""
    counts = np.zeros((len(P), len(P)))
    np.add.at(counts, (first, second), 1)
    expected = len(first) * np.outer(P.double(), P.double())
    return float(chisquare(counts.ravel(), expected.ravel() * counts.sum() / expected.sum()).pvalue)


def p_of_single(tokens: NDArray[np.int64]) -> float:
    expected = len(tokens) * P.double().numpy()
    return float(chisquare(np.bincount(tokens, minlength=len(P)), expected / expected.sum() * len(tokens)).pvalue)


@pytest.mark.parametrize("step", [*STEPS.values(), *DIAGONALS.values()], ids=[*STEPS, *DIAGONALS])
def test_neighbours_are_drawn_independently_from_the_targets_distribution(step: tuple[int, int, int]) -> None:
    keys = start_keys(step)
    first, second = drawn(keys), drawn(moved(keys, step))
    assert p_of_single(first) > ENOUGH
    assert p_of_single(second) > ENOUGH
    assert p_of_joint(first, second) > ENOUGH


def test_one_key_for_all_positions_passes_single_positions_and_fails_the_joint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = noise_module.hashed
    monkeypatch.setattr(noise_module, "hashed", lambda seed, stream, t, salt: whole(seed, stream, 0, salt))
    keys = [(seed, 0, 3) for seed in range(PAIRS)]
    first, second = drawn(keys), drawn(moved(keys, STEPS["next position"]))
    assert p_of_single(first) > ENOUGH
    assert p_of_single(second) > ENOUGH
    assert p_of_joint(first, second) < 1e-12


def test_a_key_that_is_seed_plus_position_fails_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise_module.hashed
    monkeypatch.setattr(noise_module, "hashed", lambda seed, stream, t, salt: whole(seed + t, stream, 0, salt))
    keys = start_keys(STEPS["next position"])
    assert p_of_joint(drawn(keys), drawn(moved(keys, STEPS["next position"]))) > ENOUGH
    assert p_of_joint(drawn(keys), drawn(moved(keys, DIAGONALS["next seed, earlier position"]))) < 1e-12


def joint_of_bins(one: Tensor, other: Tensor) -> float:
    """p-value of independent uniforms, in 5 x 5 equal bins."""
    cells = ((one * 5).long() * 5 + (other * 5).long()).flatten()
    return float(chisquare(np.bincount(cells.numpy(), minlength=25)).pvalue)


@pytest.mark.parametrize("apart", [1, 2, 7])
def test_neighbouring_token_ids_have_independent_noise(apart: int) -> None:
    u = uniform(1, 1, 0, 100, 4000, CPU, TARGET_SALT)
    left = u.reshape(100, -1, 2 * apart)[:, :, :apart] if 4000 % (2 * apart) == 0 else u[:, : -apart : 2 * apart]
    right = u.reshape(100, -1, 2 * apart)[:, :, apart:] if 4000 % (2 * apart) == 0 else u[:, apart :: 2 * apart]
    right = right[:, : left.shape[1]]
    assert joint_of_bins(left, right) > ENOUGH


def test_token_ids_and_positions_on_a_diagonal_have_independent_noise() -> None:
    u = uniform(2, 1, 0, 2000, 200, CPU, TARGET_SALT)
    assert joint_of_bins(u[::2, :-1:2], u[1::2, 1::2]) > ENOUGH


@pytest.mark.parametrize("salts", [*itertools.combinations([TARGET_SALT, DRAFT_SALT, ACCEPT_SALT, POLICY_SALT], 2)])
def test_the_uses_of_the_noise_do_not_depend_on_each_other(salts: tuple[int, int]) -> None:
    one, other = (uniform(6, 0, 0, 400, 500, CPU, salt) for salt in salts)
    assert joint_of_bins(one, other) > ENOUGH


def one_row(prompt_length: int, output_length: int, noise: GumbelNoise) -> Samplers:
    """The sampler of a text of zeros."""
    text = RowText(torch.zeros(1, prompt_length, dtype=torch.long), 100)
    text.append([0] * output_length)
    return Samplers([Sampler(text, Processors(LogitsProcessorList()), noise)])


def test_the_draft_is_drawn_with_the_noise_that_the_target_will_use(pair: TinyPair) -> None:
    noise = GumbelNoise(5, 1, 100, CPU)
    rule = Coupled(one_row(4, 5, noise))
    logits = torch.randn(1, 3, 100, generator=torch.Generator().manual_seed(0))
    tokens, _ = rule.draw([4])(logits)
    wanted = (logits[0] + GumbelNoise(5, 1, 100, CPU).at(5, 3)).argmax(dim=-1)
    assert tokens[0].equal(wanted)


# The rejection rule by itself, on distributions that do not depend on the tokens before: cheap, hence many draws.

DISAGREEING = {
    "far apart": ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]),
    "too sure": ([0.4, 0.3, 0.2, 0.1], [0.02, 0.94, 0.02, 0.02]),
    "something impossible": ([0.5, 0.5 - 2e-9, 1e-9, 1e-9], [0.25, 0.25, 0.25, 0.25]),
    "equal": ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
}


def two_tokens(rule: Rejection, p: Tensor, q: Tensor, width: int) -> tuple[int, int]:
    """The first two tokens of decoding from p with drafts from q, `width` tokens at a time."""
    text, none = rule.samplers.rows[0].text, torch.zeros(1, dtype=torch.long)
    while text.length < 3:
        tokens, scores = rule.draw([width + 1])(q.log().expand(1, width, -1))
        context = Context(SPEC, none, none, none, torch.Generator())
        draft = Draft(context, none, none, tokens, scores)
        verdict = rule.verify(p.log().expand(1, width + 1, -1), draft, [width])
        text.append(verdict.tokens[0, : int(verdict.num_accepted) + 1].tolist())
    return text.tokens[1], text.tokens[2]


SPEC = DecoderSpec("target", "drafter", "block-diffusion", 8, 16, hidden_size=4, vocab_size=4, verify_rule="rejection")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("case", DISAGREEING)
def test_the_rejection_rule_draws_from_the_target_whatever_the_drafter_proposes(case: str, width: int) -> None:
    p, q = (torch.tensor(values) for values in DISAGREEING[case])
    counts = np.zeros((4, 4))
    draws = 2500
    for seed in range(draws):
        noise = GumbelNoise(seed, 0, 4, CPU)
        rule = Rejection(one_row(1, 0, noise))
        counts[two_tokens(rule, p, q, width)] += 1
    likely = [i for i in range(4) if p[i] > 1e-6]
    expected = draws * np.outer(p.double(), p.double())[np.ix_(likely, likely)]
    found = counts[np.ix_(likely, likely)]
    assert found.sum() == draws
    assert chisquare(found.ravel(), expected.ravel() * draws / expected.sum()).pvalue > ENOUGH


def test_the_rejection_rule_drafts_a_position_anew_with_fresh_noise() -> None:
    # After a rejection the positions behind it are drafted again. A policy may have learned from the entropies of the
    # first attempt which tokens they were; with the same noise it would know the second attempt before it decides.
    logits, same, seeds = torch.zeros(1, 3, 50), 0, 300
    for seed in range(seeds):
        rule = Rejection(one_row(1, 2, GumbelNoise(seed, 0, 50, CPU)))
        first, _ = rule.draw([4])(logits)
        rule.samplers.rows[0].text.append([0])
        second, _ = rule.draw([4])(logits)
        same += int((first[0, 1:] == second[0, :2]).sum())
    assert poisson.sf(same - 1, 2 * seeds / 50) > ENOUGH


# Real decoding on a vocabulary of three, against exact probabilities.

PROMPT = torch.tensor([[0, 1, 2, 0, 1]])
DRAWS = 600
LENGTH = 4


def small_model(seed: int, *, spread: float = 0.25) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return small_model(0)


@pytest.fixture(scope="module")
def law(small: PreTrainedModel) -> dict[tuple[int, ...], float]:
    return exact_law(small)


def exact_law(small: PreTrainedModel) -> dict[tuple[int, ...], float]:
    """Exact probability of every output of `LENGTH` tokens."""
    outputs = list(itertools.product(range(3), repeat=LENGTH))
    ids = torch.cat([PROMPT.expand(len(outputs), -1), torch.tensor(outputs)], dim=1)
    with torch.no_grad():
        log_p = small(ids).logits.double().log_softmax(dim=-1)[:, PROMPT.shape[1] - 1 : -1]
    p = log_p.gather(-1, torch.tensor(outputs)[..., None])[..., 0].sum(dim=1).exp()
    assert p.sum().item() == pytest.approx(1.0)
    return dict(zip(outputs, p.tolist(), strict=True))


def small_drafter(kind: str, target: PreTrainedModel) -> Drafter | str:
    if kind in {"ngram", "last-pass"}:
        return kind
    if kind == "another model":
        return AutoregressiveDrafter(small_model(1, spread=0.5), target)
    return AgreeableDrafter(target, corruption=float(kind.split()[0]) / 100)


def p_values(decoder: SpeculativeDecoder, law: dict[tuple[int, ...], float], draws: int = DRAWS) -> list[float]:
    """p-values of the joint of each pair of neighbouring tokens of real outputs.

    Rows run side by side, which takes a quarter of the time; the first few are decoded alone as well.
    """
    rows = [{"prompt": PROMPT, "seed": seed, "stream_id": 0} for seed in range(draws)]
    options: dict[str, Any] = {"max_new_tokens": LENGTH, "temperature": 1.0, "top_k": 0}
    outputs = [tuple(made.tokens[0].tolist()) for made in decoder.generate(rows, batch_size=50, **options)]
    for seed in range(20):
        assert outputs[seed] == tuple(decoder.generate(PROMPT, seed=seed, **options).tokens[0].tolist())
    found = Counter(outputs)
    values = []
    for at in range(LENGTH - 1):
        counts: Counter[tuple[int, ...]] = Counter()
        expected: Counter[tuple[int, ...]] = Counter()
        for output, p in law.items():
            counts[output[at : at + 2]] += found[output]
            expected[output[at : at + 2]] += p * draws  # type: ignore[assignment]
        assert min(expected.values()) > 5, "chi-square needs some in every cell"
        values.append(float(chisquare([counts[k] for k in expected], list(expected.values())).pvalue))
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "block_size"),
    [
        ("50 % wrong", 4),
        ("100 % wrong", 3),
        ("another model", 2),
        ("ngram", 4),
        ("last-pass", 4),
    ],
)
def test_outputs_under_rejection_have_the_targets_distribution(
    small: PreTrainedModel, law: dict[tuple[int, ...], float], drafter: str, block_size: int
) -> None:
    decoder = SpeculativeDecoder(small, small_drafter(drafter, small), f"fixed:{block_size}", rule="rejection")
    assert min(p_values(decoder, law)) > ENOUGH


@pytest.mark.slow
def test_outputs_under_rejection_with_a_stop_rule_have_the_targets_distribution(
    small: PreTrainedModel, law: dict[tuple[int, ...], float]
) -> None:
    decoder = SpeculativeDecoder(small, small_drafter("another model", small), "svip:0.9", rule="rejection")
    assert min(p_values(decoder, law)) > ENOUGH
    kept = [
        int(step.verify_length) - int(step.draft_length)
        for seed in range(20)
        for step in decoder.generate(PROMPT, max_new_tokens=12, temperature=1.0, top_k=0, seed=seed).steps[:-1]
    ]
    assert min(kept) < 0, "the rule never stopped anything"


class KeepsTheLikely(Policy):
    """Looks at the drafted tokens behind the runtime's back: verifies only those that the drafter finds likely."""

    wants = frozenset()

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(4)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        assert draft.logits is not None
        p = draft.logits.softmax(dim=-1).gather(-1, draft.tokens[..., None])[..., 0]
        return (p > 0.4).long().cumprod(dim=1).sum(dim=1)


@pytest.mark.slow
def test_a_policy_that_looks_at_the_drafted_token_biases_rejection_and_this_test_sees_it(
    small: PreTrainedModel, law: dict[tuple[int, ...], float]
) -> None:
    drafter = small_drafter("another model", small)
    biased = SpeculativeDecoder(small, drafter, KeepsTheLikely(), rule="rejection", strict=True)
    assert min(p_values(biased, law)) < 1e-6


@pytest.mark.slow
def test_the_coupled_rule_has_the_targets_distribution_even_under_a_policy_that_looks_at_the_drafted_token(
    small: PreTrainedModel, law: dict[tuple[int, ...], float]
) -> None:
    decoder = SpeculativeDecoder(small, small_drafter("another model", small), KeepsTheLikely(), strict=True)
    assert min(p_values(decoder, law)) > ENOUGH


class LooksAhead(Policy):
    """Judges the first drafted token by the entropy after it, which an autoregressive drafter computes from it."""

    wants = frozenset({Feature.DRAFT_ENTROPY})

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(3)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        entropy = draft[Feature.DRAFT_ENTROPY]
        return draft.draft_length.masked_fill((entropy[:, 1:2] > 0.65).any(dim=1), 0)


@pytest.mark.slow
def test_a_policy_that_looks_ahead_is_refused_under_rejection_or_leaves_the_distribution_alone(
    small: PreTrainedModel, law: dict[tuple[int, ...], float]
) -> None:
    drafter = small_drafter("another model", small)
    try:
        values = p_values(SpeculativeDecoder(small, drafter, LooksAhead(), rule="rejection", strict=True), law)
    except PolicyError as error:
        assert "draft_entropy" in str(error)  # noqa: PT017
    else:
        assert min(values) > ENOUGH


@pytest.mark.parametrize("feature", [Feature.DRAFT_PROBABILITY, Feature.DRAFT_TOKENS])
def test_rejection_refuses_what_is_computed_from_the_drafted_token_only_when_sampling(
    small: PreTrainedModel, feature: Feature
) -> None:
    class Looks(Policy):
        wants = frozenset({feature})

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(4)

    def generate(rule: str, **options: Any) -> Tensor:
        decoder = SpeculativeDecoder(small, small_drafter("50 % wrong", small), Looks(), rule=rule)
        return decoder.generate(PROMPT, max_new_tokens=8, **options).tokens

    with pytest.raises(PolicyError, match=rf"Looks looks at {feature}, which would bias.*use rule 'coupled'"):
        generate("rejection", temperature=0.8)
    assert generate("rejection", temperature=0).equal(generate("coupled", temperature=0))
    assert generate("coupled", temperature=0.8, seed=1).shape == (1, 8)


@pytest.mark.parametrize("feature", [Feature.DRAFT_PROBABILITY, Feature.DRAFT_TOKENS])
def test_rejection_refuses_an_optional_wish_too(small: PreTrainedModel, feature: Feature) -> None:
    class Glances(Policy):
        wants = frozenset()
        wants_optional = frozenset({feature})

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(4)

    decoder = SpeculativeDecoder(small, small_drafter("50 % wrong", small), Glances(), rule="rejection")
    with pytest.raises(PolicyError, match=str(feature)):
        decoder.generate(PROMPT, max_new_tokens=8, temperature=1.0)


def test_rejection_serves_policies_that_look_at_the_distribution_alone(small: PreTrainedModel) -> None:
    decoder = SpeculativeDecoder(small, small_drafter("50 % wrong", small), "svip", rule="rejection", strict=True)
    assert decoder.generate(PROMPT, max_new_tokens=8, temperature=0.8).tokens.shape == (1, 8)


def test_an_unknown_rule_lists_the_known_ones(small: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no verify rule 'typical'; the rules are: coupled, rejection"):
        SpeculativeDecoder(small, "ngram", rule="typical")
