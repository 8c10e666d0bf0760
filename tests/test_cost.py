"""Cost tables: staircases, context lengths, files by hand, presets, and what is told when something is wrong."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpkit import Policy, SpeculativeDecoder
from bpkit.decode.clock import ClockFaultWarning, CostClock, GuardedClock, price
from bpkit.policy import State
from bpkit.testing import TinyPair
from bpkit.trace.cost import CostError, CostTable, RowsTable, flat, linear, read_cost, write_cost
from bpkit.trace.cost.presets import PRESETS
from bpkit.trace.cost.table import Padding
from bpkit.trace.cost.timed import TimedSteps
from bpkit.types import PHASES, Context, CostModel, DecoderSpec, Seconds, Step, Work


def table(**more: Any) -> CostTable:
    """Irregular on purpose: no smooth curve goes through these."""
    values: dict[str, Any] = {
        "name": "irregular",
        "draft": {2: 0.25, 4: 0.5, 8: 0.375},
        "catch_up": {2: 0.0625, 8: 0.25},
        "features": {8: 0.03125},
        "verify": {1: {100: 1.0, 300: 2.0}, 2: 1.5, 8: {100: 2.0, 200: 4.0, 400: 3.0}},
        "rest": 0.125,
        "prefill": {9: 5.0, 21: 8.0},
    }
    return CostTable(**{**values, **more})


# Lookup


@pytest.mark.parametrize(
    ("phase", "size", "context_length", "seconds"),
    [
        ("draft", 1, 0, 0.0),  # block size 1 drafts nothing
        ("draft", 2, 0, 0.25),
        ("draft", 3, 0, 0.5),  # the next larger given size, not a line between 0.25 and 0.5
        ("draft", 5, 0, 0.375),  # also where that is cheaper
        ("catch_up", 0, 0, 0.0),
        ("catch_up", 1, 0, 0.0),
        ("catch_up", 3, 0, 0.25),
        ("catch_up", 16, 0, 0.5),  # beyond the largest: in proportion
        ("features", 2, 0, 0.03125),
        ("verify", 1, 200, 1.5),  # context lengths: linear in between
        ("verify", 1, 7, 1.0),  # constant outside
        ("verify", 1, 999, 2.0),
        ("verify", 2, 200, 1.5),  # one figure for all
        ("verify", 3, 300, 3.5),
        ("rest", 1, 50, 0.125),
        ("prefill", 0, 200, 0.0),
        ("prefill", 1, 200, 1.5),  # a pass over one position
        ("prefill", 5, 200, 3.25),  # linear from there on
        ("prefill", 9, 200, 5.0),
        ("prefill", 15, 200, 6.5),
        ("prefill", 42, 200, 16.0),  # beyond the largest: in proportion
    ],
)
def test_figures_of_sizes_and_context_lengths(phase: str, size: int, context_length: int, seconds: float) -> None:
    assert table().seconds(phase, size, context_length) == seconds


@pytest.mark.parametrize("phase", PHASES)
def test_many_at_once_are_the_same_as_one_by_one(phase: str) -> None:
    cost, sizes, contexts = table(), np.arange(1, 9)[:, None], np.array([3, 100, 150, 299, 301, 400, 1000])
    found = cost.array(phase, sizes, contexts)
    assert found.dtype == np.float64
    assert found.shape == (8, 7)
    for i, size in enumerate(range(1, 9)):
        for j, context in enumerate(contexts.tolist()):
            assert found[i, j] == pytest.approx(cost.seconds(phase, size, context), rel=1e-14)
    assert cost.array("catch_up", [1, 2, 24]).tolist() == [0.0, 0.0625, 0.75]
    assert cost.array("prefill", [0, 1, 5, 9, 15, 42], 200).tolist() == [0.0, 1.5, 3.25, 5.0, 6.5, 16.0]
    assert table(prefill={1: 2.0}).array("prefill", [0, 1, 5], 200).tolist() == [0.0, 2.0, 10.0]
    assert cost.array(phase, np.zeros((0, 3), int), 5).shape == (0, 3)


def test_a_table_that_is_left_out_costs_nothing() -> None:
    cost = CostTable(verify={1: 1.0, 64: 2.0})
    assert price(cost, Work(draft_size=40, waiting=500, verify_width=40, context_length=9, features=True)).total == 2.0
    assert cost.array("draft", [2, 999]).tolist() == [0.0, 0.0]
    assert cost.largest_block_size is None


def test_prompts_are_priced_where_the_table_says_so() -> None:
    assert table().prices_prefill
    unpriced = table(prefill={})
    assert not unpriced.prices_prefill
    assert unpriced.seconds("prefill", 500, 100) == 0.0
    assert unpriced.array("prefill", [5, 500]).tolist() == [0.0, 0.0]
    assert "prefill" not in unpriced.model_dump()
    for other in (table().with_sources([unpriced]).of_source(1), flat(table()), linear(table())):
        assert other.seconds("prefill", 15, 0) == 6.5
    assert unpriced.model_copy(update={"prefill": {9: 2.0}}).seconds("prefill", 9, 0) == 2.0


def test_a_step_is_priced_phase_by_phase() -> None:
    work = Work(draft_size=4, waiting=2, verify_width=1, context_length=150, features=True)
    spent = price(table(), work)
    assert (spent.draft, spent.verify, spent.rest) == (0.5 + 0.0625 + 0.03125, 1.25, 0.125)


@pytest.mark.parametrize("phase", ["draft", "features", "verify"])
def test_a_size_above_the_largest_is_told_with_all_that_mends_it(phase: str) -> None:
    for ask in (table().seconds, table().array):
        with pytest.raises(
            CostError, match=f"'irregular' has no {phase} cost for .* 9: it gives .*8.*--max-block-size"
        ):
            ask(phase, 9, 100)
    with pytest.raises(CostError, match="'irregular' has no verify cost"):
        table().array("verify", [1, 9], 100)


def test_what_is_no_step_has_no_cost() -> None:
    with pytest.raises(CostError, match="verifies at least the anchor"):
        table().seconds("verify", 0, 1)
    with pytest.raises(CostError, match="verifies at least the anchor"):
        table().array("verify", [1, 0], 1)
    with pytest.raises(CostError, match="draft, catch_up, features, verify, rest, prefill"):
        table().seconds("postfill", 1, 1)


def test_a_table_goes_to_other_processes() -> None:
    cost = table()
    assert cost.seconds("verify", 8, 150) == 3.0
    sent = pickle.loads(pickle.dumps(cost))
    assert sent == cost
    assert sent.seconds("verify", 8, 150) == 3.0


def test_tokens_that_are_read_again_widen_the_pass_or_take_one_of_their_own() -> None:
    cost = CostTable(name="square", verify={width: float(width**2) for width in range(1, 40)}, rest=0.5)

    def verify(width: int, reread: int) -> float:
        return price(cost, Work(0, 0, verify_width=width, context_length=9, reread=reread)).verify

    assert verify(4, 0) == 16
    assert verify(4, 3) == 49
    assert verify(4, 16) == 400
    assert verify(4, 17) == 17**2 + 16  # a committing pass before it
    assert verify(1, 17) == 18**2  # a single token commits them itself
    steps = TimedSteps.of(
        [(Work(0, 0, width, 9, reread=reread), Seconds()) for width, reread in ((4, 3), (4, 17), (1, 17))]
    )
    assert steps.width.tolist() == [7, 18]


def test_a_copy_with_other_figures_prices_by_them() -> None:
    cost = table()
    assert (cost.seconds("draft", 2, 0), cost.seconds("verify", 1, 0)) == (0.25, 1.0)
    other = cost.model_copy(update={"draft": {2: 9.0}, "verify": {1: 7.0}})
    assert (other.seconds("draft", 2, 0), other.seconds("verify", 1, 0)) == (9.0, 7.0)
    assert cost.seconds("draft", 2, 0) == 0.25


# Several rows


def of_rows(**more: Any) -> CostTable:
    """With figures for 4 and 8 rows."""
    four = RowsTable(
        draft={2: 1.0, 8: 2.0},
        catch_up={2: 0.25},
        verify={1: {100: 2.0, 300: 4.0}, 8: 8.0},
        rest=0.5,
        padding=Padding(draft=0.0625, verify=0.125),
    )
    eight = RowsTable(draft={2: 3.0, 8: 4.0}, verify={1: 6.0, 8: 16.0}, rest=0.75, padding=Padding(verify=0.5))
    return table(rows={8: eight, 4: four}, **more)


@pytest.mark.parametrize(
    ("phase", "size", "context_length", "rows", "positions", "seconds"),
    [
        ("verify", 1, 200, 4, 4, 3.0),  # given, and linear in context
        ("verify", 5, 200, 4, 20, 8.0),  # stairs in width
        ("verify", 8, 200, 4, 12, 8.0 - 20 * 0.125),  # 20 of 32 positions are padding
        ("verify", 1, 200, 6, 6, 4.5),  # halfway from 4 to 8 rows
        ("verify", 8, 200, 6, 40, 12.0 - 8 * 0.5),  # what padding saves is that of the larger number
        ("verify", 8, 200, 2, 16, 4.0 + (8.0 - 4.0) / 3),  # a third of the way from one row
        ("draft", 3, 0, 4, 12, 2.0),
        ("draft", 3, 0, 4, 7, 2.0 - 5 * 0.0625),
        ("draft", 1, 0, 4, 0, 0.0),
        ("catch_up", 6, 0, 4, 0, 0.75),
        ("catch_up", 6, 0, 8, 0, 0.0),
        ("features", 6, 0, 8, 48, 0.0),
        ("rest", 1, 0, 5, 0, 0.5 + 0.25 / 4),
        ("prefill", 15, 0, 99, 0, 6.5),  # by the tokens of all rows together, however many rows
        ("verify", 8, 200, 8, 1, 0.0),  # padding cannot save more than everything
        ("verify", 8, 200, 1, 8, 4.0),  # one row: as before
    ],
)
def test_figures_of_several_rows(
    phase: str, size: int, context_length: int, rows: int, positions: int, seconds: float
) -> None:
    cost = of_rows()
    assert cost.batch_seconds(phase, size, context_length, rows, positions) == pytest.approx(seconds, rel=1e-14)
    assert cost.array(phase, size, context_length, rows, positions) == pytest.approx(seconds, rel=1e-14)


@pytest.mark.parametrize("phase", PHASES)
def test_many_steps_of_rows_are_the_same_as_one_by_one(phase: str) -> None:
    cost, rng = of_rows(), np.random.default_rng(0)
    sizes, contexts, rows = rng.integers(1, 9, 200), rng.integers(1, 500, 200), rng.integers(1, 9, 200)
    positions = rng.integers(rows, rows * sizes + 1)
    found = cost.array(phase, sizes, contexts, rows, positions)
    for place, asked in enumerate(zip(sizes, contexts, rows, positions, strict=True)):
        assert found[place] == pytest.approx(cost.batch_seconds(phase, *map(int, asked)), rel=1e-13)
    whole = cost.array(phase, sizes, contexts, rows)
    assert whole.tolist() == cost.array(phase, sizes, contexts, rows, rows * sizes).tolist()


@given(
    draft_size=st.integers(0, 8),
    waiting=st.integers(1, 40),
    width=st.integers(1, 8),
    context_length=st.integers(1, 900),
    features=st.booleans(),
    reread=st.integers(0, 20),
)
def test_one_row_costs_what_it_did_before_there_were_several(
    draft_size: int, waiting: int, width: int, context_length: int, features: bool, reread: int
) -> None:
    """Bit for bit, and by the three arguments that a cost model of one row has."""

    class OneRow:
        def seconds(self, phase: str, size: int, context_length: int) -> float:
            return of_one.seconds(phase, size, context_length)

    of_one = table(verify={1: {100: 1.0, 300: 2.1}, 2: 1.3, 28: {100: 2.7, 200: 4.1, 400: 3.3}})
    draft_size *= draft_size > 1
    work = Work(draft_size, waiting if draft_size else 0, width, context_length, features, reread)
    expected = price(of_one, work)
    assert price(of_one.model_copy(update={"rows": of_rows().rows}), work) == expected
    assert price(OneRow(), work) == expected


def test_a_step_of_rows_is_priced_phase_by_phase() -> None:
    work = Work(8, 4, 8, 200, rows=4, drafted=20, verified=12)
    spent = price(of_rows(), work)
    assert spent == Seconds(draft=2.0 - 12 * 0.0625 + 0.5, verify=8.0 - 20 * 0.125, rest=0.5)
    again = price(of_rows(verify={1: 1.0, 40: 1.0}), Work(0, 0, 1, 200, reread=3, rows=4, verified=4))
    assert again.verify == 8.0  # three positions of each row are read again with it


def test_more_rows_than_there_are_figures_for_are_told_with_what_mends_it() -> None:
    for ask in (of_rows().batch_seconds, of_rows().array):
        with pytest.raises(CostError, match=r"'irregular' cannot price a step of 9 rows: it goes up to 8. .*--batch"):
            ask("verify", 1, 100, 9, 9)
    with pytest.raises(CostError, match=r"a step of 2 rows: it has figures for one row only\. .*'rows'"):
        price(table(), Work(0, 0, 1, 100, rows=2, verified=2))
    with pytest.raises(CostError, match=r"no verify cost for verify width 9 in steps of 4 rows: .* 'rows.4.verify'"):
        of_rows(verify={1: 1.0, 9: 1.0}).batch_seconds("verify", 9, 100, 3, 9)
    with pytest.raises(CostError, match="figures for one row only"):
        price(PRESETS["dflash-h200-qwen3-4b"], Work(16, 1, 16, 100, rows=3, drafted=48, verified=48))


def test_a_cost_model_of_one_row_is_asked_for_no_more() -> None:
    class OneRow:
        def seconds(self, phase: str, size: int, context_length: int) -> float:
            return 1.0

    several, measured = Work(0, 0, 1, 9, rows=3, verified=3), Seconds(verify=0.25)
    with pytest.raises(ValueError, match=r"OneRow prices steps of one row, and this step had 3: .*batch_seconds"):
        price(OneRow(), several)
    guarded = GuardedClock(CostClock(OneRow()))
    with pytest.warns(ClockFaultWarning, match="this step had 3"):
        assert guarded.charge(measured, several) == measured
    assert guarded.charge(measured, Work(0, 0, 1, 9)).total == 2.0


def test_derived_tables_count_the_positions_of_all_rows() -> None:
    steep, even = linear(of_rows(), 0.25), flat(of_rows())
    for rows, width, padding in ((1, 5, 0), (2, 8, 3), (5, 4, 11), (8, 8, 0), (8, 1, 0)):
        work = Work(width, 3, width, 70, rows=rows, drafted=rows * width, verified=rows * width - padding)
        assert price(steep, work).total == pytest.approx(2.0 * (1 + 0.25 * (work.verified - 1)))
        assert price(even, work).total == 2.0
    for derived in (steep, even):
        with pytest.raises(CostError, match="it goes up to 8"):
            price(derived, Work(0, 0, 1, 70, rows=9, verified=9))


def test_a_table_of_rows_is_copied_and_goes_to_other_processes() -> None:
    cost = of_rows()
    assert cost.step(8, 200, rows=4) == 2.0 + 8.0 + 0.5
    assert pickle.loads(pickle.dumps(cost)).step(8, 200, rows=4) == cost.step(8, 200, rows=4)
    assert cost.model_copy(update={"rows": {4: RowsTable(verify={8: 1.0})}}).step(8, 200, rows=4) == 1.0


# What it says


def test_target_efficiency_and_break_even() -> None:
    cost = table()
    assert cost.target_efficiency(8, 100) == 0.5
    assert cost.break_even(1, 100) == 1.0
    assert cost.break_even(8, 100) == pytest.approx((0.375 + 2.0 + 0.125) / (1.0 + 0.125))
    assert cost.middle_context == 300
    assert cost.target_efficiency(8) == cost.target_efficiency(8, 300)
    assert CostTable(verify={1: 1.0}).middle_context == 0


def test_under_a_flat_cost_every_step_is_alike() -> None:
    cost = flat(table())
    works = [
        Work(draft_size=0, waiting=0, verify_width=1, context_length=10),
        Work(draft_size=8, waiting=200, verify_width=8, context_length=500, features=True),
    ]
    assert cost.name == "flat"
    assert {price(cost, work).total for work in works} == {2.0}  # verify of width 1 at the middle context length


def test_under_a_linear_cost_width_counts_and_nothing_else() -> None:
    cost = linear(table(), 0.25)
    assert cost.name == "linear"
    assert cost.seconds("verify", 5, 7) == 2.0 * (1 + 0.25 * 4)
    assert [cost.seconds(phase, 8, 7) for phase in ("draft", "catch_up", "features", "rest")] == [0.0] * 4


@pytest.mark.parametrize("derived", [flat, linear])
def test_derived_tables_go_as_far_as_what_they_are_made_from(derived: Any) -> None:
    drafts_more = table(draft={2: 0.1, 12: 0.2})
    assert derived(drafts_more).largest_width == 12
    assert derived(table()).largest_width == 8
    relative = PRESETS["dflash-h200-qwen3-4b"]
    assert derived(relative).unit == relative.unit


def test_the_preset_gives_back_the_published_speedup() -> None:
    cost = read_cost("dflash-h200-qwen3-4b")
    assert cost.unit == "plain steps"
    assert 6.54 / cost.break_even(16) == pytest.approx(4.91)
    assert 5.69 / cost.break_even(16) == pytest.approx(4.24, rel=0.01)  # T=1, of which the preset was not made
    for said in ("2602.06036", "H200"):
        assert said in cost.source
    assert "Assumed" in cost.description


# Files


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"verify": {"1": 1.0, "2": 1.1, "8": {"100": 2, "300": 4}}, "draft": {"8": 0.2}}')
    cost = read_cost(file)
    assert cost.name == "mine"
    assert cost.seconds("verify", 5, 200) == 3.0
    assert cost.seconds("draft", 2, 200) == 0.2


def test_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    write_cost(table(), file)
    assert read_cost(str(file)) == table()
    assert json.loads(file.read_text())["schema_version"] == 1


def test_rows_are_written_where_there_are_any(tmp_path: Path) -> None:
    one, several = tmp_path / "one.json", tmp_path / "several.json"
    write_cost(table(), one)
    write_cost(of_rows(), several)
    keys = [
        "schema_version",
        "name",
        "description",
        "source",
        "unit",
        "draft",
        "catch_up",
        "features",
        "verify",
        "rest",
        "prefill",
    ]
    assert list(json.loads(one.read_text())) == [*keys, "spread", "measured"]
    assert list(json.loads(several.read_text())) == [*keys, "rows", "spread", "measured"]
    assert read_cost(several) == of_rows()
    assert read_cost(several).batch_seconds("verify", 8, 200, 6, 40) == 8.0


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "docs/benchmarks").glob("costs*.json")))
def test_files_of_one_row_are_read_and_written_as_they_were(file: Path, tmp_path: Path) -> None:
    write_cost(read_cost(file), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == file.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"verify": {"1": -1}}', "verify.1 must be above 0, not -1"),
        ('{"verify": {"1": 0}}', "verify.1 must be above 0"),
        ('{"verify": {"1": NaN}}', "verify.1 must be a finite number"),
        ('{"verify": {"1": Infinity}}', "verify.1 must be a finite number"),
        ('{"verify": {"1": "fast"}}', "verify.1 must be a number, not 'fast'"),
        ('{"verify": {"1": {"100": -2}}}', "verify.1.100 must be above 0, not -2"),
        ('{"verify": {"1": {}}}', "verify.1 is empty"),
        ('{"verify": {}}', "verify is empty: give at least one figure, such as"),
        ('{"verify": {"2": 1.0}}', "verify needs width 1, the cost of a step without drafting"),
        ('{"verify": {"one": 1.0}}', "verify.one: keys must be whole numbers"),
        ('{"verify": {"0": 1.0}}', "verify.0: keys must be whole numbers from 1"),
        ("{}", "verify is missing: .* such as"),
        ('{"verify": {"1": 1}, "draft": {"8": -0.5}}', "draft.8 must not be negative, not -0.5"),
        ('{"verify": {"1": 1}, "draft": {"1": 0.5}}', "draft.1: keys must be whole numbers from 2"),
        ('{"verify": {"1": 1}, "draft": 3}', "draft must hold figures by size"),
        ('{"verify": {"1": 1}, "rest": -1}', "rest must not be negative"),
        ('{"verify": {"1": 1}, "prefill": {"64": 0}}', "prefill.64 must be above 0"),
        ('{"verify": {"1": 1}, "drafts": {}}', "drafts is not a key of a cost model; the keys are: .*draft, catch_up"),
        ('{"verify": {"1": 1}, "schema_version": 9}', "schema_version is another than this version of bpkit knows"),
        ('{"verify": {"1": 1}, "rows": {"1": {"verify": {"1": 1}}}}', "rows.1: keys must be whole numbers from 2"),
        ('{"verify": {"1": 1}, "rows": {"4": {"rest": 1}}}', "rows.4.verify is missing"),
        ('{"verify": {"1": 1}, "rows": {"4": {"verify": {"1": 0}}}}', "rows.4.verify.1 must be above 0"),
        ('{"verify": {"1": 1}, "rows": {"4": {"verify": {"1": 1}, "name": "x"}}}', "rows.4.name is not a key of"),
        ('{"verify": {"1": 1}', "is not valid JSON .* looks like"),
        ("[1, 2]", "must hold an object such as .* not a list"),
    ],
)
def test_a_bad_file_is_told_by_file_key_and_mending(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(CostError, match=said) as caught:
        read_cost(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_neither_file_nor_preset() -> None:
    with pytest.raises(FileNotFoundError, match=r"no cost file 'nowhere.json'.*dflash-h200-qwen3-4b.*bpkit calibrate"):
        read_cost("nowhere.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cost.json"
    write_cost(table(), file)
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_cost(table(rest=9.0), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]


# What a decoder hands to policies


class Asks(Policy):
    """Keeps the cost model that it is bound with."""

    wants = frozenset()

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.cost = cost

    def select(self, state: State, context: Context) -> Any:
        return context.full(2)


def test_a_decoder_hands_its_costs_to_its_policies(pair: TinyPair) -> None:
    cost, policies = table(), [Asks() for _ in range(4)]
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), policies[0], cost=cost)
    decoder.with_policy(policies[1])
    decoder.with_policy(policies[2], drafter="ngram")  # whose drafts cost something else
    SpeculativeDecoder(pair.target, pair.block_diffusion(), policies[3], clock=CostClock(cost))
    assert [policy.cost for policy in policies] == [cost, cost, None, cost]


def test_steps_of_rows_are_charged_by_the_decoders_cost_model(pair: TinyPair) -> None:
    """Live: one row, then three, then one again as the others end."""
    rows = {3: RowsTable(draft={4: 5.0}, verify={4: 7.0}, rest=2.0)}
    cost = CostTable(draft={4: 0.5}, verify={1: 1.0, 4: 1.0}, rest=0.25, rows=rows)
    prompts = [{"prompt": f"{i} = ", "max_new_tokens": 6 + 3 * i} for i in range(3)]

    def run(clock: CostClock) -> list[Seconds]:
        decoder = SpeculativeDecoder(
            pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer, clock=clock
        )
        with decoder.run_many(prompts, batch_size=3, temperature=0) as records:
            return [record.seconds for record in records if isinstance(record, Step)]

    charged = run(CostClock(cost))
    # Near their ends rows verify less, which costs as much here.
    of_one, of_three = Seconds(draft=0.5, verify=1.0, rest=0.25), Seconds(draft=5.0, verify=7.0, rest=2.0)
    assert charged[0] == of_three
    assert charged[-1] == of_one
    assert {seconds.verify for seconds in charged} <= {1.0, 4.0, 7.0}  # two rows lie halfway
    with pytest.warns(ClockFaultWarning, match="a step of 3 rows: it has figures for one row only"):
        measured = run(CostClock(cost.model_copy(update={"rows": {}})))
    assert 0 < measured[0].total < 0.5  # what it took
    assert measured[-1] == of_one


def test_the_command_line_reads_costs_from_the_config_or_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bpkit.cli import models
    from bpkit.config import settle

    seen: dict[str, Any] = {}
    monkeypatch.setattr(SpeculativeDecoder, "from_pretrained", lambda *args, **more: seen.update(more))
    write_cost(table(), tmp_path / "cost.json")
    config = tmp_path / "config.yaml"
    config.write_text(f"runtime: {{cost: {tmp_path / 'cost.json'}}}\n", encoding="utf-8")
    models.load_decoder(settle(config, {}))
    assert seen["cost"].rest == table().rest
    models.load_decoder(settle(None, {"runtime": {"cost": next(iter(PRESETS))}}))
    assert seen["cost"].name == next(iter(PRESETS))
    with pytest.raises((CostError, OSError)):
        models.load_decoder(settle(None, {"runtime": {"cost": str(tmp_path / "none.json")}}))
