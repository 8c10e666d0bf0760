"""Policies judged on a simulated server: who is compared with whom, over which requests, and what figures are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bpkit.cli.main import build_app
from bpkit.judge.load import LoadCase, LoadRuns, LoadSetup, evaluate_load
from bpkit.judge.load.figures import ratio_interval
from bpkit.policy import PolicyError
from bpkit.testing.traces import synthetic_prompts
from bpkit.trace.cost import write_cost
from bpkit.trace.server import ServerReplayer
from tests.test_evaluation import trace as trace
from tests.test_server_replay import COST, SPEC

ONE, FOUR = LoadCase.concurrency(1, 6), LoadCase.concurrency(4, 16)
POLICIES = {"fixed:6": "fixed:6", "batch_table:1:6+4:1": "batch_table:1:6+4:1"}


def setup(*cases: LoadCase, **options: Any) -> LoadSetup:
    given = {"policies": POLICIES, "seeds": 2, "charges_decisions": False, "bound_seeds": 0, **options}
    return LoadSetup(synthetic_prompts(8), SPEC, COST, cases=cases, **given)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return evaluate_load(setup(ONE, FOUR, slo_tpot=0.02))


def test_seeds_have_prompts_of_their_own_and_the_same_mix_of_domains() -> None:
    made = setup(FOUR)
    first, second = made.shares
    assert sorted((*first, *second)) == list(range(8))
    for number, share in enumerate(made.shares):
        prompts, places = made.requests(FOUR, number)
        assert [prompt.index for prompt in prompts] == list(share)
        assert [prompt.domain for prompt in prompts].count("easy") == 2
        assert sorted(places) == sorted(4 * [0, 1, 2, 3])
        assert made.requests(FOUR, number)[1] == places


def test_ratios_are_to_the_fixed_size_that_is_best_at_each_load(report: dict[str, Any]) -> None:
    assert list(report["loads"]) == ["concurrency:1", "concurrency:4"]
    for load in report["loads"].values():
        best = load["best_fixed"]
        assert best["tokens_per_second"] == max(entry["tokens_per_second"] for entry in load["fixed"].values())
        assert load["fixed"][str(best["block_size"])]["tokens_per_second_ratio"] == 1
        for entry in (*load["fixed"].values(), *load["policies"].values()):
            assert entry["tokens_per_second_ratio"] == pytest.approx(
                entry["tokens_per_second"] / best["tokens_per_second"]
            )
    one, four = (load["policies"] for load in report["loads"].values())
    assert one["fixed:6"]["tokens_per_second_ratio"] == one["batch_table:1:6+4:1"]["tokens_per_second_ratio"]
    assert four["fixed:6"]["tokens_per_second"] == report["loads"]["concurrency:4"]["fixed"]["6"]["tokens_per_second"]


def test_figures_are_those_of_the_server(report: dict[str, Any]) -> None:
    made = setup(FOUR)
    rates, waits, spent = [], [], []
    for number in range(2):
        prompts, places = made.requests(FOUR, number)
        served = ServerReplayer(SPEC, "fixed:6", COST, strict=True).serve(prompts, places, made.load(FOUR, number))
        start, end = served.time[served.filled - 1], served.time[served.full - 1]
        assert served.rows[served.filled : served.full].min() == 4 > served.rows[: served.filled].max()
        first = ((served.first > start) & (served.first <= end)).sum()
        rates.append((served.tokens[served.filled : served.full].sum() + first) / (end - start))
        inside = (served.ended > start) & (served.ended <= end)
        waits += (served.first - served.arrived)[inside].tolist()
        spent += ((served.ended - served.first) / (served.output_lengths - 1))[inside].tolist()
        assert 0 < inside.sum() < len(inside)
    entry = report["loads"]["concurrency:4"]["policies"]["fixed:6"]
    assert entry["tokens_per_second"] == pytest.approx(np.prod(rates) ** 0.5)
    assert entry["ttft"]["mean"] == pytest.approx(np.mean(waits))
    assert entry["tpot"]["p99"] == pytest.approx(np.quantile(spent, 0.99))
    assert entry["goodput"]["share"] == pytest.approx(np.mean(np.array(spent) <= 0.02))
    assert entry["verified_per_token"] == pytest.approx(entry["wasted_per_token"] + 1)
    assert entry["acceptance_length"] > 1.5
    assert entry["decision_us"] is None
    low, high = entry["interval"]
    assert low < entry["tokens_per_second_ratio"] < high


def test_an_interval_is_that_of_students_t() -> None:
    low, high = ratio_interval(np.exp([0.0, 0.1, 0.2])) or [0, 0]
    assert np.log([low, high]) == pytest.approx(0.1 + np.array([-1, 1]) * 4.30265 * 0.1 / 3**0.5, rel=1e-5)
    assert ratio_interval(np.array([1.2])) is None


def test_arrivals_are_compared_by_request_and_a_load_that_changes_by_its_whole_run() -> None:
    arrivals, changing = LoadCase.arrivals(40.0, 4, 10), LoadCase.changing([1, 4, 1])
    report = evaluate_load(setup(arrivals, changing, block_sizes=(2, 6), max_tokens=16))
    poisson, waves = report["loads"]["rate:40"], report["loads"]["changing:1-4-1"]
    assert poisson["compared"] == "tokens_per_second_per_request"
    assert poisson["policies"]["fixed:6"]["ttft"]["mean"] > 0
    assert set(waves["fixed"]) == {"1", "2", "6"}
    over_time = waves["rows_over_time"]["batch_table:1:6+4:1"]
    assert max(over_time["rows"]) == 4
    assert waves["requests"] == 12
    mixed = evaluate_load(setup(changing, block_sizes=(2, 6), max_tokens=16, mixes_passes=True))["loads"][
        "changing:1-4-1"
    ]
    assert mixed["fixed"]["6"]["tokens_per_second"] > waves["fixed"]["6"]["tokens_per_second"]


def test_decisions_of_policies_are_charged_and_fixed_sizes_decide_nothing() -> None:
    load = evaluate_load(setup(ONE, charges_decisions=True, block_sizes=(6,)))["loads"]["concurrency:1"]
    assert load["policies"]["fixed:6"]["decision_us"] > 0
    assert load["policies"]["fixed:6"]["tokens_per_second_ratio"] < 1
    assert load["fixed"]["6"]["decision_us"] is None


def test_what_was_done_before_an_interruption_is_reported() -> None:
    class Impatient:
        left = 10

        def start(self, phase: str, total: int) -> None:
            assert total == 16

        def tick(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    made = setup(ONE, FOUR, block_sizes=(1, 6))
    runs = LoadRuns(made)
    with pytest.raises(KeyboardInterrupt):
        runs.run(Impatient())
    report = runs.report()
    assert list(report["loads"]) == ["concurrency:1"]
    assert "concurrency:4 is missing" in report["notes"][-1]
    runs.run()
    assert list(runs.report()["loads"]) == ["concurrency:1", "concurrency:4"]
    assert not runs.report()["notes"]


def test_bounds_are_served_for_the_first_seeds_and_gaps_measured_to_the_one_without_the_noise() -> None:
    load = evaluate_load(setup(ONE, bound_seeds=1, block_sizes=(6,)))["loads"]["concurrency:1"]
    assert list(load["bounds"]) == ["distributions", "clairvoyant"]
    chances, known = load["bounds"].values()
    assert load["bound"] == {"name": "distributions", **chances}
    assert known["tokens_per_second_ratio"] > chances["tokens_per_second_ratio"] > 1
    assert known["interval"] is None
    assert len(known["by_seed"]) == 1
    assert 0 < known["least_seconds"] < 6 * 48 / known["tokens_per_second"]
    policy = load["policies"]["batch_table:1:6+4:1"]
    assert policy["gap_share"] == pytest.approx(
        (policy["by_seed"][0] - 1) / (chances["tokens_per_second_ratio"] - 1), abs=1e-9
    )
    assert chances["gap_share"] == pytest.approx(1)
    regret = policy["regret"]
    assert regret["together"] == pytest.approx(sum(regret.values()) - regret["together"])
    assert regret["not_knowable"] > 0


@pytest.mark.slow
def test_processes_find_the_same() -> None:
    made = setup(ONE, block_sizes=(1, 6))
    alone, shared = evaluate_load(made), evaluate_load(made, workers=2)
    for load in (*alone["loads"].values(), *shared["loads"].values()):
        for entry in (load, load["best_fixed"], *load["policies"].values(), *load["fixed"].values()):
            entry.pop("simulated_steps_per_second"), entry.pop("simulated_row_steps_per_second")
    assert alone == shared


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="8 prompts for 9 seeds"):
        setup(ONE, seeds=9)
    with pytest.raises(ValueError, match="no load"):
        setup()
    with pytest.raises(ValueError, match="prices up to 8"):
        setup(LoadCase.concurrency(16))
    with pytest.raises(ValueError, match="block sizes 5 were not traced"):
        setup(ONE, block_sizes=(5, 6))
    with pytest.raises(PolicyError, match="memory"):
        LoadRuns(setup(ONE, policies={"bandit": "bandit:memory=learned.json"}))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), ["evaluate-load", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_command_writes_tables_figures_a_picture_and_a_page(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_cost(COST, tmp_path / "cost.json")
    files = {option: tmp_path / f"load.{suffix}" for option, suffix in (("json", "json"), ("plot", "png"))}
    files["report"] = tmp_path / "load.html"
    written = [part for option, path in files.items() for part in (f"--{option}", path)]
    loads = ("--concurrency", "1,4", "--rate", 30, "--max-rows", 4, "--changing", "1,4,1", "--requests", 6)
    how = ("--part", "all", "--seeds", 2, "--bound-seeds", 0, "--slo-tpot-ms", 10, "--block-sizes", 4)
    policy = ("--policy", "batch_table:1:4+4:1")
    result = run(trace, "--cost", tmp_path / "cost.json", *loads, *how, *policy, *written)
    assert result.exit_code == 0, result.stderr
    for text in ("best fixed size", "4 at once", "30 a second", "1-4-1", "% within", "positions for an output token"):
        assert text in result.stdout
    report = json.loads(files["json"].read_text(encoding="utf-8"))
    assert list(report["loads"]) == ["concurrency:1", "concurrency:4", "rate:30", "changing:1-4-1"]
    assert report["settings"]["prompts"] == {"easy": 20, "hard": 20}
    assert report["settings"]["slo_tpot"] == 0.01
    assert set(report["definitions"]) >= {"best_fixed", "tpot", "gap_share"}
    page = files["report"].read_text(encoding="utf-8")
    assert page.count("<img ") == 4
    assert files["plot"].stat().st_size > 1000
    assert "Made by: bpkit" in page


def test_policies_of_all_rows_are_judged_where_none_is_named(trace: Path, tmp_path: Path) -> None:
    write_cost(COST, tmp_path / "cost.json")
    how = ("--concurrency", 2, "--requests", 4, "--seeds", 1, "--bound-seeds", 0, "--block-sizes", 4)
    files = ("--cost", tmp_path / "cost.json", "--json", tmp_path / "load.json")
    result = run(trace, *files, *how, "--part", "validation", "--domain", "easy")
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    assert "batch_table" in report["loads"]["concurrency:2"]["policies"]
    assert "fixed" not in report["loads"]["concurrency:2"]["policies"]
    assert set(report["settings"]["prompts"]) == {"easy"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rate", "3"), "--rate and --max-rows go together"),
        (("--concurrency", "1,x"), "--concurrency 1,x: write numbers above 0"),
        (("--changing", "0"), "--changing 0: write numbers above 0"),
        (("--decisions", "no"), "--decisions no: say"),
        (("--part", "half"), "--part half: say one of train, validation, test, all"),
        (("--concurrency", "64"), "prices up to 8"),
    ],
)
def test_wrong_options_are_explained(trace: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    write_cost(COST, tmp_path / "cost.json")
    result = run(trace, "--cost", tmp_path / "cost.json", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
