"""Policies for many rows: each original's rule with worked numbers, and all of them in a decoder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from bpkit_load.batch_ema import BatchEma
from bpkit_load.batch_table import BatchTable
from bpkit_load.turbospec import TurboSpec

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import Policy, PolicyError
from bpkit.registry.discovery import build
from bpkit.registry.resolve import parse_spec, resolve_policy, written
from bpkit.testing import TinyPair
from bpkit.trace.cost import CostTable
from bpkit.types import Context
from tests.records import bound, context, decoder, step

KINDS: dict[str, type[Policy]] = {"batch_table": BatchTable, "batch_ema": BatchEma, "turbospec": TurboSpec}


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


@pytest.mark.parametrize("kind", [BatchEma, TurboSpec])
def test_every_value_of_the_grid_is_valid(kind: type[Policy]) -> None:
    for name, values in kind.Config.grid.items():
        for value in values:
            kind(**{name: value})


@pytest.mark.parametrize("kind", [BatchEma, TurboSpec])
def test_memory_survives_json_and_strangers_are_refused(kind: type[Policy]) -> None:
    policy = bound(kind())
    assert policy.state_dict() == {}
    for accepted in ([7, 3, 0], [7, 7, 7]):
        policy.observe({}, step([7] * 3, accepted))
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
