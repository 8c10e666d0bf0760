"""`confidence`, `adaedl`, `exp3`, `eesd` and `tapout`: decisions by hand, updates against independent code."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from bpkit_bandit.eesd import Eesd
from bpkit_bandit.exp3 import Exp3
from bpkit_bandit.tapout import RULES, TapOut, parse_rule
from bpkit_threshold.thresholds import AdaEdl, Confidence

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import Policy, PolicyError, State
from bpkit.registry.discovery import build
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.types import Draft
from tests import records
from tests.records import bound, context, decoder, step

ALL: list[type[Policy]] = [Confidence, AdaEdl, Exp3, Eesd, TapOut]


def draft(
    probability: list[list[float]], entropy: list[list[float]] | None = None, lengths: list[int] | None = None
) -> Draft:
    entropy = entropy or [[0.0] * len(row) for row in probability]
    return records.draft(lengths, draft_probability=probability, draft_entropy=entropy)


# all ------------------------------------------------------------------------------------------------------------


def test_options_load_without_torch() -> None:
    code = (
        "import bpkit_threshold.thresholds, bpkit_bandit.exp3, bpkit_bandit.eesd, sys;"
        "import bpkit_bandit.tapout; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_names_load_their_classes() -> None:
    points = [EntryPoint("threshold", "bpkit_threshold", "bpkit"), EntryPoint("bandit", "bpkit_bandit", "bpkit")]
    policies = build(points).policies
    names = {"confidence": Confidence, "adaedl": AdaEdl, "exp3": Exp3, "eesd": Eesd, "tapout": TapOut}
    assert {name: policies[name].load() for name in names} == names
    assert {name: policies[name].load_config() for name in names} == {n: p.Config for n, p in names.items()}


@pytest.mark.parametrize("kind", ALL)
def test_every_value_of_the_grid_is_valid(kind: type[Policy]) -> None:
    for name, values in kind.Config.grid.items():
        assert name in kind.Config.model_fields
        for value in values:
            kind(**{name: value})


@pytest.mark.parametrize(
    "spec",
    [
        "confidence:0.6",
        "confidence:schedule=heuristic_transient",
        "adaedl",
        "adaedl:across_requests=true",
        "exp3",
        "exp3:reward=tokens",
        "eesd",
        "eesd:no_draft=true",
        "tapout",
        "tapout:bandit=thompson,reward=time",
    ],
)
@pytest.mark.parametrize("kind", ["block_diffusion", "autoregressive"])
def test_a_request_runs_without_faults(pair: TinyPair, spec: str, kind: str) -> None:
    decoder = SpeculativeDecoder(pair.target, getattr(pair, kind)(), resolve_policy(spec), strict=True)
    plain = SpeculativeDecoder(pair.target, getattr(pair, kind)(), "fixed:1", strict=True)
    ids = pair.ids("def f(x):")
    for _ in range(2):
        made = decoder.generate(ids, max_new_tokens=24)
        assert made.tokens.tolist() == plain.generate(ids, max_new_tokens=24).tokens.tolist()


@pytest.mark.parametrize("kind", [AdaEdl, Exp3, Eesd, TapOut])
def test_a_strange_memory_is_refused(kind: type[Policy]) -> None:
    with pytest.raises(PolicyError, match="memory"):
        kind().load_state_dict({"something": 1})


# confidence -----------------------------------------------------------------------------------------------------

SURE_ROWS = [[0.9, 0.5, 0.4, 0.9], [0.9, 0.39, 0.9, 0.9], [0.1, 0.9, 0.9, 0.9]]


def test_confidence_judges_each_token_alone_and_verifies_the_one_that_stops_it() -> None:
    assert Confidence().truncate({}, draft(SURE_ROWS)).tolist() == [4, 2, 1]
    assert Confidence(keep_last=False).truncate({}, draft(SURE_ROWS)).tolist() == [4, 1, 0]
    assert Confidence().extend({}, draft(SURE_ROWS)).tolist() == [True, False, False]


def test_confidence_keeps_to_the_length_of_each_row() -> None:
    rows = draft([[0.9, math.nan], [math.nan, math.nan], [0.1, math.nan]], lengths=[1, 0, 1])
    assert Confidence().truncate({}, rows).tolist() == [1, 0, 1]


def test_confidence_schedule_moves_each_row_by_its_own_outcome() -> None:
    policy = bound(Confidence(schedule="heuristic_transient", block_size=6))
    state = policy.begin(context(4))
    assert policy.select(state, context(4)).tolist() == [6] * 4
    policy.observe(state, step([5, 5, 2, 0], [5, 4, 2, 0]))
    assert policy.select(state, context(4)).tolist() == [8, 5, 8, 6]
    for _ in range(9):
        policy.observe(state, step([1] * 4, [1, 0, 0, 0]))
    assert policy.select(state, context(4)).tolist() == [16, 2, 2, 2]


def test_confidence_without_a_schedule_keeps_its_block() -> None:
    policy = bound(Confidence())
    state = policy.begin(context())
    policy.observe(state, step([7], [7]))
    assert policy.select(state, context()).tolist() == [8]


# adaedl ---------------------------------------------------------------------------------------------------------


def test_adaedl_compares_the_bound_with_the_threshold() -> None:
    generator = torch.Generator().manual_seed(2)
    entropies = (2 * torch.rand(20, 6, generator=generator)).tolist()
    policy = bound(AdaEdl(threshold=0.55))
    state = policy.begin(context(20))
    kept = policy.truncate(state, draft([[0.5] * 6] * 20, entropies)).tolist()
    expected = []
    for row in entropies:
        below = [k for k, entropy in enumerate(row) if 1 - math.sqrt(0.2 * entropy) < 0.55]
        expected.append(below[0] if below else 6)
    assert kept == expected
    assert len(set(expected)) > 2


def test_adaedl_updates_its_threshold_as_published() -> None:
    outcomes = [(4, 4), (5, 2), (0, 0), (3, 3), (6, 6), (2, 0)] * 30
    policy = bound(AdaEdl(threshold=0.7))
    state = policy.begin(context(2))
    acceptance, threshold = 0.0, 0.7
    for verified, accepted in outcomes:
        policy.observe(state, step([verified, 1], [accepted, 0]))
        if verified:
            acceptance = 0.5 * acceptance + 0.5 * (accepted / verified)
            draft_threshold = threshold + 0.01 if acceptance <= 0.9 else threshold - 0.01
            threshold = 0.9 * threshold + 0.1 * draft_threshold
    assert state["threshold"][0].item() == pytest.approx(threshold)
    assert state["acceptance"][0].item() == pytest.approx(acceptance)
    assert state["threshold"][1].item() == pytest.approx(min(0.7 + 0.001 * len(outcomes), 1.0)), "always rejected"


def test_adaedl_remembers_across_requests_only_if_told() -> None:
    for across, begun in ((True, 0.701), (False, 0.7)):
        policy = bound(AdaEdl(across_requests=across))
        state = policy.begin(context())
        policy.observe(state, step([2], [0]))
        policy.end(state)
        assert policy.begin(context())["threshold"].item() == pytest.approx(begun)
        fresh = bound(AdaEdl(across_requests=across))
        fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())))
        assert fresh.begin(context())["threshold"].item() == pytest.approx(begun)


# exp3 -----------------------------------------------------------------------------------------------------------


class PlainExp3:
    """EXP3 as in the textbook, for one row."""

    def __init__(self, arms: tuple[int, ...], time: bool) -> None:
        self.arms, self.time, self.history = arms, time, list[tuple[int, float, float, float]]()

    def probabilities(self) -> list[float]:
        losses, tokens, seconds = dict.fromkeys(self.arms, 0.0), 0.0, 0.0
        for arm, taken, spent, chance in self.history:
            tokens, seconds = tokens + taken, seconds + spent
            loss = (
                0.5 - (taken - tokens / seconds * spent) / max(self.arms) if self.time else 1 - taken / max(self.arms)
            )
            losses[arm] += min(max(loss, 0.0), 1.0) / chance
        eta = math.sqrt(math.log(len(self.arms)) / (len(self.arms) * max(1, len(self.history))))
        weights = [math.exp(-eta * losses[arm]) for arm in self.arms]
        return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("reward", ["tokens", "time"])
def test_exp3_is_the_textbook_update(reward: str) -> None:
    policy, plain = bound(Exp3(block_sizes="1+4+8", reward=reward)), PlainExp3((1, 4, 8), reward == "time")
    outcomes, now, state = random.Random(3), context(), State()
    for _ in range(60):
        assert policy.probabilities() == pytest.approx(plain.probabilities())
        size = int(policy.select(state, now))
        chance = policy.probabilities()[policy.usable.index(size)]
        assert state["chance"].item() == pytest.approx(chance)
        taken, spent = outcomes.randint(1, size), outcomes.uniform(0.01, 0.03)
        policy.observe(state, step([size - 1], [taken - 1], spent))
        plain.history.append((size, taken, spent, chance))


def test_exp3_draws_by_its_probabilities() -> None:
    policy = bound(Exp3(block_sizes="1+4"))
    policy.load_state_dict({"losses": {"1": 3.0, "4": 1.0}, "rounds": 4.0, "tokens": 1.0, "seconds": 1.0})
    now = context()
    drawn = Counter(int(policy.select({}, now)) for _ in range(4000))
    assert drawn[1] / 4000 == pytest.approx(policy.probabilities()[0], abs=0.03)


@pytest.mark.parametrize("seed", [0, 1])
def test_exp3_finds_the_faster_size(seed: int) -> None:
    policy, outcomes, now = bound(Exp3(block_sizes="1+4+16", learning_rate=3)), random.Random(seed), context(2, seed)
    state, chosen = policy.begin(now), []
    for _ in range(1500):
        sizes = policy.select(state, now).tolist()
        assert len(set(sizes)) == 1
        accepted = [min(outcomes.choice((0, 1, 2, 3, 3)), size - 1) for size in sizes]
        policy.observe(state, step([size - 1 for size in sizes], accepted, 0.02 + 0.004 * sizes[0]))
        chosen.append(sizes[0])
    # Tokens per second: 1 / .024, 2.8 / .036, 2.8 / .084
    assert Counter(chosen[-300:])[4] > 200


def test_exp3_memory_survives_json_and_a_broken_clock_teaches_nothing() -> None:
    policy, state = bound(Exp3(block_sizes="1+4")), State()
    policy.select(state, context())
    policy.observe(state, step([3], [2], 0.1, block_size=[4]))
    stored = json.loads(json.dumps(policy.state_dict()))
    policy.observe(state, step([3], [2], 0.0, block_size=[4]))
    assert policy.state_dict() == stored
    fresh = bound(Exp3(block_sizes="1+4+8"))
    fresh.load_state_dict(stored)
    assert fresh.memory.losses == {1: 0.0, 4: stored["losses"]["4"], 8: 0.0}
    with pytest.raises(PolicyError, match="block sizes"):
        Exp3(block_sizes="1+2").load_state_dict(stored)


def test_exp3_takes_a_draw_for_one_step_whatever_the_rows() -> None:
    policy, state = bound(Exp3(block_sizes="1+4", reward="tokens")), State()
    policy.select(state, context(3))
    policy.observe(state, step([3, 3, 3], [3, 1, 1], 0.3, block_size=[4, 4, 4]))
    assert policy.memory.losses[4] == pytest.approx((0 + 0.5 + 0.5) / 3 / 0.5)
    assert (policy.memory.rounds, policy.memory.tokens) == (1, 8)
    assert policy.memory.seconds == pytest.approx(0.3)


# eesd -----------------------------------------------------------------------------------------------------------


def test_eesd_counts_are_those_of_the_beta_distribution() -> None:
    for counts, rejected in (("drafted", 1 + 3 + 0), ("tested", 1 + 1 + 0)):
        policy = bound(Eesd(counts=counts))
        state = policy.begin(context(2))
        policy.observe(state, step([5, 0], [2, 0]))
        policy.observe(state, step([4, 2], [4, 1]))
        assert state["accepted"].tolist() == [1 + 2 + 4, 1 + 0 + 1]
        assert state["rejected"].tolist() == [rejected, 1 + 1]


@pytest.mark.parametrize("rows", [1, 4000])
def test_eesd_draws_the_length_that_its_counts_say(rows: int) -> None:
    """Each token is drafted with the mean of the Beta distribution: a geometric length, cut at the end."""
    policy = bound(Eesd(accepted=3, rejected=1), decoder(largest=6))
    state, now = policy.begin(context(rows)), context(rows)
    drawn = Counter(size for _ in range(4000 // rows) for size in policy.select(state, now).tolist())
    for size in (2, 3, 4, 5):
        assert drawn[size] / 4000 == pytest.approx(0.75 ** (size - 2) * 0.25, abs=0.03)
    assert drawn[6] / 4000 == pytest.approx(0.75**4, abs=0.03)


def test_eesd_forgoes_the_draft_only_if_allowed() -> None:
    for allowed, smallest in ((True, 1), (False, 2)):
        policy = bound(Eesd(accepted=1, rejected=50, no_draft=allowed))
        assert min(policy.select(policy.begin(context(50)), context(50)).tolist()) == smallest
        assert policy.select(policy.begin(context()), context()).tolist() == [smallest]


def test_eesd_rounds_down_to_a_listed_size() -> None:
    policy = bound(Eesd(accepted=9, rejected=1, block_sizes="2+4+16"))
    assert set(policy.select(policy.begin(context(500)), context(500)).tolist()) == {2, 4, 16}


def test_eesd_repeats_under_a_seed_and_leaves_the_global_generator_alone() -> None:
    policy = bound(Eesd(accepted=4))
    unused, random_state = torch.get_rng_state(), random.getstate()
    runs = [policy.select(policy.begin(context(30)), context(30, seed)).tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), unused)
    assert random.getstate() == random_state


def test_eesd_memory_survives_json() -> None:
    policy = bound(Eesd(across_requests=True))
    state = policy.begin(context())
    policy.observe(state, step([5], [3]))
    policy.end(state)
    fresh = bound(Eesd(across_requests=True))
    fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert fresh.begin(context())["accepted"].tolist() == [4]
    assert fresh.begin(context())["rejected"].tolist() == [3]


# tapout ---------------------------------------------------------------------------------------------------------


def test_rules_stop_where_they_say() -> None:
    probability = [[0.95, 0.85, 0.7, 0.9]]
    entropy = [[0.04, 0.09, 0.25, 0.81]]  # roots: .2 .3 .5 .9
    cases = {
        "confidence": 2,
        "confidence@0.9": 1,
        "svip@0.5": 3,
        "svip_difference@0.25": 3,
        "adaedl": 3,
        "adaedl@0.5": 4,
    }
    for text, kept in cases.items():
        policy = bound(TapOut(rules=[text]))
        state = State()
        policy.select(state, context())
        assert policy.truncate(state, draft(probability, entropy)).tolist() == [kept], text
        assert policy.extend(state, draft(probability, entropy)).tolist() == [kept == 4], text
    whole = bound(TapOut(rules="fixed@3"))
    state = State()
    assert whole.select(state, context()).tolist() == [3]
    assert whole.truncate(state, draft(probability, entropy)).tolist() == [4]


@pytest.mark.parametrize("text", ["magic", "svip@x", "fixed@0", "fixed@2.5", "confidence@2"])
def test_impossible_rules_are_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="rule"):
        TapOut(rules=text)


def test_rules_are_read_from_the_command_line_and_named_with_their_value() -> None:
    policy = resolve_policy("tapout:rules=fixed@4+svip+svip@0.6+adaedl@0.5")
    assert policy.config.rules == ("fixed@4", "svip@0.6", "adaedl@0.5")  # type: ignore[attr-defined]
    assert all(parse_rule(str(parse_rule(kind))) == parse_rule(kind) for kind in RULES)


def test_tapout_blend_is_the_published_reward() -> None:
    policy = bound(TapOut(rules="fixed@5+svip", block_size=9))
    assert policy.longest == 8
    assert policy.blend(4, 6) == pytest.approx(0.5 * 4 / 8 + 0.5 * 4 / 6)
    assert policy.blend(0, 0) == 0.0


def test_tapout_picks_by_ucb1() -> None:
    policy = bound(TapOut(rules="fixed@4+fixed@8+svip", exploration=0.3))
    now, outcomes, state = context(), random.Random(1), State()
    rewards: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for t in range(120):
        place = int(policy.select(state, now).new_tensor(state["rule"].tolist()))
        if t < 3:
            assert place == t, "every rule once"
        else:
            scores = [sum(r) / len(r) + 0.3 * math.sqrt(2 * math.log(t) / len(r)) for r in rewards.values()]
            assert scores[place] == pytest.approx(max(scores))
        verified = outcomes.randint(1, 7)
        accepted = outcomes.randint(0, verified)
        policy.observe(state, step([verified], [accepted], block_size=[8]))
        rewards[place].append(policy.blend(accepted, verified))


def test_tapout_does_not_blame_a_rule_for_rows_without_a_draft_beside_others() -> None:
    policy, state = bound(TapOut(rules="fixed@5")), policy_state(0, 0)
    policy.observe(state, step([4, 0], [2, 0], drafted=[4, 0]))
    assert (policy.arms[0].pulls, policy.arms[0].tokens) == (1, policy.blend(2, 4))
    policy.observe(state, step([0, 0], [0, 0], drafted=[0, 0]))
    assert policy.arms[0].pulls == 3, "as each of them alone"


def test_tapout_cuts_each_row_by_its_own_rule() -> None:
    policy = bound(TapOut(rules="confidence@0.8+svip@0.5+fixed"))
    rows = draft([[0.9, 0.7, 0.9]] * 3, [[0.1, 0.1, 0.9]] * 3)
    assert policy.truncate(policy_state(0, 1, 2), rows).tolist() == [1, 2, 3]


def policy_state(*rules: int) -> State:
    return {"rule": torch.tensor(rules)}


@pytest.mark.parametrize("bandit", ["ucb1", "thompson"])
def test_tapout_finds_the_rule_that_pays(bandit: str) -> None:
    policy = bound(TapOut(rules="fixed@1+fixed@4+fixed@16", reward="time", bandit=bandit))
    now, outcomes, state, chosen = context(2), random.Random(5), State(), []
    for _ in range(600):
        sizes = policy.select(state, now).tolist()
        accepted = [min(outcomes.choice((0, 1, 2, 3, 3)), size - 1) for size in sizes]
        policy.observe(state, step([size - 1 for size in sizes], accepted, 0.02 + 0.004 * sizes[0]))
        chosen.append(sizes[0])
    assert Counter(chosen[-200:])[4] > 150


def test_tapout_leaves_out_what_cannot_be_drafted_or_earn() -> None:
    rules = "fixed@1+fixed@8+fixed@32+svip"
    assert bound(TapOut(rules=rules)).usable == [1, 3], "a blend is earned with drafts"
    assert bound(TapOut(rules=rules, reward="time")).usable == [0, 1, 3]


def test_tapout_memory_survives_json() -> None:
    policy, state = bound(TapOut()), State()
    for _ in range(9):
        policy.select(state, context())
        policy.observe(state, step([7], [3]))
    stored = json.loads(json.dumps(policy.state_dict()))
    fresh = bound(TapOut())
    fresh.load_state_dict(stored)
    assert fresh.arms == policy.arms
    with pytest.raises(PolicyError, match="reward"):
        TapOut(reward="time").load_state_dict(stored)
    with pytest.raises(PolicyError, match="rules"):
        TapOut(rules="svip").load_state_dict(stored)


def options(**given: Any) -> dict[str, Any]:
    return given


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Confidence, options(threshold=1.2)),
        (AdaEdl, options(gamma=0)),
        (Exp3, options(block_sizes="0+4")),
        (Exp3, options(learning_rate=0)),
        (Eesd, options(accepted=0)),
        (TapOut, options(mix=2)),
    ],
)
def test_impossible_options_are_refused(kind: type[Policy], given: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(given))):
        kind(**given)
