"""Costs of an engine that packs its rows: their prices, and their fit to timed steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bpkit.cli import main
from bpkit.export.position_costs import PositionCosts
from bpkit.trace.cost import CostError, PackedCost, flat, linear, read_cost, write_cost
from bpkit.trace.cost.packed_fit import EngineSteps, Passes, fit_packed, held_out_steps
from bpkit.trace.server import ServerClock
from bpkit.types import Work

PACKED = PackedCost(
    name="engine",
    passes={1: 0.010, 16: 0.013, 64: 0.037},
    row=0.0005,
    draft={2: 0.001, 64: 0.0072},
    features=0.00001,
    max_rows=32,
    max_block_size=8,
)
"""A position costs 0.2 ms up to 16 and 0.5 ms from there, one that the drafter reads 0.1 ms."""


def made_up_steps(passes: Passes, *, seed: int = 0, count: int = 1500, noise: float = 0.05) -> EngineSteps:
    """Steps of an engine whose costs are `PACKED`'s, with prompts beside a fifth of them and some hiccups."""
    rng = np.random.default_rng(seed)
    rows = rng.choice([1, 2, 4, 8, 16, 32], count)
    width, draft = rng.integers(1, 9, count), rng.integers(0, 8, count)
    prompts = np.where(rng.random(count) < 0.2, rng.integers(10, 60, count), 0)
    steps = EngineSteps(
        np.arange(count) // 50, rows, rows, rows * width, prompts, draft, rows * 0 + 100, np.ones(count)
    )
    truth = PACKED.model_copy(
        update={"draft_passes": passes, "features": 0.0, **({"draft": {}} if passes == "none" else {})}
    )
    seconds = steps.modelled(truth) * rng.lognormal(0, noise, count)
    seconds[rng.random(count) < 0.03] *= 4
    return EngineSteps(**{**{name: getattr(steps, name) for name in steps.__dataclass_fields__}, "seconds": seconds})


@pytest.mark.parametrize("passes", ["one", "each", "none"])
def test_costs_are_found_again_in_noisy_steps(passes: Passes) -> None:
    found = fit_packed(made_up_steps(passes), passes)
    clean = made_up_steps(passes, seed=1, noise=0.0)
    usual = clean.seconds < np.quantile(clean.seconds / clean.modelled(found), 0.95) * clean.modelled(found)
    error = clean.modelled(found)[usual] / clean.seconds[usual] - 1
    assert np.abs(error).mean() < 0.02
    assert bool(found.draft) == (passes != "none")
    assert (found.max_rows, found.max_block_size) == (32, 8)


def test_the_error_in_steps_that_were_held_out_is_that_of_noise_alone() -> None:
    steps = made_up_steps("one")
    error = held_out_steps(steps, "one", (1, 2, 4, 8, 16, 32))
    assert error is not None
    assert error.mean_error < 0.03
    assert error.within_tenth > 0.95
    wrong = held_out_steps(steps, "none", (1, 2, 4, 8, 16, 32))  # drafts that are paid, priced as if they were free
    assert wrong is not None
    assert wrong.step_error > 1.2 * error.step_error


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(CostError, match="30 measured steps are too few"):
        fit_packed(made_up_steps("one", count=30), "one")


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_position_more_costs_what_the_line_says_whoever_has_it_and_however_wide_the_step(rows: int) -> None:
    costs = PositionCosts(PACKED, range(2, 9), rows, 100, features=False, slope=0.1)
    fits = np.isfinite(costs.verify)
    tokens = np.arange(costs.verify.shape[1])
    expected = PACKED.array("prefill", rows + tokens) + PACKED.row * rows
    for width, row in enumerate(costs.verify):
        assert row[fits[width]] == pytest.approx(expected[fits[width]])
    assert PACKED.batch_seconds("verify", 5, 0, 4, 9) == pytest.approx(0.010 + 8 * 0.0002)
    assert PACKED.batch_seconds("verify", 9, 0, 4, 20) == pytest.approx(0.013 + 4 * 0.0005)


def test_a_draft_is_as_long_for_all_rows_as_for_the_longest() -> None:
    for positions in (9, 20, 32):
        assert PACKED.batch_seconds("draft", 8, 0, 4, positions) == pytest.approx(0.001 + 30 * 0.0001)
    each = PACKED.model_copy(update={"draft_passes": "each"})
    assert each.batch_seconds("draft", 8, 0, 4, 9) == pytest.approx(7 * (0.001 + 2 * 0.0001))
    assert PACKED.batch_seconds("draft", 1, 0, 4, 4) == PACKED.batch_seconds("features", 0, 0, 4, 0) == 0
    assert PACKED.seconds("catch_up", 9, 0) == 0


def test_prompts_beside_running_rows_are_parts_of_one_pass() -> None:
    clock = ServerClock(PACKED, charges_decisions=False, mixes_passes=PACKED.mixes_prompts)
    clock.beside = 12
    clock.read(20, 20)
    step = clock.charge(clock.charged, Work(0, 0, 4, 100, rows=4, verified=12)).total
    assert clock.time == pytest.approx(PACKED.seconds("prefill", 32, 0) + 4 * PACKED.row)
    assert step == pytest.approx(PACKED.batch_seconds("verify", 4, 0, 4, 12) + 4 * PACKED.row)


def test_lines_go_on_above_what_was_measured() -> None:
    assert PACKED.batch_seconds("verify", 4, 0, 64, 128) == pytest.approx(0.037 + 64 * 0.0005)
    assert PACKED.largest_rows == 32
    assert PACKED.seconds("prefill", 0, 0) == 0 < PACKED.seconds("prefill", 1, 0)


def test_the_table_has_the_same_prices() -> None:
    table = PACKED.table()
    for rows in (1, 2, 8, 32):
        for size in range(1, 9):
            assert table.step(size, 0, rows) == pytest.approx(PACKED.step(size, 0, rows))
    assert flat(PACKED).step(8, 0, 8) == pytest.approx(PACKED.seconds("verify", 1, 0))
    assert linear(PACKED).largest_rows == 32


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_cost(PACKED, tmp_path / "engine.json")
    assert read_cost(tmp_path / "engine.json") == PACKED
    assert '"kind": "packed"' in (tmp_path / "engine.json").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"kind": "packed"}', "passes is missing"),
        ('{"kind": "packed", "passes": {}}', "passes is empty"),
        ('{"kind": "packed", "passes": {"1": 0}}', "passes.1 must be above 0"),
        ('{"kind": "packed", "passes": {"1": 1.0}, "verify": {"1": 1.0}}', "verify is not a key"),
        ('{"kind": "packed", "passes": {"0": 1.0}}', "keys must be whole numbers from 1"),
    ],
)
def test_files_that_will_not_do_are_refused_by_key(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(CostError, match=said):
        read_cost(tmp_path / "bad.json")


def test_other_sources_and_phases_are_refused() -> None:
    with pytest.raises(CostError, match="engine with one drafter, and source 1"):
        PACKED.of_source(1)
    with pytest.raises(CostError, match="cannot be joined"):
        PACKED.with_sources([PACKED])
    with pytest.raises(CostError, match="no phase 'sleep'"):
        PACKED.seconds("sleep", 1, 0)
    with pytest.raises(CostError, match="no verify width 0"):
        PACKED.seconds("verify", 0, 0)


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "vlm"], "there is no engine 'vlm'. Did you mean 'vllm'? Known: vllm."),
        (["--engine", "vllm", "--engine-args", "{dtype}"], "--engine-args is not valid JSON"),
        (["--engine", "vllm", "--engine-args", "[1]"], "--engine-args must be an object"),
        (["--engine", "vllm", "--dtype", "float32"], "--dtype: an engine is told such things in its own words"),
        (["--engine", "vllm", "--drafter", "dflash+ngram"], "an engine has one drafter"),
        (["--engine", "vllm", "--engine-args", '{"scheduler_cls": "mine"}'], "scheduler_cls is what is measured with"),
        (["--engine-args", "{}"], "--engine-args are options of an engine: name it with --engine"),
    ],
)
def test_what_an_engine_cannot_be_asked_is_refused_in_a_sentence(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = tmp_path / "cost.json"
    result = CliRunner().invoke(main.build_app(), ["calibrate", "--out", str(out), *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not out.exists()


def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpkit_vllm.versions.DISTRIBUTIONS", ("vllm-of-nobody",))
    arguments = ["calibrate", "--engine", "vllm", "--drafter", "ngram", "--out", str(tmp_path / "cost.json")]
    result = CliRunner().invoke(main.build_app(), arguments)
    assert result.exit_code == 2
    assert "vLLM is not installed in this environment" in " ".join(result.output.split())


def test_a_packed_cost_is_shown_as_a_table(tmp_path: Path) -> None:
    write_cost(PACKED, tmp_path / "engine.json")
    result = CliRunner().invoke(main.build_app(), ["calibrate", "--show", str(tmp_path / "engine.json")])
    assert result.exit_code == 0
    assert f"{1000 * PACKED.step(8, 0, 32):.3f}" in result.output
