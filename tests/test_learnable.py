"""The permutation test finds what is there, finds nothing where there is nothing, and says so where it cannot tell."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bpkit.judge.evaluation.learnable import FEWEST_PROMPTS, learnable

Floats = NDArray[np.float64]

SIZES = (2, 4, 8, 12, 16)


def data(prompts: int, effect: float, seed: int, noise: float = 0.08) -> tuple[Floats, Floats, Floats]:
    """Features, seconds and tokens. The first of 24 features moves the best size by `effect` doublings.

    Prompts differ in speed and length, as real ones do, and neither says anything of the best size.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts, 24))
    tokens = rng.integers(40, 200, prompts).astype(np.float64)
    best = np.log2(7) + effect * features[:, :1]
    slow = np.exp(rng.normal(0, 0.3, (prompts, 1)))
    curve = 1 + 0.08 * (np.log2(SIZES) - best) ** 2
    per_token = 0.01 * slow * curve * np.exp(rng.normal(0, noise, curve.shape))
    return features, per_token * tokens[:, None], tokens


def test_planted_structure_is_found() -> None:
    found = learnable(*data(100, 1.0, 0), SIZES, permutations=39)
    assert found["p_value"] == 1 / 40
    assert found["gain"] > 0.02
    assert found["gain_interval"][0] > 0
    assert found["null_interval"][1] < found["gain"]
    assert found["in_sample_oracle_gain"] > found["gain"]
    assert "learnable" in found["note"]


@pytest.mark.slow
def test_p_values_are_honest_where_features_say_nothing() -> None:
    """At most as many small p-values as their size says, though the in-sample oracle promises 4% each time."""
    found = [learnable(*data(60, 0.0, seed), SIZES, permutations=19, seed=seed) for seed in range(16)]
    p_values = np.array([f["p_value"] for f in found])
    assert (p_values <= 0.1).sum() <= 4  # 1.6 expected; more than 4 has a chance of 1%
    assert np.unique(p_values).size > 3
    assert abs(np.mean([f["gain"] for f in found])) < 0.005
    assert all(f["in_sample_oracle_gain"] is not None and f["in_sample_oracle_gain"] > 0.02 for f in found)


def test_what_is_learned_on_all_prompts_alike_is_no_gain() -> None:
    """One size is best for every prompt by far: the choice is that size, and the gain exactly none."""
    features, seconds, tokens = data(40, 0.0, 0, noise=0.01)
    seconds[:, 2] /= 3
    found = learnable(features, seconds, tokens, SIZES, permutations=9)
    assert found["gain"] == 0
    assert found["p_value"] == 1
    assert found["in_sample_oracle_gain"] == pytest.approx(0)
    assert "nothing was learned" in found["note"]


def test_the_score_is_a_ratio_of_sums_on_held_out_prompts() -> None:
    """A feature that tells two kinds of prompts apart: with the right size each, the oracle's gain is reached."""
    kind = np.arange(60) % 2
    tokens = np.where(kind, 300.0, 100.0)
    seconds = np.where(kind[:, None] == [0, 1], 1.0, 2.0) * tokens[:, None]
    found = learnable(np.eye(2)[kind], seconds, tokens, (4, 8), permutations=19)
    # Best fixed is size 8, as its prompts are longer: 30 * (200 + 300) seconds against 30 * (100 + 300).
    assert found["gain"] == pytest.approx(500 / 400 - 1)
    assert found["in_sample_oracle_gain"] == pytest.approx(500 / 400 - 1)
    assert found["p_value"] == 1 / 20


def test_units_and_order_of_features_do_not_matter() -> None:
    features, seconds, tokens = data(50, 1.0, 3)
    plain = learnable(features, seconds, tokens, SIZES, permutations=5)
    scaled = learnable(features * 1000 + 7, seconds * 60, tokens, SIZES, permutations=5)
    assert plain["gain"] == pytest.approx(scaled["gain"])


def test_more_features_than_prompts_are_no_trouble() -> None:
    features, seconds, tokens = data(40, 0.0, 1)
    wide = np.concatenate([features, np.random.default_rng(0).normal(size=(40, 400))], axis=1)
    found = learnable(wide, seconds, tokens, SIZES, permutations=9)
    assert found["p_value"] > 0.1


def test_the_same_seed_gives_the_same_answer_as_plain_json() -> None:
    first = learnable(*data(40, 0.5, 0), SIZES, permutations=9, seed=4)
    again = learnable(*data(40, 0.5, 0), SIZES, permutations=9, seed=4)
    assert json.loads(json.dumps(first, allow_nan=False)) == again
    assert (first["prompts"], first["permutations"], first["folds"]) == (40, 9, 5)


def test_too_little_to_tell_is_said_and_not_guessed() -> None:
    features, seconds, tokens = data(FEWEST_PROMPTS - 1, 1.0, 0)
    few = learnable(features, seconds, tokens, SIZES)
    assert (few["gain"], few["p_value"], few["null_interval"], few["permutations"]) == (None, None, None, 0)
    assert f"{FEWEST_PROMPTS - 1} prompts are too few" in few["note"]
    features, seconds, tokens = data(30, 1.0, 0)
    assert "too few" in learnable(features, seconds, tokens, SIZES, folds=20)["note"]
    assert "one block size" in learnable(features, seconds[:, :1], tokens, SIZES[:1])["note"]
    assert "the same for all" in learnable(np.ones_like(features), seconds, tokens, SIZES)["note"]
    assert learnable(features[:0], seconds[:0], tokens[:0], SIZES)["gain"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((30, 24), np.nan)}, "features must be finite"),
        ({"seconds": np.zeros((30, 5))}, "seconds must be finite and more than 0"),
        ({"tokens": np.zeros(30)}, "tokens must be finite and more than 0"),
        ({"seconds": np.ones((30, 4))}, r"seconds \(30, 4\)"),
        ({"permutations": 0}, "a permutation and 2 folds"),
        ({"folds": 1}, "a permutation and 2 folds"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    features, seconds, tokens = data(30, 0.0, 0)
    given = {"features": features, "seconds": seconds, "tokens": tokens, "sizes": SIZES, **change}
    with pytest.raises(ValueError, match=message):
        learnable(**given)


def test_progress_is_told_of_each_permutation() -> None:
    told: list[Any] = []

    class Bar:
        def start(self, phase: str, total: int) -> None:
            told.append((phase, total))

        def tick(self) -> None:
            told.append("tick")

    learnable(*data(30, 0.0, 0), SIZES, permutations=4, progress=Bar())
    assert told == [("permutation test", 4), *["tick"] * 4]
