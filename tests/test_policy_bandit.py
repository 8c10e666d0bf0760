"""`bandit` and `ucb`: the estimate, the choice, the memory, and both in a simulated decoder."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from bpkit_bandit.arm import Arm, pooled_rate
from bpkit_bandit.bandit import UCB, BanditConfig, Learner, Thompson

from bpkit.policy import PolicyError, validated
from bpkit.registry.discovery import build
from bpkit.registry.resolve import parse_spec
from bpkit.types import Step
from tests import records
from tests.records import context, decoder

KINDS = [Thompson, UCB]


def step(block_size: list[int], acceptance_length: list[int], seconds: float) -> Step:
    return records.step([size - 1 for size in block_size], [length - 1 for length in acceptance_length], seconds)


def arm_of(steps: Sequence[tuple[float, float]]) -> Arm:
    arm = Arm()
    for tokens, seconds in steps:
        arm.add(tokens, seconds)
    return arm


def taught(policy: Learner, steps: dict[int, list[tuple[int, float]]]) -> Learner:
    """The policy after steps of (tokens, seconds) with each block size."""
    policy.bind(decoder())
    for block_size, outcomes in steps.items():
        for tokens, seconds in outcomes:
            policy.observe({}, step([block_size], [tokens], seconds))
    return policy


def picks(policy: Learner, times: int, seed: int = 0) -> Counter[int]:
    """How often each block size is selected, with nothing learned in between."""
    now = context(seed=seed)
    return Counter(int(policy.select({}, now)) for _ in range(times))


# options --------------------------------------------------------------------------------------------------------


def test_hook_modules_and_options_load_without_torch() -> None:
    code = "import bpkit_bandit, bpkit_bandit.bandit, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_names_load_their_classes_and_options() -> None:
    policies = build([EntryPoint("bandit", "bpkit_bandit", "bpkit")]).policies
    here = {"bandit": Thompson, "ucb": UCB}
    assert {name: policies[name].load() for name in here} == here
    assert {name: policies[name].load_config() for name in here} == {"bandit": Thompson.Config, "ucb": UCB.Config}


@pytest.mark.parametrize("text", ["1;4;8", "1+4+8", "8+4", "4 + 8 + 4"])
def test_block_sizes_are_read_from_the_command_line(text: str) -> None:
    spec = parse_spec(f"bandit:{text},min_pulls=3")
    config = validated(BanditConfig, {"block_sizes": spec[""], "min_pulls": spec["min_pulls"]}, owner="bandit")
    assert config == BanditConfig(block_sizes=(1, 4, 8), min_pulls=3)


@pytest.mark.parametrize("given", [8, "8", [8], (1, 8)])
def test_the_no_draft_arm_is_always_there(given: object) -> None:
    assert Thompson(block_sizes=given).config.block_sizes == (1, 8)


@pytest.mark.parametrize("given", ["", "4+x", "0+4", [], -2])
def test_impossible_block_sizes_are_refused(given: object) -> None:
    with pytest.raises(PolicyError, match="block_sizes"):
        Thompson(block_sizes=given)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_the_decoder_cannot_draft_are_never_chosen(kind: type[Learner]) -> None:
    policy = kind(block_sizes=(4, 8, 16))
    policy.bind(decoder(largest=8))
    # Size 16 was fast once, with another decoder.
    policy.arms[16] = arm_of([(16, 0.01)] * 5)
    chosen: set[int] = set()
    for seed in range(60):
        sizes = policy.select({}, context(seed=seed))
        chosen.update(sizes.tolist())
        policy.observe({}, step(sizes.tolist(), [1], 0.1))
    assert chosen == {1, 4, 8}


# the estimate ---------------------------------------------------------------------------------------------------

LONG_STEPS_HURT = [(1, 0.1), (10, 10.0)]  # tokens/s of the steps: 10 and 1; of the text: 11 / 10.1
STEADY = [(4, 2.0), (4, 2.0)]  # 2 and 2; 8 / 4


def test_the_rate_is_a_ratio_of_sums() -> None:
    mean_of_ratios = [sum(t / s for t, s in steps) / 2 for steps in (LONG_STEPS_HURT, STEADY)]
    assert mean_of_ratios[0] > mean_of_ratios[1], "the mean of ratios would choose the slower arm"
    hurt, steady = arm_of(LONG_STEPS_HURT), arm_of(STEADY)
    assert hurt.rate == pytest.approx(11 / 10.1)
    assert steady.rate == pytest.approx(2.0)
    assert pooled_rate([hurt, steady, Arm()]) == pytest.approx(19 / 14.1)


def test_the_faster_text_is_chosen_and_not_the_faster_mean_step() -> None:
    policy = taught(UCB(block_sizes=(4, 8), exploration=0), {1: [(1, 9.0)] * 2, 4: LONG_STEPS_HURT, 8: STEADY})
    assert policy.select({}, context()).tolist() == [8]
    sampled = taught(Thompson(block_sizes=(4, 8)), {1: [(1, 9.0)] * 90, 4: LONG_STEPS_HURT * 90, 8: STEADY * 90})
    assert picks(sampled, 200)[8] == 200


def test_the_spread_is_that_of_the_single_deviations() -> None:
    steps = [(1.0, 0.2), (5.0, 0.3), (3.0, 0.25), (7.0, 0.31)]
    arm = arm_of(steps)
    mean_seconds = sum(s for _, s in steps) / 4
    deviations = [(t - arm.rate * s) / mean_seconds for t, s in steps]
    typical = 12.0
    expected = math.sqrt((sum(e * e for e in deviations) + typical**2) / 5)
    assert arm.spread(typical) == pytest.approx(expected)


def test_the_standard_error_is_the_scatter_of_the_rate() -> None:
    """The delta method against 400 repetitions of 300 steps."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 9, (400, 300), generator=generator).double()
    seconds = 0.02 + 0.01 * torch.rand(400, 300, generator=generator).double() + 0.001 * tokens
    scatter = float((tokens.sum(1) / seconds.sum(1)).std())
    arm = arm_of(list(zip(tokens[0].tolist(), seconds[0].tolist(), strict=True)))
    assert arm.spread(typical_rate=0.0) / math.sqrt(arm.count) == pytest.approx(scatter, rel=0.15)


def test_steps_that_are_all_alike_leave_some_doubt_at_first() -> None:
    few, many = arm_of([(1, 0.1)] * 2), arm_of([(1, 0.1)] * 2000)
    assert few.spread(typical_rate=10.0) / math.sqrt(2) > 4.0
    assert 0 < many.spread(typical_rate=10.0) / math.sqrt(2000) < 0.01


def test_an_unlucky_start_does_not_shut_an_arm_out() -> None:
    """Two steps of one token each look certain and slow; the arm in fact yields 1 or 7."""
    policy = taught(Thompson(block_sizes=(4, 8)), {1: [(1, 0.1)] * 20, 4: [(2, 0.1)] * 20, 8: [(1, 0.1)] * 2})
    picked = picks(policy, 1000)
    assert picked[8] > 10
    assert picked[4] > picked[8] > picked[1]


# what a step teaches --------------------------------------------------------------------------------------------


def test_each_row_charges_its_arm_with_its_part_of_the_time() -> None:
    policy = Thompson(block_sizes=(4, 8))
    policy.bind(decoder())
    policy.observe({}, step([4, 8, 4], [3, 6, 1], seconds=0.6))
    four, eight = policy.arms[4], policy.arms[8]
    assert (four.pulls, four.tokens, four.tokens_squared) == (2, 4, 10)
    assert [four.seconds, four.seconds_squared, four.tokens_seconds] == pytest.approx([0.4, 0.08, 0.8])
    assert [eight.pulls, eight.tokens, eight.seconds] == pytest.approx([1, 6, 0.2])
    assert policy.arms[1] == Arm()


@pytest.mark.parametrize("seconds", [0.0, math.nan, math.inf, -1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_clock_teaches_nothing(kind: type[Learner], seconds: float) -> None:
    policy = taught(kind(block_sizes=(4,)), {1: [(1, 0.1)] * 3})
    before = policy.state_dict()
    policy.observe({}, step([4], [3], seconds))
    assert policy.state_dict() == before
    assert policy.select({}, context()).tolist() == [4], "still untried"


def test_a_block_size_that_is_no_arm_is_ignored() -> None:
    policy = taught(Thompson(block_sizes=(4,)), {4: [(2, 0.1)]})
    policy.observe({}, step([5, 4], [5, 3], 0.2))
    assert set(policy.arms) == {1, 4}
    assert policy.arms[4].tokens == 5


def test_discount_forgets_all_arms_alike_and_the_rate_follows_the_present() -> None:
    policy = taught(Thompson(block_sizes=(4,), discount=0.9), {1: [(1, 0.1)], 4: [(1, 0.1)] * 50 + [(4, 0.1)] * 50})
    assert policy.arms[4].pulls == 100
    assert policy.arms[4].count == pytest.approx(10, rel=0.01)  # 1 / (1 - 0.9)
    assert policy.arms[4].rate == pytest.approx(40, rel=0.01)
    assert policy.arms[1].count == pytest.approx(0.9**100)
    assert policy.arms[1].rate == pytest.approx(10)
    assert taught(Thompson(block_sizes=(4,)), {4: [(1, 0.1)] * 50 + [(4, 0.1)] * 50}).arms[4].rate == pytest.approx(25)


def test_forgetting_keeps_the_spread_of_the_steps() -> None:
    arm, same = arm_of([(1.0, 0.2), (5.0, 0.3)] * 500), arm_of([(1.0, 0.2), (5.0, 0.3)] * 500)
    arm.forget(0.5)
    assert (arm.pulls, arm.count) == (1000, 500)
    assert arm.rate == pytest.approx(same.rate)
    assert arm.spread(0.0) == pytest.approx(same.spread(0.0), rel=0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_an_arm_that_was_forgotten_is_tried_again(kind: type[Learner]) -> None:
    policy = taught(kind(block_sizes=(4,), discount=0.5), {1: [(1, 0.1)] * 2, 4: [(4, 0.1)] * 60})
    assert picks(policy, 50) == {1: 50}


# the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_arm_is_tried_before_any_comparison(kind: type[Learner]) -> None:
    policy = kind(block_sizes=(1, 2, 4, 8), min_pulls=3)
    policy.bind(decoder())
    pulled: list[Any] = []
    for seed in range(12):
        sizes = policy.select({}, context(seed=seed)).tolist()
        policy.observe({}, step(sizes, [sizes[0]], 0.1))  # size 8 is by far the best from the start
        pulled += sizes
    assert Counter(pulled) == {1: 3, 2: 3, 4: 3, 8: 3}
    assert (pulled == sorted(pulled)) == (kind is UCB), "bandit tries in random order, ucb smallest first"


def test_thompson_draws_from_the_generator_of_the_context() -> None:
    policy = taught(Thompson(block_sizes=(4, 8)), {1: [(1, 0.1)] * 3, 4: [(1, 0.1)] * 3, 8: [(1, 0.1)] * 3})
    unused = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        now = context(seed=seed)
        runs.append([int(policy.select({}, now)) for _ in range(64)])
    assert torch.equal(torch.get_rng_state(), unused)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert min(Counter(runs[0])[size] for size in (1, 4, 8)) > 8, "arms that look alike are chosen alike"


def test_thompson_chooses_an_arm_as_often_as_it_is_likely_to_be_the_best() -> None:
    policy = taught(Thompson(block_sizes=(4,)), {1: [(1, 0.1), (1, 0.13)] * 4, 4: [(1, 0.1), (2, 0.13), (1, 0.13)] * 2})
    typical = pooled_rate(policy.arms.values())
    one, four = policy.arms[1], policy.arms[4]
    variance = sum(arm.spread(typical) ** 2 / arm.count for arm in (one, four))
    likely = 0.5 * (1 + math.erf((four.rate - one.rate) / math.sqrt(2 * variance)))
    assert 0.55 < likely < 0.95
    assert picks(policy, 4000)[4] / 4000 == pytest.approx(likely, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_batch_get_one_size(kind: type[Learner]) -> None:
    policy = kind()
    policy.bind(decoder())
    now = context(batch=3)
    for _ in range(30):
        sizes = policy.select({}, now)
        assert (sizes.dtype, sizes.shape, len(set(sizes.tolist()))) == (torch.int64, (3,), 1)
        policy.observe({}, step(sizes.tolist(), [1, 1, 1], 0.1))


def test_ucb_is_the_rate_and_the_bonus() -> None:
    steps = {1: [(1, 0.1)] * 40, 4: [(2, 0.1), (1, 0.12)] * 20, 8: [(1, 0.1), (2, 0.2)] * 2}
    arms = taught(UCB(block_sizes=(4, 8)), steps).arms
    typical = pooled_rate(arms.values())
    bonus = {size: arm.spread(typical) * math.sqrt(2 * math.log(84) / arm.pulls) for size, arm in arms.items()}
    even = (arms[4].rate - arms[8].rate) / (bonus[8] - bonus[4])  # here the two bounds are equal
    assert 0.1 < even < 10
    for exploration, chosen in ((0, 4), (0.99 * even, 4), (1.01 * even, 8)):
        policy = taught(UCB(block_sizes=(4, 8), exploration=exploration), steps)
        assert policy.select({}, context(batch=3)).tolist() == [chosen] * 3


# in a simulated decoder -----------------------------------------------------------------------------------------


class SimulatedDecoder:
    """Every drafted token stands with probability 0.8; a position costs 4 ms, a step 20 ms more."""

    stands, step_seconds, position_seconds = 0.8, 0.020, 0.004

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def rate(self, block_size: int) -> float:
        """Tokens per second in the long run."""
        acceptance_length = sum(self.stands**k for k in range(block_size))
        return acceptance_length / (self.step_seconds + self.position_seconds * block_size)

    def run(self, block_sizes: list[int]) -> Step:
        accepted = []
        for block_size in block_sizes:
            n = 1
            while n < block_size and self.random.random() < self.stands:
                n += 1
            accepted.append(n)
        cost = sum(self.step_seconds + self.position_seconds * b for b in block_sizes)
        return step(block_sizes, accepted, cost * self.random.uniform(0.8, 1.2))


def simulate(policy: Learner, seed: int, steps: int = 2000, batch: int = 1) -> list[int]:
    """The block sizes that the policy chooses, row by row."""
    simulated, now = SimulatedDecoder(seed), context(batch, seed)
    chosen: list[Any] = []
    policy.bind(decoder())
    state = policy.begin(now)
    for _ in range(steps):
        sizes = policy.select(state, now).tolist()
        policy.observe(state, simulated.run(sizes))
        chosen += sizes
    return chosen


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_arm_is_found(kind: type[Learner], seed: int) -> None:
    simulated = SimulatedDecoder(seed)
    sizes = (1, 2, 5, 12, 16)
    best = max(sizes, key=simulated.rate)
    assert best == 5, "not the largest, which has the highest acceptance length"
    chosen = simulate(kind(block_sizes=sizes), seed)
    assert set(chosen) == set(sizes)
    assert chosen[-500:].count(best) > 350


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_arm_is_found_by_a_batch(kind: type[Learner], seed: int) -> None:
    chosen = simulate(kind(block_sizes=(1, 2, 5, 16)), seed, steps=700, batch=3)
    assert chosen[-600:].count(5) > 400


@pytest.mark.parametrize("kind", KINDS)
def test_choices_repeat_under_a_seed(kind: type[Learner]) -> None:
    runs = [simulate(kind(), seed, steps=150) for seed in (7, 7, 8)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


# the memory -----------------------------------------------------------------------------------------------------

LEARNED = {1: [(1, 0.1)] * 5, 4: [(3, 0.11), (1, 0.12), (4, 0.12)], 8: [(2, 0.2), (8, 0.21)]}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_survives_json(kind: type[Learner]) -> None:
    policy = taught(kind(block_sizes=(4, 8), discount=0.99), LEARNED)
    stored = json.loads(json.dumps(policy.state_dict()))
    assert stored == policy.state_dict(), "plain JSON values"
    assert stored["schema_version"] == 1
    assert list(stored["arms"]) == ["1", "4", "8"]
    fresh = kind(block_sizes=(4, 8), discount=0.99)
    fresh.load_state_dict(stored)
    fresh.bind(decoder())
    assert fresh.arms == policy.arms
    assert picks(fresh, 50) == picks(policy, 50)
    fresh.observe({}, step([4], [2], 0.1))
    assert policy.state_dict() == stored, "the two share nothing"


def test_memory_of_one_bandit_serves_the_other_and_new_arms_start_untried() -> None:
    other = UCB(block_sizes=(4, 8, 12))
    other.load_state_dict(taught(Thompson(block_sizes=(4, 8)), LEARNED).state_dict())
    other.bind(decoder())
    assert other.arms[4].pulls == 3
    assert other.select({}, context()).tolist() == [12]


def test_memory_is_learned_from_the_file_and_saved_as_promised(tmp_path: Path) -> None:
    path = tmp_path / "new" / "memory.json"
    options: dict[str, Any] = {"block_sizes": (4, 8), "memory": str(path), "save_every": 4}
    policy = Thompson(**options)
    policy.bind(decoder())
    policy.end({})
    assert not path.exists(), "there was nothing to save"

    def pulls_in_file() -> int:
        return int(json.loads(path.read_text())["arms"]["4"]["pulls"])

    for n in range(1, 7):
        policy.observe({}, step([4], [3], 0.1))
        assert path.exists() == (n >= 4)
    assert pulls_in_file() == 4
    policy.end({})
    assert pulls_in_file() == 6
    policy.observe({}, step([4], [3], 0.1))
    policy.save()
    assert pulls_in_file() == 7
    assert [p.name for p in path.parent.iterdir()] == ["memory.json"], "no temporary file is left"
    again = Thompson(**options)
    again.bind(decoder())
    assert again.arms == policy.arms


def test_a_save_that_fails_leaves_the_old_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.json"
    policy = taught(Thompson(block_sizes=(4, 8)), LEARNED)
    policy.save(path)
    old = path.read_text()
    policy.observe({}, step([4], [3], 0.1))

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        policy.save(path)
    assert path.read_text() == old
    monkeypatch.undo()
    policy.save(path)
    assert path.read_text() != old


def test_without_a_file_nothing_is_saved_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    policy = taught(Thompson(block_sizes=(4,), save_every=1), {4: [(2, 0.1)] * 3})
    policy.end({})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PolicyError, match="memory"):
        policy.save()


ARM = '{"pulls": 1, "count": 1, "tokens": 2, "seconds": 0.1}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "cannot be read as JSON"),
        ("[]", r"\(Input should be"),
        ('{"learned_with": {}}', "arms: Field required"),
        ('{"schema_version": 2, "arms": {}}', "schema_version"),
        ('{"arms": {"4": {"pulls": -1}}}', "arms.4.pulls"),
        ('{"arms": {"4": {"tokens": NaN}}}', "arms.4.tokens"),
        ('{"arms": {"4": {"seconds": "fast"}}}', "arms.4.seconds"),
        ('{"arms": {"4": {"surprise": 1}}}', "surprise"),
        ('{"arms": {"four": %s}}' % ARM, "arms.four"),  # noqa: UP031
        ('{"arms": {"4": %s, "6": %s}}' % (ARM, ARM), r"block sizes \[6\]"),  # noqa: UP031
        ('{"learned_with": {"target": "other", "drafter": "drafter"}, "arms": {}}', "other"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(text)
    policy = Thompson(block_sizes=(4, 8), memory=str(path))
    with pytest.raises(PolicyError, match=said) as caught:
        policy.bind(decoder())
    assert str(path) in str(caught.value)
    assert "delete the file" in str(caught.value)
    assert path.read_text() == text, "what cannot be read is not overwritten"


def test_a_memory_without_seconds_counts_as_untried() -> None:
    policy = UCB(block_sizes=(4,))
    policy.load_state_dict({"arms": {"1": {"pulls": 9, "count": 9.0, "tokens": 9.0}}})
    policy.bind(decoder())
    assert policy.select({}, context()).tolist() == [1]
