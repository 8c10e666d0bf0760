"""`portfolio`: its choice against brute force over the formula, what it learns, and its memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bpkit_adaptive.portfolio import Portfolio

from bpkit.policy import PolicyError, State
from bpkit.trace.cost import CostTable
from bpkit.trace.cost.table import RowsTable
from bpkit.types import NGRAM, Context, Feature, SourceSpec, Step, work_of
from tests import records
from tests.records import bound

STORE = SourceSpec("store", NGRAM, 6, 6, work_of(NGRAM))
SPEC = replace(records.decoder(largest=5), others=(STORE,))
VERIFY: dict[int, Any] = {1: 1.0, 2: 1.05, 3: 1.3, 4: 1.4, 5: 1.8, 6: 1.9}
DRAFT = {2: 0.2, 3: 0.25, 5: 0.4}
COST = CostTable(draft=DRAFT, catch_up={1: 0.0, 41: 0.4}, verify=VERIFY, rest=0.1).with_sources(
    [CostTable(draft={6: 0.02}, verify={1: 1.0})]
)


def context(offer: list[list[int]], match: int = 3, share: float = 0.5, support: int = 0, running: int = 0) -> Context:
    """Source 0 is a model, source 1 a store."""
    rows = len(offer)
    made = records.context(rows)
    made.running = running or rows
    made.features = {
        Feature.SOURCE_OFFER: torch.tensor(offer),
        Feature.SOURCE_MATCH: torch.tensor([[0, match]] * rows),
        Feature.SOURCE_SHARE: torch.tensor([[1.0, share]] * rows, dtype=torch.float64),
        Feature.SOURCE_SUPPORT: torch.tensor([[0, support]] * rows),
    }
    return made


def step(source: list[int], drafted: list[int], accepted: list[int], agreed: list[int] | None = None) -> Step:
    """`agreed`: of the store's offer, by row."""
    told = None if agreed is None else torch.tensor([[-1, one] for one in agreed])
    return replace(records.step(drafted, accepted), source=torch.tensor(source), offer_agreed=told)


def choice(policy: Portfolio, state: State, now: Context) -> list[tuple[int, int]]:
    """(source, block size) of each row."""
    made = policy.select(state, now)
    return list(zip(made.source.tolist(), made.block_size.tolist(), strict=True))


def counts(rates: list[list[float]], tries: float = 50.0) -> dict[str, Any]:
    """A memory in which each source's offers of every kind stood at these rates by position."""
    shape = torch.ones(9, 4, 3, 1, dtype=torch.float64)
    tested = [(shape * tries * torch.ones(5, dtype=torch.float64)).tolist() for _ in rates]
    accepted = [(shape * tries * torch.tensor(own, dtype=torch.float64)).tolist() for own in rates]
    return {"accepted": accepted, "tested": tested}


def ready(memory: dict[str, Any] | None = None, **options: Any) -> Portfolio:
    policy: Portfolio = bound(Portfolio(**options), SPEC, COST)
    policy.load_state_dict(memory or {})
    return policy


# the choice -----------------------------------------------------------------------------------------------------


def brute_force(rates: list[list[float]], offer: list[int], waiting: int, tries: float, weight: float) -> Any:
    """The formula, from its text: three levels of counts, of which the broader hold the sums of the finer."""
    best, worth = (0, 1), 1 / (VERIFY[1] + 0.1)
    for source, most in enumerate(offer):
        chances, before = [], 0.6
        for rate in rates[source][:most]:
            levels = [before]
            for tested in (tries * 9 * 4 * 3, tries * 4 * 3, tries):
                levels.append((rate * tested + weight * levels[-1]) / (tested + weight))
            chances.append(min(levels[-1], 0.999))
            before = levels[1]
        for size in range(2, min(most + 1, (5, 6)[source]) + 1):
            tokens = 1 + sum(math.prod(chances[:k]) for k in range(1, size))
            draft = 0.02 if source else DRAFT[min(known for known in DRAFT if known >= size)]
            caught_up = 0 if source else COST.seconds("catch_up", waiting, 0)
            value = tokens / (VERIFY[size] + 0.1 + draft + caught_up)
            if value > worth:
                best, worth = (source, size), value
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_maximum_of_the_formula(seed: int) -> None:
    random, found = torch.Generator().manual_seed(seed), set()
    for _ in range(12):
        rates = torch.rand(2, 5, generator=random).sqrt().tolist()
        offer = [4, int(torch.randint(6, (), generator=random))]
        policy = ready(counts(rates, 0.2))
        now = context([offer])
        state = policy.begin(now)
        assert int(state["waiting"][0, 0]) == 39, "the prompt: the anchor is the fortieth token"
        (made,) = choice(policy, state, now)
        assert made == brute_force(rates, offer, 39, 0.2, 16.0)
        state["waiting"][0, 0] = 1
        (made,) = choice(policy, state, now)
        assert made == brute_force(rates, offer, 1, 0.2, 16.0)
        found.add(made)
    assert len(found) > 2


def test_offers_limit_sizes_and_nothing_is_drafted_where_nothing_pays() -> None:
    sure, hopeless = counts([[0.01] * 5, [0.99] * 5]), counts([[0.01] * 5] * 2)
    policy = ready(sure)
    now = context([[4, 5], [4, 2], [4, 0]])
    assert choice(policy, policy.begin(now), now) == [(1, 6), (1, 3), (0, 1)]
    policy = ready(hopeless)
    assert choice(policy, policy.begin(now), now) == [(0, 1)] * 3
    none = ready(block_sizes=1, prior=0.99)
    assert choice(none, none.begin(now), now) == [(0, 1)] * 3


def test_other_kinds_of_offers_have_chances_of_their_own() -> None:
    policy, long, short = ready(), context([[0, 5]], match=6, share=0.9, support=1), context([[0, 5]], match=1)
    state = policy.begin(long)
    for _ in range(40):
        choice(policy, state, long)
        policy.observe(state, step([1], [5], [5], [5]))
        choice(policy, state, short)
        policy.observe(state, step([0], [0], [0], [0]))
    assert policy.chances(1, (6, 3, 1), 5)[0] > 0.9
    assert policy.chances(1, (1, 1, 0), 1)[0] < 0.3
    assert policy.chances(1, (6, 0, 0), 1)[0] > policy.chances(1, (1, 0, 0), 1)[0], "leans on its match length"


# what it learns -------------------------------------------------------------------------------------------------


def test_counts_are_learned_from_offers_that_were_not_drafted() -> None:
    policy, now = ready(), context([[4, 3]])
    state = policy.begin(now)
    choice(policy, state, now)
    policy.observe(state, step([0], [4], [3], [2]))
    broad = policy.levels[0]
    assert broad[0, 0].tolist() == [1, 1, 1, 0, 0]
    assert broad[1, 0].tolist() == [1, 1, 1, 1, 0]
    assert broad[0, 1].tolist() == [1, 1, 0, 0, 0]
    assert broad[1, 1].tolist() == [1, 1, 1, 0, 0]
    assert state["odds"][0, 1, [0, 2]].tolist() == [2, 3]
    policy.observe(state, step([0], [0], [0], [1]))
    assert broad[1, 1].tolist() == pytest.approx([1.999, 0.999, 0.999, 0, 0]), "nothing is known beyond what is yielded"
    assert broad[1, 0, 0] == pytest.approx(0.999)
    assert state["waiting"].tolist() == [[4 + 1, 0]]


def test_odds_shift_towards_a_source_that_accepts_more_than_expected() -> None:
    now, odds, sizes = context([[0, 5]]), [], []
    for accepted in range(6):
        policy = ready(counts([[0.5] * 5, [0.5] * 5]))
        state = policy.begin(now)
        choice(policy, state, now)
        for _ in range(4):
            policy.observe(state, step([1], [5], [accepted], [accepted]))
        stood, expected, tested = state["odds"][0, 1].tolist()
        odds.append((stood / tested) / (expected / tested))
        sizes.append(choice(policy, state, now)[0][1])
    assert odds == sorted(odds)
    assert odds[0] < 1 < odds[-1]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_starved_source_recovers() -> None:
    def first(policy: Portfolio) -> float:
        return policy.chances(0, (0, 3, 0), 1)[0]

    policy, now = ready(memory_discount=0.9), context([[4, 0]])
    state = policy.begin(now)
    for _ in range(30):
        choice(policy, state, now)
        policy.observe(state, step([0], [4], [0]))
    low = first(policy)
    state["waiting"][:] = 1
    assert low < 0.3
    assert choice(policy, state, now) == [(0, 1)]
    for turn in range(200):
        policy.observe(state, step([0], [0], [0]))
        if turn == 10:
            assert low < first(policy) < 0.6
    assert first(policy) == pytest.approx(0.6, abs=1e-3)
    state["waiting"][:] = 1
    assert choice(policy, state, now)[0][1] > 1


def test_rows_are_decided_by_themselves() -> None:
    offers = [[4, 5], [4, 2], [4, 0]]
    memory = counts([[0.7] * 5, [0.8] * 5], 2.0)
    together, alone = ready(memory), [ready(memory) for _ in offers]
    state = together.begin(context(offers))
    states = [one.begin(context([offer])) for one, offer in zip(alone, offers, strict=True)]
    for turn in range(3):
        made = choice(together, state, context(offers))
        each = zip(alone, states, offers, strict=True)
        assert made == [choice(one, own, context([offer]))[0] for one, own, offer in each]
        rows = [(1, 5, 4, 4), (0, 4, turn, 1), (0, 4, 2, 0)]
        source, drafted, accepted, agreed = ([*column] for column in zip(*rows, strict=True))
        together.observe(state, step(source, drafted, accepted, agreed))
        for place, (one, own) in enumerate(zip(alone, states, strict=True)):
            one.observe(own, step(*([column] for column in rows[place])))
            assert all(torch.allclose(state[name][place], own[name][0]) for name in own)
        for one in alone:  # what all rows showed is known to all
            one.load_state_dict(together.state_dict())


# costs ----------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_so_many_rows_where_there_are_any() -> None:
    dear = RowsTable(draft={5: 5.0}, verify={1: 4.0, 6: 40.0})
    of_store = CostTable(draft={6: 0.02}, verify={1: 1.0}, rows={4: RowsTable(draft={6: 0.02}, verify={1: 1.0})})
    priced = CostTable(draft=DRAFT, verify=VERIFY, rows={4: dear}).with_sources([of_store])
    memory, offer = counts([[0.9] * 5, [0.9] * 5]), [[4, 5]]
    for running, large in ((1, True), (4, False), (5, True)):
        policy: Portfolio = bound(Portfolio(), SPEC, priced)
        policy.load_state_dict(memory)
        now = context(offer, running=running)
        state = policy.begin(now)
        state["waiting"][:] = 0
        assert (choice(policy, state, now)[0][1] > 1) == large, "of 5 rows there are no figures: as of one"


@pytest.mark.parametrize("of_one_row", [True, False])
def test_cost_models_of_one_row_serve_all(of_one_row: bool) -> None:
    class Plain:
        def of_source(self, source: int) -> Plain:
            return self

        def seconds(self, phase: str, size: int, context_length: int) -> float:
            return CostTable(draft={6: 0.2}, verify=VERIFY).seconds(phase, size, context_length)

    cost = Plain() if of_one_row else COST
    policy: Portfolio = bound(Portfolio(), SPEC, cost)
    policy.load_state_dict(counts([[0.9] * 5] * 2))
    now = context([[4, 5], [4, 5]], running=8)
    assert all(size > 1 for _, size in choice(policy, policy.begin(now), now))


def test_a_cost_model_that_does_not_price_a_source_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"'portfolio': cost model 'custom' prices 1 source.*calibrate"):
        bound(Portfolio(), SPEC, CostTable(draft=DRAFT, verify=VERIFY))
    short = CostTable(draft={3: 0.2}, verify={1: 1.0, 3: 1.1}).with_sources([CostTable(draft={6: 0.1}, verify={1: 1})])
    assert bound(Portfolio(), SPEC, short).sizes == [[2, 3], [2, 3]]


def test_without_a_cost_model_positions_cost_the_slope() -> None:
    policy: Portfolio = bound(Portfolio(slope=0.0), SPEC)
    now = context([[4, 5]])
    assert choice(policy, policy.begin(now), now) == [(1, 6)]
    steep: Portfolio = bound(Portfolio(slope=1.0), SPEC)
    assert choice(steep, steep.begin(now), now) == [(0, 1)]


# memory ---------------------------------------------------------------------------------------------------------


def test_memory_survives_json() -> None:
    policy, now = ready(), context([[4, 5]])
    assert policy.state_dict() == Portfolio().state_dict() == {}
    state = policy.begin(now)
    for accepted in (3, 5, 0, 2):
        choice(policy, state, now)
        policy.observe(state, step([1], [5], [accepted], [accepted]))
    fresh = ready(json.loads(json.dumps(policy.state_dict())))
    for own, other in zip(policy.levels, fresh.levels, strict=True):
        assert own == pytest.approx(other)
    assert fresh.state_dict() == policy.state_dict()
    fresh.load_state_dict({})
    assert fresh.state_dict() == {}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"more": 1}, "no memory of Portfolio"),
        ({"accepted": [[1.0], [1.0, 2.0]]}, "no memory of Portfolio"),
        ({"accepted": [{}]}, "no memory of Portfolio"),
        ({"accepted": [1.0], "tested": [1.0]}, r"2 source\(s\) and 5 positions need \[2, 2, 9, 4, 3, 5\]"),
        (counts([[-0.5] * 5] * 2), "none of them negative"),
        (counts([[math.inf] * 5] * 2), "none of them negative"),
        (counts([[0.5] * 5] * 3), r"of shape \[2, 3, 9, 4, 3, 5\]"),
    ],
)
def test_strange_memories_are_refused(change: dict[str, Any], error: str) -> None:
    policy = ready(counts([[0.5] * 5] * 2))
    before = policy.state_dict()
    with pytest.raises(PolicyError, match=error):
        policy.load_state_dict(before | change)
    assert policy.state_dict() == before
    with pytest.raises(PolicyError, match="after `bind`"):
        Portfolio().load_state_dict(before)


def test_rows_that_share_passes_are_decided_together() -> None:
    """One sure row does not make seven others pay for its width; where all are sure, all draft."""
    many = RowsTable(draft={6: 0.1}, verify={1: 1.0, 6: 2.0})
    priced = CostTable(draft={6: 0.1}, verify={1: 1.0, 6: 1.05}, rows={8: many})
    priced = priced.with_sources([priced])
    for sure, size in ((1, 1), (8, 6)):  # 12.9 tokens in 2.1 are less than 8 in 1.0, and 47 are more
        policy: Portfolio = bound(Portfolio(), SPEC, priced)
        policy.load_state_dict(counts([[0.99] * 5, [0.99] * 5], 500.0))
        now = context([[5, 5]] * sure + [[0, 0]] * (8 - sure), running=8)
        made = choice(policy, policy.begin(now), now)
        assert [chosen for _, chosen in made] == [size] * sure + [1] * (8 - sure)
