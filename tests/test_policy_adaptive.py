"""`ema` and `goodput`: decisions by hand and against brute force, memory, and both in a decoder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.metadata import EntryPoint
from itertools import pairwise

import pytest
import torch
from bpkit_adaptive.ema import Ema
from bpkit_adaptive.goodput import Goodput
from bpkit_adaptive.portfolio import Portfolio

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import Policy, PolicyError
from bpkit.registry.discovery import build
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.trace.cost import CostTable
from tests.records import bound, context, decoder, step

COST = CostTable(
    draft={2: 0.2, 8: 0.3, 16: 0.6},
    verify={1: {50: 1.0, 150: 2.0}, 8: 2.2, 16: 3.0},
    rest=0.1,
)

KINDS: dict[str, type[Policy]] = {"ema": Ema, "goodput": Goodput, "portfolio": Portfolio}


# both -----------------------------------------------------------------------------------------------------------


def test_options_load_without_torch() -> None:
    code = "import bpkit_adaptive.ema, bpkit_adaptive.goodput, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_names_load_their_classes() -> None:
    policies = build([EntryPoint("adaptive", "bpkit_adaptive", "bpkit")]).policies
    assert {name: entry.load() for name, entry in policies.items()} == KINDS
    assert {name: entry.load_config() for name, entry in policies.items()} == {
        name: kind.Config for name, kind in KINDS.items()
    }


@pytest.mark.parametrize("kind", [Ema, Goodput])
def test_every_value_of_the_grid_is_valid(kind: type[Policy]) -> None:
    for name, values in kind.Config.grid.items():
        assert name in kind.Config.model_fields
        for value in values:
            kind(**{name: value})


@pytest.mark.parametrize("kind", [Ema, Goodput])
def test_block_sizes_are_read_as_text_and_hold_the_no_draft_arm(kind: type[Policy]) -> None:
    for given in ("2-4+8", "8;2;3;4", (2, 3, 4, 8)):
        assert kind(block_sizes=given).config.block_sizes == (1, 2, 3, 4, 8)  # type: ignore[attr-defined]
    for wrong in ("4+x", "0+4", -1):
        with pytest.raises(PolicyError, match="block_sizes"):
            kind(block_sizes=wrong)


@pytest.mark.parametrize("spec", ["ema:warmup=0,interval=1", "goodput", "goodput:across_requests=true"])
@pytest.mark.parametrize("kind", ["block_diffusion", "autoregressive"])
def test_a_request_runs_without_faults(pair: TinyPair, spec: str, kind: str) -> None:
    decoder = SpeculativeDecoder(pair.target, getattr(pair, kind)(), resolve_policy(spec), strict=True)
    plain = SpeculativeDecoder(pair.target, getattr(pair, kind)(), "fixed:1", strict=True)
    ids = pair.ids("def f(x):")
    for _ in range(2):
        made = decoder.generate(ids, max_new_tokens=24)
        assert made.tokens.tolist() == plain.generate(ids, max_new_tokens=24).tokens.tolist()


@pytest.mark.parametrize("kind", [Ema, Goodput])
def test_rows_do_not_influence_each_other(kind: type[Policy]) -> None:
    outcomes = random.Random(0)
    together, alone = bound(kind()), [bound(kind()) for _ in range(3)]
    state, states = together.begin(context(3)), [policy.begin(context()) for policy in alone]
    seen = set()
    for _ in range(60):
        sizes = together.select(state, context(3)).tolist()
        one_by_one = zip(alone, states, strict=True)
        assert sizes == [int(policy.select(single, context())) for policy, single in one_by_one]
        assert together.select(state, context(3)).dtype == torch.int64
        verified = [size - 1 for size in sizes]
        usual = [outcomes.choice(how) for how in ((0, 1), (3, 4), (15,))]
        accepted = [min(stood, length) for stood, length in zip(usual, verified, strict=True)]
        together.observe(state, step(verified, accepted))
        for policy, single, length, stood in zip(alone, states, verified, accepted, strict=True):
            policy.observe(single, step([length], [stood]))
        seen.update(sizes)
    assert len(seen) > 2


# ema ------------------------------------------------------------------------------------------------------------


class SGLangSlot:
    """SGLang's rule in steps (drafted tokens), written from its description and thresholds."""

    def __init__(self, steps: list[int], start: int) -> None:
        self.steps, self.now, self.ema, self.batches = steps, start, float(start - 1), 0

    def update(self, accepted: int) -> None:
        if self.now > 0:
            self.ema = 0.8 * self.ema + 0.2 * accepted
        self.batches += 1
        if self.batches <= 10 or (self.batches - 10) % 5:
            return
        place = self.steps.index(self.now)
        if self.now == 0:
            self.now = self.steps[min(1, len(self.steps) - 1)]
            if self.ema < 0:
                self.ema = self.now - 1.0
            return
        drops = [(0.5 if low == 0 else low - 0.5) - 0.25 for low, _ in pairwise(self.steps)]
        lower = place
        while lower > 0 and self.ema <= drops[lower - 1]:
            lower -= 1
        if lower == place:
            while place < len(self.steps) - 1 and self.ema > self.steps[place] - 0.5:
                place += 1
            self.now = self.steps[place]
        else:
            self.now = self.steps[lower]


@pytest.mark.parametrize("likely", [0.05, 0.5, 0.8, 0.97])
def test_ema_walks_as_sglang_does(likely: float) -> None:
    policy, slot = bound(Ema(block_sizes="1+2+4+8")), SGLangSlot([0, 1, 3, 7], 7)
    state, outcomes, seen = policy.begin(context()), random.Random(7), set()
    for _ in range(400):
        size = int(policy.select(state, context()))
        assert size == slot.now + 1
        stood = 0
        while stood < size - 1 and outcomes.random() < likely:
            stood += 1
        policy.observe(state, step([size - 1], [stood]))
        slot.update(stood)
        assert state["average"].item() == pytest.approx(slot.ema)
        seen.add(size)
    assert {0.05: 1, 0.5: 4, 0.8: 8, 0.97: 8}[likely] in seen


def test_ema_by_hand() -> None:
    policy = bound(Ema(block_sizes="1+2+4+8", warmup=0, interval=1, alpha=1.0, start=4))
    state = policy.begin(context())

    def after(verified: int, accepted: int) -> int:
        policy.observe(state, step([verified], [accepted]))
        return int(policy.select(state, context()))

    assert after(3, 2) == 4, "2 is not above 3 - 1/2"
    assert after(3, 3) == 8
    assert after(7, 3) == 8, "3 is above 3 - 1/2 - 1/4"
    assert after(7, 2) == 4
    assert after(3, 0) == 1, "through 2: 0 is below 1/2 - 1/4 as well"
    assert after(0, 0) == 2, "a probe"
    assert after(1, 1) == 4, "1 is above 1 - 1/2"


def test_ema_hysteresis_moves_the_thresholds() -> None:
    policy = bound(Ema(block_sizes="2+4+8", warmup=0, interval=1, alpha=1.0, start=4, up=0.6, down=0.6))
    state = policy.begin(context())
    policy.observe(state, step([3], [3]))
    assert int(policy.select(state, context())) == 4, "3 is not above 3 - 1/2 + 0.6"
    policy.observe(state, step([3], [1]))
    assert int(policy.select(state, context())) == 1, "1 is below 1/2 + 0.6, the way to 2 and to no draft"


def test_ema_starts_at_the_trained_size_or_in_the_middle() -> None:
    for trained, first in ((8, 8), (7, 4)):
        policy = bound(Ema(), decoder(trained=trained))
        assert policy.select(policy.begin(context()), context()).tolist() == [first]
    assert bound(Ema(), decoder(largest=1)).ladder == [1]


def test_ema_goes_on_where_the_last_request_ended_unless_told_otherwise() -> None:
    for across in (True, False):
        policy = bound(Ema(warmup=0, interval=1, across_requests=across))
        state = policy.begin(context())
        for _ in range(40):
            policy.observe(state, step([7], [0]))
        policy.end(state)
        begun = policy.begin(context())
        assert (begun["steps"].item() == 40) == across
        stored = json.loads(json.dumps(policy.state_dict()))
        fresh = bound(Ema(across_requests=across))
        fresh.load_state_dict(stored)
        assert fresh.begin(context())["average"].item() == begun["average"].item()


# goodput --------------------------------------------------------------------------------------------------------


def brute_force(policy: Goodput, rates: list[float], cost: CostTable | None, at: int) -> int:
    """The best size, with every expectation written out."""

    def expected(size: int) -> float:
        total = 1.0
        for k in range(1, size):
            product = 1.0
            for rate in rates[:k]:
                product *= rate
            total += product
        return total

    def seconds(size: int) -> float:
        return cost.step(size, at) if cost else 1 + policy.config.slope * (size - 1)

    return max(policy.sizes, key=lambda size: expected(size) / seconds(size))


@pytest.mark.parametrize("cost", [COST, None])
def test_goodput_is_the_argmax_of_expected_tokens_over_cost(cost: CostTable | None) -> None:
    policy, numbers = bound(Goodput(), cost=cost), random.Random(4)
    seen = set()
    for trial in range(200):
        best = numbers.random()
        likely = [best + numbers.uniform(0, 0.4) for _ in range(15)]
        rates = [numbers.uniform(0, 0.3) for _ in range(15)] if trial % 4 == 0 else [min(1.0, rate) for rate in likely]
        worth = policy.worth(rates, policy.costs(32))
        chosen = policy.sizes[worth.index(max(worth))]
        assert chosen == brute_force(policy, rates, cost, 32)
        seen.add(chosen)
    assert 1 in seen
    assert len(seen) > 2


def test_goodput_prices_at_the_context_length_of_each_row() -> None:
    cost = CostTable(draft={8: 0.1}, verify={1: {32: 1.0, 800: 1.0}, 8: {32: 9.0, 800: 1.0}})
    policy = bound(Goodput(block_sizes="1+8", prior=0.8), cost=cost)
    now = context(2)
    now.context_length = torch.tensor([40, 800])
    assert policy.select(policy.begin(now), now).tolist() == [1, 8]


def test_goodput_counts_what_was_tested() -> None:
    policy = bound(Goodput(block_sizes="1-5", discount=0.5))
    state = policy.begin(context(3))
    policy.observe(state, step([4, 4, 0], [1, 4, 0]))
    assert state["accepted"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert state["tested"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    policy.observe(state, step([2, 2, 1], [2, 0, 1]))
    assert state["accepted"].tolist() == [[1.5, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]]
    assert state["tested"].tolist() == [[1.5, 1.5, 0, 0], [1.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]]


def test_goodput_rates_shrink_towards_the_position_before() -> None:
    policy = bound(Goodput(prior=0.6, prior_weight=2.0))
    first = (3 + 2 * 0.6) / (4 + 2)
    second = (0 + 2 * first) / (1 + 2)
    assert policy.rates([3, 0, 0], [4, 1, 0]) == pytest.approx([first, second, second])


def test_goodput_gives_up_drafting_and_tries_again() -> None:
    policy = bound(Goodput(discount=0.9), cost=COST)
    state, chosen = policy.begin(context()), []
    for _ in range(80):
        size = int(policy.select(state, context()))
        policy.observe(state, step([size - 1], [0]))
        chosen.append(size)
    assert chosen[0] > 1
    plain = chosen.count(1)
    assert 60 < plain < 80, "nothing is ever accepted"
    assert max(chosen[40:]) > 1


@pytest.mark.parametrize(("likely", "long"), [(0.3, False), (0.97, True)])
def test_goodput_finds_the_best_size(likely: float, long: bool) -> None:
    policy, outcomes = bound(Goodput(discount=0.99), cost=COST), random.Random(1)
    state, chosen = policy.begin(context()), []
    for _ in range(300):
        size = int(policy.select(state, context()))
        stood = 0
        while stood < size - 1 and outcomes.random() < likely:
            stood += 1
        policy.observe(state, step([size - 1], [stood]))
        chosen.append(size)
    best = brute_force(policy, [likely] * 15, COST, 32)
    assert (best >= 8) == long
    assert sum(abs(size - best) <= 2 for size in chosen[-100:]) > 60


def test_goodput_leaves_out_sizes_that_have_no_cost() -> None:
    assert bound(Goodput(block_sizes="4+16+32"), decoder(largest=64), COST).sizes == [1, 4, 16]


def test_goodput_without_room_for_a_draft_decodes_plainly() -> None:
    policy = bound(Goodput(), decoder(largest=1))
    state = policy.begin(context())
    policy.observe(state, step([0], [0]))
    assert policy.select(state, context()).tolist() == [1]


def test_goodput_remembers_across_requests_only_if_told() -> None:
    for across in (True, False):
        policy = bound(Goodput(block_sizes="1-4", across_requests=across))
        state = policy.begin(context())
        policy.observe(state, step([3], [1]))
        policy.end(state)
        fresh = bound(Goodput(block_sizes="1-8", across_requests=across))
        fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())))
        assert fresh.begin(context(2))["tested"].tolist() == [[1, 1, 0, 0, 0, 0, 0] if across else [0] * 7] * 2


@pytest.mark.parametrize("kind", [Ema, Goodput])
def test_a_strange_memory_is_refused(kind: type[Policy]) -> None:
    with pytest.raises(PolicyError, match="memory"):
        kind().load_state_dict({"something": 1})
