"""Policies for many rows: each original's rule with worked numbers, and all of them in a decoder."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from bpkit_load.acceptance_fit import AcceptanceFit, log_odds
from bpkit_load.adaptive_verification import AdaptiveVerification, most_tokens_per_second
from bpkit_load.batch_ema import BatchEma
from bpkit_load.batch_table import BatchTable
from bpkit_load.joint import Joint
from bpkit_load.sequoia import Sequoia
from bpkit_load.tree import TreePolicy
from bpkit_load.turbospec import TurboSpec

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.export.prices import PassPrices, StepPrices
from bpkit.policy import Policy, PolicyError
from bpkit.registry.discovery import build
from bpkit.registry.resolve import parse_spec, resolve_policy, written
from bpkit.testing import TinyPair
from bpkit.trace.cost import CostTable
from bpkit.types import Context, Draft, Feature
from tests.records import bound, context, decoder, draft, step

KINDS: dict[str, type[Policy]] = {
    "batch_table": BatchTable,
    "batch_ema": BatchEma,
    "turbospec": TurboSpec,
    "adaptive_verification": AdaptiveVerification,
    "joint": Joint,
    "tree": TreePolicy,
    "sequoia": Sequoia,
}
LEARNING = [BatchEma, TurboSpec, AdaptiveVerification]


def running(rows: int, batch: int | None = None) -> Context:
    """A context beside which so many rows run."""
    now = context(rows if batch is None else batch)
    now.running = rows
    return now


# all ------------------------------------------------------------------------------------------------------------


def test_options_load_without_torch() -> None:
    modules = ", ".join(kind.__module__ for kind in KINDS.values())
    code = f"import {modules}, sys; assert not {{'torch', 'numpy'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_names_load_their_classes() -> None:
    policies = build([EntryPoint("load", "bpkit_load", "bpkit")]).policies
    assert {name: policies[name].load() for name in KINDS} == KINDS
    assert {name: policies[name].load_config() for name in KINDS} == {n: kind.Config for n, kind in KINDS.items()}


@pytest.mark.parametrize(
    "spec",
    [
        "batch_table",
        "batch_table:1:5+2:3+3:1",
        "batch_ema:warmup=0,interval=1,ladders=1:2+4+8+3:1+2+4",
        "turbospec",
        "turbospec:slope=0.5,discount=0.8",
        "adaptive_verification:slope=0.2",
        "adaptive_verification:slope=0.2,when=before",
        "joint",
        "joint:confidences=false,slope=0.2",
        "tree",
        "sequoia",
        "adaptive_verification:slope=0.2,signal=probability,fit_every=2,first_fits=1",
    ],
)
@pytest.mark.parametrize("kind", ["block_diffusion", "autoregressive"])
def test_rows_run_without_faults(pair: TinyPair, spec: str, kind: str) -> None:
    prompts = [pair.ids(text) for text in ("def f(x):", "1, 2, 3, 1, 2,", "a b a b", "x = 1", "y")]
    policy = resolve_policy(spec)
    made, plain = (
        SpeculativeDecoder(pair.target, getattr(pair, kind)(), p, strict=True).generate(
            prompts, batch_size=3, max_new_tokens=16
        )
        for p in (policy, "fixed:1")
    )
    assert [each.tokens.tolist() for each in made] == [each.tokens.tolist() for each in plain]


@pytest.mark.parametrize("kind", LEARNING)
def test_every_value_of_the_grid_is_valid(kind: type[Policy]) -> None:
    for name, values in kind.Config.grid.items():
        for value in values:
            kind(**{name: value})


@pytest.mark.parametrize("kind", LEARNING)
def test_memory_survives_json_and_strangers_are_refused(kind: type[Policy]) -> None:
    policy = bound(kind())
    assert policy.state_dict() == {}
    state = policy.begin(context(3))
    for accepted in ([7, 3, 0], [7, 7, 7]):
        policy.observe(state, step([7] * 3, accepted))
    fresh = bound(kind())
    fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert fresh.memory == policy.memory != kind().memory  # type: ignore[attr-defined]
    fresh.load_state_dict({})
    assert fresh.memory == kind().memory  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match="memory"):
        fresh.load_state_dict({"something": 1})


# batch_table ----------------------------------------------------------------------------------------------------


def test_batch_table_looks_up_as_vllm_does() -> None:
    """Ranges (1-16: 3), (32-128: 2), (256-2048: 0) in drafted tokens; gaps have that of the range before."""
    policy = bound(BatchTable(table="1:4+32:3+256:1"))
    drafted = {
        rows: int(policy.select({}, running(rows, 1))) - 1 for rows in (1, 16, 17, 31, 32, 128, 129, 255, 256, 4096)
    }
    assert drafted == {1: 3, 16: 3, 17: 3, 31: 3, 32: 2, 128: 2, 129: 2, 255: 2, 256: 0, 4096: 0}


def test_batch_table_gives_all_rows_one_size_that_the_decoder_has() -> None:
    assert bound(BatchTable()).select({}, running(5)).tolist() == [4] * 5
    assert bound(BatchTable(), decoder(largest=6)).select({}, running(2)).tolist() == [6, 6]


def test_tables_are_read_as_text_and_mapping_and_written_as_text() -> None:
    for given in ("1:8+4:4+16:1", "16:1; 1:8; 4:4", {4: 4, 1: 8, 16: 1}, {"1": "8", "4": "4", "16": "1"}):
        table = BatchTable(table=given).config.table
        assert [*table.items()] == [(1, 8), (4, 4), (16, 1)]
    typed = written({"name": "batch_table", "table": {1: 8, 4: 4}})
    assert typed == "batch_table:table=1:8+4:4"
    assert resolve_policy(parse_spec(typed)).config.table == {1: 8, 4: 4}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("2:8", "begin at 1"),
        ("8", "1:8"),
        ("1:8+1:4", "twice"),
        ("1:0", "greater"),
        ("1:x", "integer"),
        ({}, "begin at 1"),
    ],
)
def test_a_wrong_table_is_refused(wrong: object, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        BatchTable(table=wrong)


# batch_ema ------------------------------------------------------------------------------------------------------


class Slot:
    """One of SGLang's slots, in steps (drafted tokens), from its description and thresholds."""

    def __init__(self, steps: list[int], start: int, down: float) -> None:
        self.steps, self.down, self.batches = steps, down, 0
        self.now = start if start in steps else steps[len(steps) // 2]
        self.ema = self.now - 1.0

    def update(self, accepted: list[int]) -> None:
        if self.now:
            self.ema = 0.8 * self.ema + 0.2 * sum(accepted) / len(accepted)
        self.batches += 1
        if self.batches > 10 and (self.batches - 10) % 5 == 0:
            self.now = self.next(self.steps.index(self.now))

    def next(self, place: int) -> int:
        if self.now == 0:
            probe = self.steps[min(1, len(self.steps) - 1)]
            if probe and self.ema < 0:
                self.ema = probe - 1.0
            return probe
        begun = place
        while place and self.ema <= max(self.steps[place - 1] - 0.5, 0.5) + self.down:
            place -= 1
        while place >= begun and place < len(self.steps) - 1 and self.ema > self.steps[place] - 0.5:
            place += 1
        return self.steps[place]


@pytest.mark.parametrize("likely", [0.1, 0.6, 0.9])
def test_batch_ema_walks_as_sglang_does(likely: float) -> None:
    policy, outcomes, seen = bound(BatchEma()), random.Random(3), set()
    slots = {1: Slot([1, 3, 5, 7], 7, -0.25), 8: Slot([0, 1, 3], 7, 0), 32: Slot([0, 1], 7, 0), 64: Slot([0], 7, 0)}
    for _ in range(1500):
        rows = outcomes.choice((1, 7, 8, 31, 32, 63, 64, 65))
        slot = slots[max(key for key in slots if key <= rows)]
        sizes = policy.select({}, running(rows)).tolist()
        assert sizes == [slot.now + 1] * rows
        chances = [min(i for i in range(slot.now + 1) if i == slot.now or outcomes.random() > likely) for _ in sizes]
        policy.observe({}, step([slot.now] * rows, chances))
        slot.update(chances)
        seen.add((max(key for key in slots if key <= rows), slot.now))
    averages = policy.memory.average
    assert [averages[rows] for rows in slots] == pytest.approx([slot.ema for slot in slots.values()])
    assert {0.1: (8, 0), 0.6: (1, 3), 0.9: (1, 7)}[likely] in seen
    assert {now for key, now in seen if key == 64} == {0}


def test_batch_ema_by_hand() -> None:
    policy = bound(BatchEma(ladders="1:2+4+8+3:1+2+4", alpha=0.5, warmup=0, interval=1, down=-0.25, start=4))

    def after(accepted: list[int], verified: int) -> tuple[int, float]:
        rows = len(accepted)
        policy.observe({}, step([verified] * rows, accepted))
        key = 3 if rows >= 3 else 1
        return int(policy.select({}, running(rows))[0]), policy.memory.average[key]

    assert after([3, 1], 3) == (4, 2.0), "from 2 (one below 3) halfway to the mean 2: not above 3 - 1/2"
    assert after([3, 3], 3) == (4, 2.5), "2.5 is not above 2.5"
    assert after([3, 3], 3) == (8, 2.75)
    assert after([1, 0], 7) == (4, 1.625), "not above 3 - 1/2 - 1/4, but above 1 - 1/2 - 1/4"
    assert after([0, 0, 0], 3) == (4, 1.0), "another ladder, which began at 4, too; 1 is above 1/2 - 1/4"
    assert after([1, 0, 0, 1], 3) == (4, 0.75)
    assert after([0, 0, 0], 3) == (4, 0.375)
    assert after([0, 0, 0], 3) == (1, 0.1875), "through 2 to no draft: 0.1875 is below 1/2 - 1/4 of both"
    assert after([0, 0, 0], 0) == (2, 0.1875), "a probe"
    assert after([1, 1], 3)[0] == 4, "the first ladder stayed where it was"


def test_batch_ema_counts_rows_of_which_something_was_verified() -> None:
    policy = bound(BatchEma(ladders="1:4", alpha=1.0))
    policy.observe({}, step([3, 0, 1], [3, 0, 1]))
    assert policy.memory.average == {1: 2.0}


def test_batch_ema_ladders_hold_what_the_decoder_drafts() -> None:
    policy = bound(BatchEma(), decoder(trained=3, largest=3))
    assert policy.ladders == {1: [2], 8: [1, 2], 32: [1, 2], 64: [1]}
    assert policy.starts == {1: 2, 8: 2, 32: 2, 64: 1}
    assert bound(BatchEma(), decoder(largest=1)).select({}, running(2)).tolist() == [1, 1]


# turbospec ------------------------------------------------------------------------------------------------------

COST = CostTable.model_validate(
    {
        "draft": {8: 0.2},
        "verify": {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4},
        "rest": 0.1,
        "rows": {16: {"draft": {8: 1.0}, "verify": {1: 2.0, 2: 3.0, 4: 5.0, 8: 9.0}, "rest": 0.2}},
    }
)


def test_turbospec_by_hand() -> None:
    """At a = 1/2: 1, 1.5, 1.875 and 1.992 tokens of sizes 1, 2, 4, 8."""
    policy = bound(TurboSpec(block_sizes="1+2+4+8", prior=0.5), cost=COST)
    assert policy.tokens(0.5) == [1.0, 1.5, 1.875, 1.9921875]
    assert policy.costs(40, 1) == pytest.approx([1.1, 1.4, 1.5, 1.7])
    assert policy.costs(40, 16) == pytest.approx([2.2 / 16, 4.2 / 16, 6.2 / 16, 10.2 / 16])
    assert policy.select({}, running(1)).tolist() == [4], "0.909, 1.071, 1.250, 1.172 tokens a second"
    assert policy.select({}, running(16)).tolist() == [1] * 16, "7.27, 5.71, 4.84, 3.12"
    assert policy.tokens(1.0) == [1.0, 2.0, 4.0, 8.0]


def test_turbospec_has_one_rate_of_all_rows_and_positions() -> None:
    policy = bound(TurboSpec(discount=0.5, prior=0.6, prior_weight=2.0))
    assert policy.rate == 0.6
    policy.observe({}, step([4, 4, 0], [1, 4, 0]))  # tested 2 and 4
    assert policy.rate == pytest.approx((5 + 1.2) / (6 + 2))
    policy.observe({}, step([2], [0]))
    assert policy.rate == pytest.approx((2.5 + 1.2) / (4 + 2))


def test_turbospec_gives_up_drafting_under_load_and_tries_again() -> None:
    policy, chosen = bound(TurboSpec(discount=0.8, slope=0.3)), []
    for _ in range(80):
        size = int(policy.select({}, running(4))[0])
        policy.observe({}, step([size - 1] * 4, [0] * 4))
        chosen.append(size)
    assert 60 < chosen.count(1) < 80
    assert max(chosen[40:]) > 1


def test_turbospec_prices_rows_alone_where_a_table_has_no_more() -> None:
    alone, table = CostTable(draft={8: 0.2}, verify=COST.verify, rest=0.1), bound(TurboSpec(prior=0.5), cost=COST)
    assert table.sizes == [1, 2, 3, 4, 5, 6, 7, 8]
    assert table.costs(0, 17) == pytest.approx(table.costs(0, 1)), "16 rows are the most that it prices"
    assert bound(TurboSpec(), cost=alone).costs(0, 4) == pytest.approx(table.costs(0, 1))
    narrow = COST.model_copy(update={"rows": {16: COST.rows[16].model_copy(update={"verify": {1: 2.0, 4: 2.0}})}})
    assert bound(TurboSpec(prior=0.9), cost=narrow).select({}, running(16)).tolist() == [4] * 16


# adaptive_verification ------------------------------------------------------------------------------------------


def drafted(lengths: list[int]) -> Draft:
    """A draft of so many tokens in each row."""
    now, length = running(len(lengths)), torch.tensor(lengths)
    return Draft(now, length + 1, length, torch.zeros(len(lengths), max(lengths), dtype=torch.long))


def seen(policy: AdaptiveVerification, *steps: tuple[list[int], list[int]]) -> dict[str, torch.Tensor]:
    """The state of rows after steps, given as verified and accepted tokens."""
    state = policy.begin(context(len(steps[0][0])))
    for verified, accepted in steps:
        policy.observe(state, step(verified, accepted))
    return state


def test_adaptive_verification_takes_the_k_that_pays_by_hand() -> None:
    """Two rows whose tokens stand with 0.9, 0.5 and 0.6, 0.1; k positions more cost 2 + slope k."""
    survival = np.array([[0.9, 0.5], [0.6, 0.1]])
    # slope 1/2: 2/2, 2.9/2.5, 3.5/3, 4/3.5, 4.1/4 = 1, 1.16, 1.167, 1.143, 1.025
    # slope 1/5: 2/2, 2.9/2.2, 3.5/2.4, 4/2.6, 4.1/2.8 = 1, 1.318, 1.458, 1.538, 1.464
    for slope, taken in ((1.0, [0, 0]), (0.5, [1, 1]), (0.2, [2, 1]), (0.01, [2, 2])):
        policy = bound(AdaptiveVerification(slope=slope, block_size=3))
        prices = policy.prices(40, 2)
        assert most_tokens_per_second(survival, np.array([2, 2]), prices) == taken
    assert most_tokens_per_second(survival, np.array([1, 2]), prices) == [1, 2]
    assert most_tokens_per_second(survival, np.array([0, 0]), prices) == [0, 0]


# Padding costs nothing here: passes of one width differ by what is asked for alone.
BY_POSITIONS = CostTable.model_validate(
    {
        "draft": {6: 0.5},
        "verify": {1: 1.0, 6: 1.2},
        "rest": 0.3,
        "rows": {
            3: {
                "draft": {6: 0.9},
                "verify": {b: 0.6 + 0.4 * 3 * b for b in range(1, 7)},
                "rest": 0.3,
                "padding": {"verify": 0.4},
            }
        },
    }
)


def test_adaptive_verification_is_the_best_allocation_where_positions_alone_cost() -> None:
    policy, numbers, found = bound(AdaptiveVerification(block_size=6), cost=BY_POSITIONS), random.Random(2), set()
    for _ in range(60):
        likely = numbers.uniform(0.1, 1)
        rates = np.array([[min(1.0, numbers.uniform(0, 2 * likely)) for _ in range(5)] for _ in range(3)])
        survival, most = rates.cumprod(axis=1), [numbers.choice((0, 2, 5)) for _ in range(3)]

        def goodput(taken: tuple[int, ...], survival: np.ndarray = survival) -> float:
            tokens = 3 + sum(survival[row, :count].sum() for row, count in enumerate(taken))
            return float(tokens / (0.6 + 0.4 * (3 + sum(taken)) + 0.3 + 0.9))

        taken = tuple(most_tokens_per_second(survival, np.array(most), policy.prices(40, 3)))
        best = max(map(goodput, itertools.product(*(range(count + 1) for count in most))))
        assert goodput(taken) == pytest.approx(best)
        found.add(taken)
    assert len(found) > 20


def test_adaptive_verification_prices_the_widest_row() -> None:
    """One row of four has seven tokens that stand: worth a pass so wide only if the padding beside them is cheap."""
    wide = CostTable.model_validate(
        {"verify": {1: 1.0, 8: 1.0}, "rows": {4: {"verify": {b: 1 + 0.4 * b for b in range(1, 9)}}}}
    )
    survival = np.array([[0.99**i for i in range(1, 8)], *[[0.01**i for i in range(1, 8)]] * 3])
    for padding, taken in ((0.0, [0, 0, 0, 0]), (0.4 / 4, [7, 0, 0, 0])):
        rows = wide.rows[4].model_copy(update={"padding": wide.rows[4].padding.model_copy(update={"verify": padding})})
        policy = bound(AdaptiveVerification(block_size=8), cost=wide.model_copy(update={"rows": {4: rows}}))
        assert most_tokens_per_second(survival, np.array([7] * 4), policy.prices(40, 4)) == taken


def test_tokens_that_tie_are_taken_or_left_together() -> None:
    policy = bound(AdaptiveVerification(block_size=4, slope=0.5, weight=1.0))
    state = seen(policy, ([3, 3, 3, 3], [3, 1, 1, 0]))  # chances 0.87 (three rows), 0.62, 0.54, 0.37, ...
    assert policy.truncate(state, drafted([3, 3, 3, 3])).tolist() == [2, 1, 1, 0]
    turned = {name: value.flip(0) for name, value in state.items()}
    assert policy.truncate(turned, drafted([3, 3, 3, 3])).tolist() == [0, 1, 1, 2]
    fresh = bound(AdaptiveVerification(block_size=4, slope=0.6))
    assert fresh.truncate(fresh.begin(context(4)), drafted([3, 3, 3, 3])).tolist() == [1, 1, 1, 1], (
        "0.7 each, then 0.49"
    )


def test_adaptive_verification_knows_each_row_and_position() -> None:
    policy = bound(AdaptiveVerification(block_size=4, weight=2.0, discount=0.5, memory_discount=0.8, prior=0.6))
    state = seen(policy, ([3, 3, 0], [1, 3, 0]), ([2, 1, 1], [0, 1, 0]))
    assert state["accepted"].tolist() == [[0.5, 0, 0], [1.5, 0.5, 0.5], [0, 0, 0]]
    assert state["tested"].tolist() == [[1.5, 0.5, 0], [1.5, 0.5, 0.5], [1, 0, 0]]
    assert policy.memory.accepted == pytest.approx([0.8 * 2 + 1, 0.8, 0.8])
    assert policy.memory.tested == pytest.approx([0.8 * 2 + 3, 1.6, 0.8])
    first = (2.6 + 2 * 0.6) / (4.6 + 2)
    second = (0.8 + 2 * first) / (1.6 + 2)
    third = (0.8 + 2 * second) / (0.8 + 2)
    assert policy.rates() == pytest.approx([first, second, third])
    own = [(0.5 + 2 * first) / 3.5, 2 * second / 2.5, third]
    assert policy.survivals(state)[0] == pytest.approx([own[0], own[0] * own[1], own[0] * own[1] * own[2]])
    assert policy.begin(context(1))["tested"].tolist() == [[0, 0, 0]], "a new row knows what all taught"


def test_adaptive_verification_drafts_whole_blocks_or_what_it_verifies() -> None:
    after = bound(AdaptiveVerification(slope=2.0))
    state = after.begin(context(2))
    assert after.select(state, running(2)).tolist() == [8, 8]
    assert after.truncate(state, drafted([7, 7])).tolist() == [0, 0]
    before = bound(AdaptiveVerification(slope=2.0, when="before"))
    assert before.select(before.begin(context(2)), running(2)).tolist() == [1, 1]
    cheap = bound(AdaptiveVerification(slope=0.1, when="before"))
    sizes = cheap.select(cheap.begin(context(2)), running(2))
    assert sizes.tolist() == [5, 5], "2.53 / 1.3, 2.77 / 1.4, 2.94 / 1.5 tokens a plain step"
    assert cheap.truncate({}, drafted([4, 4])).tolist() == [4, 4]


def test_before_the_draft_its_cost_counts() -> None:
    policy = bound(AdaptiveVerification(block_size=6, when="before"), cost=BY_POSITIONS)
    prices = policy.prices(40, 3)
    places = np.array([0, 1, 0, 2])  # in the order of their chances
    drafts, widths, positions = [0.0, 0.9, 0.9, 0.9, 0.9], [1, 2, 3, 3, 4], [3, 4, 5, 6, 7]
    verified = [
        BY_POSITIONS.batch_seconds("verify", width, 40, 3, asked)
        for width, asked in zip(widths, positions, strict=True)
    ]
    assert prices.of(places) == pytest.approx(np.add(verified, drafts) + 0.3)


def test_adaptive_verification_takes_no_more_than_is_left_to_generate() -> None:
    policy, draft = bound(AdaptiveVerification(slope=0.0)), drafted([7, 5, 7])
    draft.context.remaining = torch.tensor([100, 100, 3])
    assert policy.truncate(policy.begin(context(3)), draft).tolist() == [7, 5, 2]


def test_prices_of_passes_are_the_cost_model_s() -> None:
    table = CostTable.model_validate(
        {
            "draft": {2: 0.1, 6: 0.5},
            "verify": {b: {0: 1.0 + b, 100: 2.0 + b} for b in range(1, 7)},
            "rows": {
                4: {
                    "draft": {2: 0.2, 6: 1.0},
                    "verify": {b: {0: 1.0 + 2 * b, 100: 4.0 + 2 * b} for b in range(1, 6)},
                    "padding": {"verify": 0.25, "draft": 0.03},
                }
            },
        }
    )
    prices = StepPrices(table, 0.0, 32, rows=4)
    assert prices.shared
    for phase, smallest in (("verify", 1), ("draft", 2)):
        passes = PassPrices(prices, phase, smallest, 6)
        for size in range(smallest, 6):
            asked = np.arange(size + 3 if phase == "verify" else size, 4 * size + 1)
            exact = [table.batch_seconds(phase, size, 32, 4, positions) for positions in asked.tolist()]
            assert passes.of(np.full(len(asked), size), asked) == pytest.approx(exact)
    assert PassPrices(prices, "verify", 1, 6).of(np.array([6]), np.array([12])) == [np.inf], "4 rows of 6 have no price"
    alone = StepPrices(table, 0.0, 32, rows=5)
    assert not alone.shared
    mean = PassPrices(alone, "verify", 1, 6).of(np.array([3, 6]), np.array([10, 20]))
    assert mean == pytest.approx([5 * table.seconds("verify", size, 32) for size in (2, 4)])


# adaptive_verification by the drafter's probability -------------------------------------------------------------


def test_chances_by_probability_decide_as_by_hand() -> None:
    """With weight 1 and bias 0 the chance is the probability itself: the two rows of the example above."""
    policy = bound(AdaptiveVerification(slope=0.2, block_size=3, signal="probability", first_fits=1))
    assert policy.wants == {Feature.DRAFT_PROBABILITY}
    assert AdaptiveVerification().wants == frozenset()
    probable = draft(draft_probability=[[0.9, 5 / 9], [0.6, 1 / 6]])
    state = policy.begin(context(2))
    assert policy.truncate(state, probable).tolist() == [2, 2], "before the first fit"
    policy.memory.fit = AcceptanceFit.fresh(2).model_copy(update={"weight": [1.0, 1.0], "bias": [0.0, 0.0], "fits": 1})
    assert policy.truncate(state, probable).tolist() == [2, 1]
    assert policy.survivals(state).tolist() == [pytest.approx([0.9, 0.5]), pytest.approx([0.6, 0.1])]
    shorter = draft([2, 0], draft_probability=[[0.9, float("nan")], [0.6, 0.9]])
    assert policy.truncate(state, shorter).tolist() == [2, 0]


def test_a_fit_is_one_newton_step_of_logistic_regression() -> None:
    numbers, fit = np.random.default_rng(0), AcceptanceFit.fresh(2)
    odds = numbers.normal(size=(80, 2))
    stood = odds + numbers.normal(size=(80, 2)) > 0
    tested = np.stack((np.full(80, True), np.arange(80) < 49), axis=1)
    for rows in (slice(0, 30), slice(30, 80)):
        fit.add(odds[rows], stood[rows], tested[rows])
    assert (fit.steps, fit.tested) == (2, [80, 49])
    fit.fit()
    chance = 1 / (1 + np.exp(-1.5))
    design = np.stack((odds[:, 0], np.ones(80)), axis=1)
    information = chance * (1 - chance) * design.T @ design + 1e-3 * np.eye(2)
    taken = np.linalg.solve(information, design.T @ (stood[:, 0] - chance))
    assert [fit.weight[0], fit.bias[0]] == pytest.approx([taken[0], 1.5 + taken[1]])
    assert fit.weight[0] > 0.1
    assert (fit.weight[1], fit.bias[1]) == (0.0, 1.5), "49 tokens are too few"
    assert (fit.steps, fit.fits, fit.tested) == (0, 1, [0, 0])


def test_a_fit_finds_the_curve_and_takes_none_that_falls() -> None:
    numbers, fit = np.random.default_rng(1), AcceptanceFit.fresh(2)
    for _ in range(12):
        odds = numbers.normal(1.0, 1.5, size=(4000, 2))
        chances = 1 / (1 + np.exp(-np.stack((0.8 * odds[:, 0] - 0.5, -odds[:, 1]), axis=1)))
        fit.add(odds, numbers.random((4000, 2)) < chances, np.full((4000, 2), True))
        fit.fit()
    assert [fit.weight[0], fit.bias[0]] == pytest.approx([0.8, -0.5], abs=0.08)
    assert (fit.weight[1], fit.bias[1]) == (0.0, 1.5)


def test_only_tokens_that_were_reached_and_verified_teach_the_fit() -> None:
    policy = bound(AdaptiveVerification(block_size=4, signal="probability", fit_every=2))
    state = policy.begin(context(3))
    policy.truncate(state, draft(draft_probability=[[0.8, 0.7, 0.6]] * 3))
    policy.observe(state, step([3, 2, 0], [1, 2, 0]))
    assert policy.memory.fit.tested == [2, 2, 0]
    chance = 1 / (1 + np.exp(-1.5))
    assert policy.memory.fit.gradient[1] == pytest.approx([(1 - 2 * chance) * np.log(0.7 / 0.3), 1 - 2 * chance])
    stored = json.loads(json.dumps(policy.state_dict()))
    fresh = bound(AdaptiveVerification(block_size=4, signal="probability"))
    fresh.load_state_dict(stored)
    assert fresh.memory.fit == policy.memory.fit
    policy.observe(state, step([0, 0, 0], [0, 0, 0]))
    assert (policy.memory.fit.fits, policy.memory.fit.steps) == (1, 0)


def test_log_odds_are_finite_and_of_the_first_tokens() -> None:
    odds = log_odds(np.array([[0.0, 1.0, float("nan"), 0.5]], np.float32), 3)
    assert np.isfinite(odds).all()
    assert odds[0].tolist() == pytest.approx([-np.log(1e6), np.log(1e6), 0], rel=1e-6)
    assert log_odds(np.array([[0.5]]), 3).tolist() == [[0, 0, 0]]


def test_probabilities_are_known_only_after_the_draft() -> None:
    with pytest.raises(PolicyError, match="leave out when=before"):
        AdaptiveVerification(signal="probability", when="before")
