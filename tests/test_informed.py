"""Choices by the confidences of drafts of all sizes: calibrated, priced, and never better than the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.cost import CostTable
from bpkit.trace.oracle.informed import FROM_A_PROMPT, Informed, calibrate, has_confidences
from bpkit.trace.oracle.paths import Path, best_fixed, fixed_path, oracle_step_truncate
from bpkit.trace.records import PromptTrace
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION, NGRAM, Feature, work_of

pytest.importorskip("sklearn")

COST = CostTable(draft={2: 0.2, 8: 0.4}, verify={1: 1.0, 4: 1.2, 8: 1.8}, rest=0.05)


def greedy(index: int, confident: Callable[[PromptTrace], np.ndarray] | None = None) -> PromptTrace:
    """A made-up prompt without chances; its confidences are those given, or noisy views of the chances."""
    prompt = synthetic_prompt(index, output_length=40, max_new_tokens=40)
    features = prompt.drafts.features
    if confident is not None:
        probability = confident(prompt).astype(np.float32)
        features = {Feature.DRAFT_PROBABILITY: probability, Feature.DRAFT_ENTROPY: -np.log(probability)}
    return replace(prompt, drafts=replace(prompt.drafts, match_probability=None, features=features))


def honest(prompt: PromptTrace) -> np.ndarray:
    """The chances themselves."""
    assert prompt.drafts.match_probability is not None
    return prompt.drafts.match_probability


def sure(prompt: PromptTrace) -> np.ndarray:
    """Near 1 where a token stands, near 0 where it does not."""
    return np.where(prompt.drafts.tokens == 1, 0.999, 0.001)


def steps_of(path: Path) -> list[tuple[int, int]]:
    return list(zip(path.block_size.tolist(), path.verify_length.tolist(), strict=True))


def test_chances_are_calibrated() -> None:
    calibration = calibrate([greedy(i) for i in range(30)], seed=0)
    assert calibration is not None
    predicted, true = [], []
    for index in range(30, 40):
        chance = synthetic_prompt(index, output_length=40, max_new_tokens=40).drafts.match_probability
        assert chance is not None
        survival = calibration.survival(greedy(index))
        assert survival.shape == chance.shape
        assert ((survival >= 0) & (survival <= 1)).all()
        assert (np.diff(survival, axis=2) <= 0).all()
        assert (survival[np.isnan(chance)] == 0).all()
        predicted += survival[:, :, 0].ravel().tolist()
        true += chance[:, :, 0].ravel().tolist()
    off = np.abs(np.array(predicted) - np.array(true))
    assert off.mean() < 0.06
    assert np.mean(predicted) == pytest.approx(np.mean(true), abs=0.03)


@pytest.mark.parametrize("kind", [BLOCK_DIFFUSION, AUTOREGRESSIVE, NGRAM])
def test_confidences_win_something_and_less_than_the_oracle(kind: str) -> None:
    calibration = calibrate([greedy(i, honest) for i in range(20)], seed=0)
    assert calibration is not None
    test = [greedy(i, honest) for i in range(40, 70)]
    best = best_fixed(test, work_of(kind), COST)
    fixed = sum(fixed_path(prompt, work_of(kind), COST, *best).seconds for prompt in test)
    price = sum(prompt.decided_by_steps for prompt in test) / fixed
    paths = [Informed(p, work_of(kind), COST, calibration.survival(p)).path(price) for p in test]
    least = [oracle_step_truncate(prompt, work_of(kind), COST).seconds for prompt in test]
    assert all(path.seconds >= fewest - 1e-9 for path, fewest in zip(paths, least, strict=True))
    assert sum(path.seconds for path in paths) < 0.97 * fixed


def test_who_is_told_which_tokens_stand_misses_only_what_lies_beyond_the_step() -> None:
    calibration = calibrate([greedy(i, sure) for i in range(10)], seed=0)
    assert calibration is not None
    test = [greedy(i, sure) for i in range(10, 18)]
    least = sum(oracle_step_truncate(p, work_of(BLOCK_DIFFUSION), COST).seconds for p in test)
    price = sum(p.decided_by_steps for p in test) / least
    told = sum(Informed(p, work_of(BLOCK_DIFFUSION), COST, calibration.survival(p)).path(price).seconds for p in test)
    assert least <= told < 1.15 * least


def test_the_price_of_time_decides_how_much_is_drafted() -> None:
    prompt = greedy(0)
    survival = np.zeros((*prompt.drafts.draft_length.shape, 7))
    survival[:, -1] = 0.8 ** np.arange(1, 8)  # of size 8
    informed = Informed(prompt, work_of(BLOCK_DIFFUSION), COST, survival)
    assert steps_of(informed.path(0.01))[0] == (8, 7)
    # The last four tokens are worth .41 + .33 + .26 + .21 and cost .6 seconds.
    assert steps_of(informed.path(1.0))[0] == (8, 7)
    assert steps_of(informed.path(3.0))[0] == (8, 3)
    assert set(steps_of(informed.path(10.0))) == {(1, 0)}


def test_who_has_confidences() -> None:
    prompt = greedy(0)
    assert has_confidences(prompt)
    assert not has_confidences(synthetic_prompt(0)), "sampled"
    without = {Feature.DRAFT_PROBABILITY: prompt.drafts.features[Feature.DRAFT_PROBABILITY]}
    assert not has_confidences(replace(prompt, drafts=replace(prompt.drafts, features=without)))


def test_nothing_is_learned_where_nothing_differs() -> None:
    assert calibrate([], seed=0) is None
    prompt = greedy(0)
    falls = replace(prompt, drafts=replace(prompt.drafts, num_accepted=np.zeros_like(prompt.drafts.num_accepted)))
    assert calibrate([falls], seed=0) is None
    short = synthetic_prompt(0, output_length=2, max_new_tokens=2)  # one token to decide, which comes either way
    assert calibrate([replace(short, drafts=replace(short.drafts, match_probability=None))], seed=0) is None


def test_the_same_seed_learns_the_same_of_no_more_than_it_should() -> None:
    long = synthetic_prompt(0, output_length=200, max_new_tokens=200)
    long = replace(long, drafts=replace(long.drafts, match_probability=None))
    one, two, other = (calibrate([long], seed=seed) for seed in (1, 1, 2))
    assert one is not None
    assert two is not None
    assert other is not None
    assert one.tokens == FROM_A_PROMPT
    assert (one.survival(long) == two.survival(long)).all()
    assert (one.survival(long) != other.survival(long)).any()
