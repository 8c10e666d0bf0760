"""Costs by formula: values by hand, what rows and tokens may do to them, files, and presets against what they cite."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bpkit.cli.main import build_app
from bpkit.decode.clock import price
from bpkit.trace.cost import CostError, NamedCost, Roofline, flat, linear, read_cost, write_cost
from bpkit.trace.cost.presets import PRESETS
from bpkit.trace.cost.roofline import DeviceSpeed, DraftPass, Experts, ModelPass
from bpkit.types import PHASES, Work

EXPERTS = Experts(total=4, active=1, weights=400.0, flops=5.0)
BY_FORMULA = [cost for cost in PRESETS.values() if isinstance(cost, Roofline)]


def roofline(**more: Any) -> Roofline:
    """2 s a pass for its weights, 0.01 s a token, by hand from round numbers; `more` of the target or the whole."""
    whole = {name: more.pop(name) for name in list(more) if name in Roofline.model_fields}
    target = ModelPass(**{"weights": 200.0, "flops": 10.0, **more})
    return Roofline(**{"name": "round", "device": DeviceSpeed(bandwidth=100.0, peak=1000.0), "target": target, **whole})


def drafting(**more: Any) -> Roofline:
    """0.5 s a pass for the drafter's weights, 0.002 s a token."""
    return roofline(draft=DraftPass(**{"weights": 50.0, "flops": 2.0, **more}))


# By hand


@pytest.mark.parametrize(
    ("more", "rows", "width", "context_length", "seconds"),
    [
        ({}, 1, 1, 0, 2.0),  # the weights are read, however few tokens there are
        ({}, 8, 25, 0, 2.0),  # 200 tokens: as long to compute as to read
        ({}, 10, 30, 0, 3.0),  # 300 tokens: computing takes longer
        ({"context": 1.0}, 8, 1, 50, 2.0 + 4.0),  # 400 bytes of keys and values, after the weights
        ({"context": 1.0, "attention": 2.0}, 8, 1, 50, 2.0 + 4.0),  # 800 FLOPs take 0.8 s
        ({"context": 1.0, "attention": 2.0}, 2, 10, 50, 2.0 + 2.0),  # 2000 FLOPs take as long: more would take longer
        ({"overhead": 0.25, "several": 0.5}, 1, 1, 0, 2.25),
        ({"overhead": 0.25, "several": 0.5}, 1, 2, 0, 2.75),
        ({"device": DeviceSpeed(bandwidth=100.0, peak=1000.0, bandwidth_share=0.5)}, 1, 1, 0, 4.0),
        ({"device": DeviceSpeed(bandwidth=100.0, peak=1000.0, peak_share=0.5)}, 10, 30, 0, 6.0),
        ({"experts": EXPERTS}, 1, 1, 0, 2.0 + 1.0),  # a quarter of the experts
        ({"experts": EXPERTS}, 1, 2, 0, 2.0 + 1.75),  # 1 - (3/4)^2 of them
        ({"experts": EXPERTS}, 100, 1, 0, 2.0 + 4.0),  # all
        ({"experts": EXPERTS}, 100, 10, 0, 10.0 + 5.0),  # both parts are bound by computing
    ],
)
def test_a_pass_is_bound_by_what_takes_longest(
    more: dict[str, Any], rows: int, width: int, context_length: int, seconds: float
) -> None:
    cost = roofline(**more)
    assert cost.batch_seconds("verify", width, context_length, rows, rows * width) == pytest.approx(seconds)
    assert cost.array("verify", width, context_length, rows) == pytest.approx(seconds)


def test_padding_is_not_paid() -> None:
    cost = roofline(experts=EXPERTS, overhead=0.25)
    assert cost.largest_rows > 10**6
    packed = cost.batch_seconds("verify", 8, 0, 4, 11)
    assert packed == pytest.approx(0.25 + 2.0 + 4.0 * (1 - 0.75**11))
    assert packed < cost.batch_seconds("verify", 8, 0, 4, 32)


def test_a_block_is_drafted_in_one_pass_or_in_one_for_each_token() -> None:
    block, each = drafting(overhead=0.1, context=0.01), drafting(overhead=0.1, context=0.01, passes="each")
    assert block.seconds("draft", 8, 100) == pytest.approx(0.1 + 0.5 + 0.01)
    assert each.seconds("draft", 8, 100) == pytest.approx(7 * (0.1 + 0.5 + 0.01))
    assert block.batch_seconds("draft", 8, 0, 64, 64 * 8) == pytest.approx(0.1 + 512 * 0.002)  # bound by computing
    assert each.batch_seconds("draft", 8, 0, 64, 64 * 8) == pytest.approx(7 * (0.1 + 0.5))
    # Half of the rows draft, and only theirs are the contexts that are read.
    assert block.batch_seconds("draft", 8, 100, 4, 16) == pytest.approx(0.1 + 0.5 + 0.02)
    assert block.seconds("draft", 1, 100) == each.seconds("draft", 1, 100) == 0.0


def test_what_else_belongs_to_a_draft() -> None:
    cost = drafting(waiting=4.0, scores=3.0)
    assert [cost.seconds("catch_up", waiting, 50) for waiting in (0, 1, 2, 101)] == [0.0, 0.0, 0.004, 0.4]
    assert cost.batch_seconds("catch_up", 101, 50, 64, 0) == 0.4  # of the row that waits most
    assert cost.batch_seconds("features", 8, 50, 4, 20) == pytest.approx(0.6)
    assert cost.seconds("features", 1, 50) == 0.0
    assert roofline(rest=0.75).batch_seconds("rest", 1, 50, 9, 0) == 0.75


def test_prompts_are_read_like_anything_else() -> None:
    cost = roofline(context=1.0, attention=2.0)
    assert cost.prices_prefill
    assert cost.seconds("prefill", 0, 100) == 0.0
    assert cost.seconds("prefill", 1, 0) == pytest.approx(2.0 + 0.01)
    assert cost.seconds("prefill", 400, 0) == pytest.approx(4.0 + 2.0 * 400 * 200 / 1000)
    assert cost.seconds("prefill", 400, 100) == pytest.approx(4.0 + 2.0 * 400 * 300 / 1000)
    assert cost.batch_seconds("prefill", 400, 0, 7, 400) == cost.seconds("prefill", 400, 0)


def test_a_step_is_priced_phase_by_phase() -> None:
    cost = drafting(waiting=4.0, scores=3.0)
    spent = price(cost, Work(8, 11, 4, 0, features=True, rows=4, drafted=20, verified=9))
    assert spent.draft == pytest.approx(0.5 + 0.04 + 0.6)
    assert spent.verify == 2.0
    assert spent.rest == 0.0


# What rows and tokens may do


@pytest.mark.parametrize("cost", BY_FORMULA, ids=lambda cost: cost.name)
@pytest.mark.parametrize("phase", PHASES)
def test_many_at_once_are_the_same_as_one_by_one(cost: NamedCost, phase: str) -> None:
    rng = np.random.default_rng(0)
    sizes, contexts, rows = rng.integers(1, 33, 200), rng.integers(0, 5000, 200), rng.integers(1, 129, 200)
    positions = rng.integers(rows, rows * sizes + 1)
    positions[rows == 1] = sizes[rows == 1]
    found = cost.array(phase, sizes, contexts, rows, positions)
    assert found.dtype == np.float64
    for place, asked in enumerate(zip(sizes, contexts, rows, positions, strict=True)):
        assert found[place] == pytest.approx(cost.batch_seconds(phase, *map(int, asked)), rel=1e-13)
    of_one = cost.array(phase, sizes[:, None], contexts[:3])
    assert of_one.shape == (200, 3)
    assert of_one[5, 1] == pytest.approx(cost.seconds(phase, int(sizes[5]), int(contexts[1])), rel=1e-13)
    assert cost.array(phase, np.zeros((0, 3), int), 5).shape == (0, 3)


@given(
    cost=st.sampled_from(BY_FORMULA),
    phase=st.sampled_from(["draft", "verify", "features", "prefill"]),
    size=st.integers(2, 60),
    context_length=st.integers(0, 20_000),
    rows=st.integers(1, 127),
)
def test_more_is_never_cheaper(cost: Roofline, phase: str, size: int, context_length: int, rows: int) -> None:
    def seconds(size: int, context_length: int, rows: int) -> float:
        return cost.batch_seconds(phase, size, context_length, rows, rows * size)

    here = seconds(size, context_length, rows)
    for more in ((size + 1, context_length, rows), (size, context_length + 1, rows), (size, context_length, rows + 1)):
        assert seconds(*more) >= here * (1 - 1e-12)
    assert here > 0


def test_experts_make_verifying_dear_until_all_are_read() -> None:
    """MoESD: target efficiency is low at small batches, best at medium ones, and low again where computing bounds."""
    cost = read_cost("h100-moe")

    def efficiency(rows: int) -> float:
        narrow, wide = (cost.batch_seconds("verify", width, 1024, rows, rows * width) for width in (1, 4))
        return narrow / wide

    at = {rows: efficiency(rows) for rows in (1, 4, 16, 64, 1024)}
    assert at[4] < at[16] < at[64] > at[1024]
    assert at[4] < 0.5 < 0.9 < at[64]
    assert at[1] == pytest.approx(cost.target_efficiency(4, 1024))
    dense = read_cost("h100-8b")
    assert dense.target_efficiency(4, 1024) == 1.0


# Presets


def test_presets_have_the_sizes_of_their_models() -> None:
    four, eight, mixture = BY_FORMULA
    assert [cost.name for cost in BY_FORMULA] == ["h200-4b", "h100-8b", "h100-moe"]
    assert four.target.weights == pytest.approx(8.04e9, rel=1e-3)
    assert four.target.context == 144 * 1024
    assert four.draft is not None
    assert four.draft.context == 20 * 1024
    assert four.draft.weights - 2 * 2560 * 151936 == pytest.approx(
        1.07e9, rel=0.01
    )  # without the target's output layer
    assert eight.target.weights + 2 * 4096 * 151936 == pytest.approx(2 * 8.19e9, rel=1e-3)  # with its embedding
    experts = mixture.target.experts
    assert experts is not None
    assert (experts.weights + mixture.target.weights) / 2 + 2048 * 151936 == pytest.approx(30.5e9, rel=2e-3)
    assert (experts.flops + mixture.target.flops) / 2 + 2048 * 151936 == pytest.approx(3.3e9, rel=0.02)  # active
    assert mixture.target.context == 96 * 1024


def test_the_measured_preset_gives_back_what_was_measured() -> None:
    cost = read_cost("h200-4b")
    for width, milliseconds in ((1, 8.2), (16, 9.6), (32, 9.8)):
        assert 1000 * cost.seconds("verify", width, 512) == pytest.approx(milliseconds, rel=0.011)
    assert 1.5e-3 < cost.seconds("draft", 16, 512) < 1.6e-3
    assert 0.8e-3 < cost.seconds("rest", 1, 512) < 1.0e-3


@pytest.mark.parametrize("cost", BY_FORMULA, ids=lambda cost: cost.name)
def test_presets_say_what_they_do_not_know(cost: Roofline) -> None:
    assert "Assumed: " in cost.description
    assert "Not known: " in cost.description
    assert "2602.06036" in cost.source


# What is made from one


def test_sources_are_free_or_have_drafts_of_their_own() -> None:
    free, cost = roofline(), drafting()
    assert free.of_source(3) is free
    assert free.seconds("draft", 8, 100) == free.seconds("catch_up", 9, 100) == free.seconds("features", 8, 100) == 0.0
    with pytest.raises(CostError, match=r"'round' prices 1 source\(s\) of drafts, and source 1 was asked for: .*null"):
        cost.of_source(1)
    both = cost.with_sources([drafting(overhead=0.25), free])
    assert [both.of_source(source).seconds("draft", 4, 0) for source in range(3)] == [0.5, 0.75, 0.0]
    assert both.of_source(1) is both.of_source(1)  # asked for in every step
    assert [both.table().of_source(source).seconds("draft", 4, 0) for source in range(3)] == [0.5, 0.75, 0.0]


def test_a_table_of_it_has_its_prices_and_others_are_derived_from_that() -> None:
    cost = read_cost("h100-8b")
    table = cost.table()
    for rows, size in ((1, 1), (1, 16), (8, 4), (128, 16)):
        for phase in ("draft", "verify", "rest"):
            of_formula, of_table = (each.batch_seconds(phase, size, 1024, rows, rows * size) for each in (cost, table))
            assert of_table == of_formula
    assert table.seconds("prefill", 512, 0) == cost.seconds("prefill", 512, 0)
    assert (table.name, table.source) == (cost.name, cost.source)
    plain = cost.seconds("verify", 1, 1024)
    assert flat(cost).batch_seconds("verify", 5, 99, 32, 160) == plain
    assert linear(cost, 0.5).seconds("verify", 3, 99) == pytest.approx(2 * plain)


def test_what_is_no_step_has_no_cost() -> None:
    for cost in (roofline(), drafting()):
        for ask in (cost.seconds, cost.array):
            with pytest.raises(CostError, match="verifies at least the anchor"):
                ask("verify", 0, 1)
            for size in (1, 5):
                with pytest.raises(CostError, match="draft, catch_up, features, verify, rest, prefill"):
                    ask("postfill", size, 1)


def test_it_is_copied_and_goes_to_other_processes() -> None:
    cost = drafting()
    assert (cost.seconds("verify", 1, 0), cost.seconds("draft", 2, 0)) == (2.0, 0.5)
    assert pickle.loads(pickle.dumps(cost)) == cost
    slower = cost.model_copy(update={"device": DeviceSpeed(bandwidth=50.0, peak=1000.0)})
    assert (slower.seconds("verify", 1, 0), slower.seconds("draft", 2, 0)) == (4.0, 1.0)


# Files


def test_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    for cost in (*BY_FORMULA, roofline(), drafting().with_sources([roofline()])):
        write_cost(cost, file)
        assert read_cost(file) == cost
        assert json.loads(file.read_text())["kind"] == "roofline"
        assert ("sources" in json.loads(file.read_text())) == bool(cost.sources)


def test_a_file_written_by_hand_and_files_joined(tmp_path: Path) -> None:
    file, table = tmp_path / "mine.json", tmp_path / "table.json"
    device = '"kind": "roofline", "device": {"bandwidth": 1e12, "peak": 1e14}'
    file.write_text(f'{{{device}, "target": {{"weights": 1e9, "flops": 1e9}}}}')
    cost = read_cost(file)
    assert cost.name == "mine"
    assert cost.seconds("verify", 1, 0) == 1e-3
    joined = read_cost(f"h100-8b+{file}")
    assert joined.of_source(1).seconds("draft", 8, 100) == 0.0
    assert joined.of_source(1).seconds("verify", 8, 100) == read_cost("h100-8b").seconds("verify", 8, 100)
    table.write_text('{"verify": {"1": 1.0}}')
    with pytest.raises(CostError, match="joins tables with formulas"):
        read_cost(f"{table}+{file}")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"device": {"bandwidth": 1.0, "peak": 0}}, "device.peak must be above 0"),
        (
            {"device": {"bandwidth": 1.0, "peak": 1.0, "peak_share": 1.5}},
            "device.peak_share must be 1 or less, not 1.5",
        ),
        ({"device": {"bandwidth": 1.0}}, "device.peak is missing$"),
        ({"target": {"weights": 1.0}}, "target.flops is missing$"),
        ({"target": {"weights": 1.0, "flops": 1.0, "layers": 3}}, "target.layers is not a key .*: weights, flops, con"),
        ({"draft": {"weights": 1.0, "flops": 1.0, "passes": "two"}}, "draft.passes is another than"),
        ({"verify": {"1": 1.0}}, "verify is not a key of a cost model; the keys are: .*device, target, draft, sources"),
        (
            {"target": {"weights": 1.0, "flops": 1.0, "experts": {**EXPERTS.model_dump(), "active": 5}}},
            "target.experts has 5 active experts of 4",
        ),
    ],
)
def test_a_bad_file_is_told_by_file_key_and_mending(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**roofline().model_dump(mode="json"), **more}))
    with pytest.raises(CostError, match=said) as caught:
        read_cost(file)
    assert str(caught.value).startswith(str(file))


# Commands


def test_presets_are_listed_shown_and_drawn(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(build_app(), ["calibrate", *arguments], prog_name="bpkit")
        assert done.exit_code == 0, done.output
        return done.stdout

    listed = run("--list-presets")
    assert all(name in listed for name in PRESETS)
    shown = run("--show", "h200-4b", "--plot", str(tmp_path / "cost.png"))
    assert "Not known: several rows" in shown
    assert "8.198" in shown
    assert "steps of all rows together" in shown
    assert "Reading prompts" in shown
    assert (tmp_path / "cost.png").stat().st_size > 5000
