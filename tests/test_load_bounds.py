"""Bounds under load against exhaustive search: allocations of a step, and whole outputs of two rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from bpkit.decode.clock import price
from bpkit.testing.traces import synthetic_prompt, synthetic_prompts
from bpkit.trace.cost import CostTable
from bpkit.trace.cost.table import Padding, RowsTable
from bpkit.trace.load import ChangingLoad, ClosedLoop, Load, PoissonLoad
from bpkit.trace.oracle.allocation import StepPrice, allocate, phase_price
from bpkit.trace.oracle.clairvoyant import Allocating, Known, clairvoyant, knows_distributions, pace
from bpkit.trace.oracle.load_regret import KINDS_UNDER_LOAD, split_of_regret
from bpkit.trace.oracle.paths import oracle_distributions, oracle_step_truncate
from bpkit.trace.oracle.plan import Float64
from bpkit.trace.records import PromptTrace
from bpkit.trace.server import Served, ServerReplayer
from bpkit.types import BLOCK_DIFFUSION, NGRAM, CostModel, DecoderSpec, Work, work_of
from tests.test_server_replay import COST, SPEC

AT = 50


# Cost models to search under


def random_table(rng: np.random.Generator, width: int, rows: int, padding: float) -> CostTable:
    """Prices in no order; padding may save more than a pass costs, which is then free."""

    def table() -> dict[str, Any]:
        draft = {size: float(rng.uniform(0.2, 0.8)) for size in range(2, width + 2)}
        return {"draft": draft, "verify": {wide: float(rng.uniform(0.5, 2)) for wide in range(1, width + 2)}}

    saves = Padding(draft=padding * float(rng.uniform()), verify=padding * float(rng.uniform()))
    tables = {count: RowsTable(**table(), rest=0.1, padding=saves) for count in range(2, rows + 1)}
    return CostTable(**table(), rest=0.1, rows=tables)


class Roofline:
    """The larger of two prices, by positions; with `experts`, one that rises ever less on top."""

    def __init__(self, rng: np.random.Generator, *, experts: float = 0.0) -> None:
        self.experts = experts
        self.reads, self.computes = float(rng.uniform(0.5, 2)), float(rng.uniform(0.05, 0.6))
        self.drafts = float(rng.uniform(0.1, 0.5)), float(rng.uniform(0.02, 0.3))

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return self.batch_seconds(phase, size, context_length, 1, size)

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        if phase == "verify":
            touched = self.experts * (1 - 0.6**positions) + 0.02 * size * (self.experts > 0)
            return max(self.reads, self.computes * positions) + touched
        if phase == "draft":
            return max(self.drafts[0], self.drafts[1] * positions)
        return 0.1 if phase == "rest" else 0.0


def costs(rng: np.random.Generator, width: int, rows: int) -> list[CostModel]:
    return [
        random_table(rng, width, rows, 0.0),
        random_table(rng, width, rows, 0.1),
        random_table(rng, width, rows, 0.8),
        Roofline(rng),
        Roofline(rng, experts=1.0),
    ]


# One step


def random_worth(rng: np.random.Generator, rows: int, width: int) -> Float64:
    """Tokens, or what they are worth, of rows whose drafts are of some lengths and stand in part."""
    worth = np.full((rows, width + 1, width + 1), -np.inf)
    of_tokens = np.cumsum(np.r_[1, rng.uniform(0.3, 1.2, width)]) if rng.uniform() < 0.5 else np.arange(1.0, width + 2)
    for row in range(rows):
        for length in range(1, width + 1):
            if rng.uniform() < 0.7:
                stands, most = int(rng.integers(0, length + 1)), int(rng.integers(0, length + 1))
                most = length if rng.uniform() < 0.8 else most
                worth[row, length, : most + 1] = of_tokens[np.minimum(np.arange(most + 1), stands)]
    worth[:, 0, 0] = 1
    return worth


def value(
    worth: Float64, cost: CostModel, rate: float, chosen: list[tuple[int, int]], rest: tuple[float, float]
) -> float:
    """Of an allocation, as the runtime prices it, with `rest` on top for no draft and for drafts."""
    sizes = [length + 1 if length else 0 for length, _ in chosen]
    widths = [verified + 1 for _, verified in chosen]
    work = Work(max(sizes), 0, max(widths), AT, rows=len(chosen), drafted=sum(sizes), verified=sum(widths))
    seconds = price(cost, work)
    time = seconds.draft + seconds.verify + rest[bool(max(sizes))]
    return float(sum(worth[row, length, kept] for row, (length, kept) in enumerate(chosen))) - rate * time


def step(cost: CostModel, width: int, rows: int, rest: tuple[float, float]) -> StepPrice:
    return StepPrice(phase_price(cost, "draft", width, AT, rows), phase_price(cost, "verify", width, AT, rows), *rest)


@pytest.mark.parametrize(("rows", "width", "cases"), [(1, 4, 10), (2, 4, 30), (3, 3, 10)])
def test_the_allocation_of_a_step_is_the_best_of_all(rows: int, width: int, cases: int) -> None:
    for case in range(cases):
        rng = np.random.default_rng((rows, case))
        for cost in costs(rng, width, rows):
            worth, rate = random_worth(rng, rows, width), float(rng.uniform(0.5, 4))
            rest = float(rng.uniform(0, 0.2)), float(rng.uniform(0, 0.4))
            found = allocate(worth, step(cost, width, rows, rest), rate)
            choices = [[*zip(*map(np.ndarray.tolist, np.nonzero(np.isfinite(row))), strict=True)] for row in worth]
            best = max(value(worth, cost, rate, list(chosen), rest) for chosen in itertools.product(*choices))
            own = [*zip(found.drafted.tolist(), found.verified.tolist(), strict=True)]
            assert found.value == pytest.approx(value(worth, cost, rate, own, rest))
            assert found.value == pytest.approx(best)
            assert found.bound == pytest.approx(best)


@pytest.mark.parametrize("kind", range(5))
def test_of_many_rows_a_bound_is_told(kind: int) -> None:
    rng = np.random.default_rng(kind)
    rows, width = 24, 8
    cost = costs(rng, width, rows)[kind]
    worth = random_worth(rng, rows, width)
    # For each row what is likely and what is not, so that there are better and worse allocations.
    found = allocate(worth, step(cost, width, rows, (0.1, 0.2)), 2.0, slack=0.01 * rows)
    assert found.value <= found.bound
    lengths = [np.flatnonzero(np.isfinite(row[:, 0])) for row in worth]
    for _ in range(300):
        chosen = []
        for row, each in enumerate(lengths):
            length = int(rng.choice(each))
            chosen.append((length, int(rng.integers(0, np.isfinite(worth[row, length]).sum()))))
        assert value(worth, cost, 2.0, chosen, (0.1, 0.2)) <= found.bound + 1e-9
    if kind < 4:
        assert found.bound - found.value <= 0.01 * rows


# Whole outputs


def best_seconds(prompts: list[PromptTrace], spec: DecoderSpec, cost: CostModel) -> float:
    """Least seconds of all steps of two requests that begin together, over every sequence of joint choices."""
    work = spec.work

    def choices(prompt: PromptTrace, position: int) -> Iterator[tuple[int, int, int]]:
        yield 0, 0, 0
        drafts = prompt.drafts
        for length, stands in zip(drafts.draft_length[position - 1], drafts.num_accepted[position - 1], strict=True):
            for kept in range(min(int(length), prompt.most_verified(position)) + 1) if length else ():
                yield int(length), kept, min(int(stands), kept)

    @cache
    def left(rows: tuple[tuple[int, int, int], ...]) -> float:
        """From (prompt, position, waiting) of rows that run."""
        if not rows:
            return 0.0
        at = max(prompts[place].prompt_length + position for place, position, _ in rows)
        found = np.inf
        for chosen in itertools.product(*(choices(prompts[place], position) for place, position, _ in rows)):
            sizes = [length + 1 if length else 0 for length, _, _ in chosen]
            anyone = max(sizes) > 0
            waits = max(waiting for _, _, waiting in rows) if anyone else 0
            wide = [kept + 1 for _, kept, _ in chosen]
            work_done = Work(max(sizes), waits, max(wide), at, rows=len(rows), drafted=sum(sizes), verified=sum(wide))
            after = []
            for (place, position, waiting), (length, _, stands) in zip(rows, chosen, strict=True):
                new = (
                    work.after_draft(length, stands)
                    if length
                    else work.after_no_draft(0 if anyone else waiting, stands + 1)
                )
                if position + stands + 1 < prompts[place].output_length:
                    after.append((place, position + stands + 1, new))
            found = min(found, price(cost, work_done).total + left(tuple(after)))
        return found

    return left(tuple((place, 1, work.first(prompt.prompt_length)) for place, prompt in enumerate(prompts)))


def pair_of(seed: int, length: int) -> list[PromptTrace]:
    of_pair = {"output_length": length, "max_new_tokens": length + seed % 3, "prompt_length": 3, "seed": seed}
    return [synthetic_prompt(index, block_sizes=(2, 3, 5), **of_pair) for index in range(2)]


def small_costs(rng: np.random.Generator) -> list[CostModel]:
    """Models that are not absurd: prices rise."""

    def table(rows: int) -> dict[str, Any]:
        draft = {size: 0.2 + 0.03 * rows * size * float(rng.uniform(0.5, 1.5)) for size in (2, 3, 5)}
        verify = {wide: 1 + 0.05 * rows * wide * float(rng.uniform(0.5, 1.5)) for wide in range(1, 6)}
        return {"draft": draft, "verify": verify, "catch_up": {2: 0.0, 4: 0.1 * float(rng.uniform())}}

    saves = Padding(draft=0.01, verify=0.03)
    of_table = CostTable(**table(1), rest=0.1, rows={2: RowsTable(**table(2), rest=0.1, padding=saves)})
    return [of_table, Roofline(rng), Roofline(rng, experts=0.5)]


def test_no_sequence_of_choices_undercuts_the_bound() -> None:
    spec = DecoderSpec("target", "drafter", BLOCK_DIFFUSION, 5, 5, hidden_size=8, vocab_size=100)
    over, under = [], []
    for seed in range(2):
        prompts = pair_of(seed, 8)
        for cost in small_costs(np.random.default_rng(seed)):
            known = clairvoyant(spec, cost, prompts, range(2), ClosedLoop(2))
            seconds, best = float(known.served.seconds.sum()), best_seconds(prompts, spec, cost)
            assert known.least_seconds <= best + 1e-9 <= seconds + 2e-9
            over.append(seconds / best)
            under.append(known.least_seconds / best)
    assert np.mean(under) > 0.9
    # Outputs so short have no long run: at their ends rows wait for each other, which no plan foresees.
    assert np.mean(over) < 1.1


def best_pace(prompt: PromptTrace, cost: CostModel) -> float:
    """Least seconds per token in the long run, where two clients ask for the same prompt again and again.

    Over all cycles of joint choices, by halving: with a token worth too many seconds, some cycle loses time.
    """
    last = prompt.output_length - 1
    states = [*itertools.product(range(1, last + 1), repeat=2)]
    place = {state: number for number, state in enumerate(states)}
    edges: dict[tuple[int, int, int], float] = {}
    drafts = prompt.drafts

    def choices(position: int) -> list[tuple[int, int, int]]:
        both = zip(drafts.draft_length[position - 1].tolist(), drafts.num_accepted[position - 1].tolist(), strict=True)
        return [
            (0, 0, 0),
            *((n, k, min(a, k)) for n, a in both for k in range(min(n, prompt.most_verified(position)) + 1)),
        ]

    for one, other in states:
        for chosen in itertools.product(choices(one), choices(other)):
            sizes = [n + 1 if n else 0 for n, _, _ in chosen]
            wide = [k + 1 for _, k, _ in chosen]
            work = Work(max(sizes), 0, max(wide), AT, rows=2, drafted=sum(sizes), verified=sum(wide))
            yielded = [a + 1 for _, _, a in chosen]
            after = tuple(
                at + tokens if at + tokens <= last else 1 for at, tokens in zip((one, other), yielded, strict=True)
            )
            key = place[one, other], place[after[0], after[1]], sum(yielded)
            edges[key] = min(edges.get(key, np.inf), price(cost, work).total)
    source, target, tokens = (np.array(column) for column in zip(*edges, strict=True))
    seconds, low, high = np.array([*edges.values()]), 0.0, 10.0
    while high - low > 1e-5:
        pace = (low + high) / 2
        left = np.zeros(len(states))
        for _ in range(len(states) + 1):
            before, found = left, seconds - pace * tokens + left[target]
            left = np.minimum(before, np.full(len(states), np.inf))
            np.minimum.at(left, source, found)
            if (left >= before - 1e-12).all():
                low = pace
                break
        else:
            high = pace
    return high


def test_plans_come_near_to_the_best_of_all_cycles() -> None:
    spec = DecoderSpec("target", "drafter", NGRAM, 5, 5, hidden_size=8, vocab_size=100)
    over = []
    for seed in range(3):
        prompt = pair_of(seed, 8)[seed % 2]
        for cost in small_costs(np.random.default_rng(seed)):
            served = clairvoyant(spec, cost, [prompt], [0] * 24, ClosedLoop(2)).served
            pace = served.seconds[: served.full].sum() / served.tokens[: served.full].sum()
            over.append(float(pace) / best_pace(prompt, cost))
    assert min(over) > 0.97, "a run ends within a cycle"
    assert np.mean(over) < 1.04
    assert max(over) < 1.12


FLAT = CostTable(
    draft={2: 0.3, 4: 0.4, 8: 0.7},
    verify={width: 1 + 0.06 * width for width in range(1, 9)},
    rest=0.1,
    rows={8: RowsTable(draft={8: 2.0}, verify={width: 2 + 0.3 * width for width in range(1, 9)}, rest=0.1)},
)


def test_one_row_at_a_time_gives_the_oracles_of_one_row() -> None:
    spec, prompts = replace(SPEC, work=work_of(NGRAM)), synthetic_prompts(3)
    places = (0, 1, 2, 0)
    known = clairvoyant(spec, FLAT, prompts, places, ClosedLoop(1))
    best = sum(oracle_step_truncate(prompts[place], spec.work, FLAT).seconds for place in places)
    assert known.served.seconds.sum() == pytest.approx(best)
    assert known.least_seconds == pytest.approx(best)
    assert known.unproven == 0
    chances = knows_distributions(spec, FLAT, prompts, places, ClosedLoop(1))
    expected = sum(oracle_distributions(prompts[place], spec.work, FLAT).seconds for place in places)
    assert chances.least_seconds == pytest.approx(expected)
    assert chances.served.seconds.sum() == pytest.approx(expected, rel=0.1)


LOADS = (ClosedLoop(4), ChangingLoad((1, 8, 1), requests_per_row=1), PoissonLoad(20.0, 12, max_rows=8))


def served(policy: str, prompts: list[PromptTrace], load: Load) -> Served:
    return ServerReplayer(SPEC, policy, COST).serve(prompts, [number % 4 for number in range(10)], load)


@pytest.mark.parametrize("load", LOADS, ids=["closed", "changing", "poisson"])
def test_who_knows_more_is_faster(load: Load) -> None:
    prompts = synthetic_prompts(4)
    places = [number % 4 for number in range(10)]
    facts = clairvoyant(SPEC, COST, prompts, places, load)
    chances = knows_distributions(SPEC, COST, prompts, places, load)
    seconds = [float(known.served.seconds.sum()) for known in (facts, chances)]
    others = [float(served(f"fixed:{size}", prompts, load).seconds.sum()) for size in (1, 2, 3, 4, 6, 8)]
    assert facts.least_seconds <= seconds[0] < min(others)
    if not isinstance(load, PoissonLoad):  # under which it may save time of steps to let requests meet
        assert seconds[0] < seconds[1] < 1.01 * min(others)
    assert facts.served.tokens.sum() == sum(prompts[place].decided_by_steps for place in places)
    assert facts.served.fallbacks == chances.served.fallbacks == 0
    assert facts.unproven < 1e-3


def test_chances_have_to_be_in_the_trace() -> None:
    prompts = [replace(each, drafts=replace(each.drafts, match_probability=None)) for each in synthetic_prompts(2)]
    with pytest.raises(ValueError, match="no match probabilities"):
        knows_distributions(SPEC, COST, prompts, (0, 1), ClosedLoop(2))


# Regret


PLACES = [number % 4 for number in range(16)]


def regret(policy: Any, known: Known, noise: Known | None = None, **options: Any) -> dict[str, float]:
    replayer = ServerReplayer(known.oracle.spec, policy, known.oracle.cost, strict=True, **options)
    return split_of_regret(replayer, known.oracle.prompts, PLACES, known.oracle.load, known, noise)


@pytest.fixture(scope="module")
def facts() -> Known:
    return clairvoyant(SPEC, COST, synthetic_prompts(4), PLACES, ClosedLoop(4))


@pytest.mark.parametrize("policy", ["fixed:1", "fixed:2", "fixed:8", "goodput:1-4+6+8"])
def test_regret_is_all_that_the_clairvoyant_server_does_not_take(policy: str, facts: Known) -> None:
    found = regret(policy, facts)
    run = ServerReplayer(SPEC, policy, COST).serve(facts.oracle.prompts, PLACES, ClosedLoop(4))
    assert found["together"] == pytest.approx(1 - pace(facts.served) / pace(run))
    kinds = {name: found[name] for name in KINDS_UNDER_LOAD}
    assert min(kinds.values()) >= 0
    assert sum(found.values()) == pytest.approx(2 * found["together"])
    assert abs(found["elsewhere"]) < 0.25
    if policy == "fixed:1":
        assert sum(kinds.values()) == kinds["drafted_too_little"] > 0.03
    if policy == "fixed:8":
        assert kinds["verified_too_much"] == max(kinds.values())
        assert kinds["drafted_too_much"] > kinds["drafted_too_little"] == 0


def test_the_clairvoyant_server_regrets_nothing(facts: Known) -> None:
    own = Allocating(facts.oracle.outcomes, facts.plan, PLACES)
    assert regret(own, facts) == pytest.approx(
        dict.fromkeys([*KINDS_UNDER_LOAD, "deciding", "elsewhere", "together"], 0.0)
    )


def test_drafts_of_the_wrong_rows_are_told_from_too_many() -> None:
    """One of two rows accepts everything and the other nothing; as many positions are drafted as would be best."""
    right, wrong = synthetic_prompt(0), synthetic_prompt(1, output_length=7)  # six steps each
    full = np.broadcast_to(right.drafts.draft_length, right.drafts.num_accepted.shape)
    room = right.output_length - 1 - np.arange(1, right.output_length)[:, None]
    right = replace(right, drafts=replace(right.drafts, num_accepted=np.minimum(full, room).astype(np.int32)))
    wrong = replace(wrong, drafts=replace(wrong.drafts, num_accepted=np.zeros_like(wrong.drafts.num_accepted)))
    by_position = Positions()
    known = clairvoyant(SPEC, by_position, [right, wrong], PLACES_OF_TWO, ClosedLoop(2))
    replayer = ServerReplayer(SPEC, "fixed:4", by_position)
    found = split_of_regret(replayer, [right, wrong], PLACES_OF_TWO, ClosedLoop(2), known)
    assert found["drafted_by_row"] > 3 * (found["drafted_too_much"] + found["drafted_too_little"])


PLACES_OF_TWO = [0, 1] * 6


class Positions:
    """Each position takes as long as any other, whose row it is of."""

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return self.batch_seconds(phase, size, context_length, 1, size)

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        return {"draft": 0.05 * positions, "verify": 1 + 0.05 * positions, "rest": 0.1}.get(phase, 0.0)


def test_features_and_decisions_are_the_time_of_deciding(facts: Known) -> None:
    found = regret("svip", facts, charges_decisions=True)
    assert found["deciding"] > 0.005
    assert sum(found.values()) == pytest.approx(2 * found["together"])


def test_what_is_not_knowable_is_said(facts: Known) -> None:
    chances = knows_distributions(SPEC, COST, facts.oracle.prompts, PLACES, ClosedLoop(4))
    found = regret("fixed:2", chances, facts)
    assert found["not_knowable"] > 0.03
    assert found["together"] == pytest.approx(regret("fixed:2", facts)["together"])
    assert sum(found.values()) == pytest.approx(2 * found["together"])
