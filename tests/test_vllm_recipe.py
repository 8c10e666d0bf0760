"""The benchmark of policies inside vLLM: plans, runs that go on, figures, and replays of them. Without vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpkit_vllm.local_engine import EngineRun

from bpkit.prompts import Prompt
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.cost import PackedCost
from bpkit.types import BLOCK_DIFFUSION, DecoderSpec
from recipes.vllm import measure
from recipes.vllm.engines import FEATURES, PLAIN, POLICIES, TABLE, arguments
from recipes.vllm.measure import FIXED, MEASURE, TUNE, Bench, BenchPlan, Run, RunFile, best_table
from recipes.vllm.replay import Simulated, predictions, replayed_rate
from recipes.vllm.summary import headline, summarise, texts_of
from recipes.vllm.worker import window

BASE: dict[str, Any] = {"model": "target", "speculative_config": {"method": "dflash", "num_speculative_tokens": 15}}
PLAN = BenchPlan(
    ("plain", "joint"), BASE, "cost.json", (1, 32), (1, 4, 1), repetitions=2, options={"max_new_tokens": 8}
)
PROMPTS = [
    Prompt(f"{split}-{i}", "maths", f"text {i}", split=split) for split in ("validation", "test") for i in range(9)
]


class FakeEngine:
    """Answers with made-up rates: `fixed:4` is the fastest at one row, `fixed:1` at many."""

    def __init__(self, arguments: dict[str, Any], errors: Path) -> None:
        pass

    def ask(self, asked: dict[str, Any]) -> Run:
        size = int(asked["policy"].rpartition(":")[2]) if str(asked["policy"]).startswith("fixed") else 3
        slow = abs(size - 4) if max(asked["levels"]) < 8 else size
        tokens = [prompt["text"] for prompt in asked["prompts"]]
        return {
            "digests": tokens,
            "tokens": 8 * len(tokens),
            "seconds": 1.0,
            "window": {"tokens": 100, "seconds": 1.0 + 0.1 * slow},
            "verified_per_token": 1.0,
            "decision_us": 200.0,
            "decision_us_median": 190.0,
        }

    def close(self) -> None:
        pass


def bench(plan: BenchPlan, file: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.setattr(measure, "EngineProcess", FakeEngine)
    runs = RunFile(file, plan.stated())
    Bench(plan, PROMPTS, runs, lambda *said: None).run()
    return runs.runs


def test_every_method_has_the_same_prompts_in_a_block_and_others_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = bench(PLAN, tmp_path / "runs.jsonl", monkeypatch)
    blocks: dict[tuple[int, str], dict[str, list[str]]] = {}
    for run in runs:
        blocks.setdefault((run["repetition"], run["load"]), {})[run["method"]] = run["prompts"]
    assert len(blocks) == 6
    for of in blocks.values():
        assert of.keys() == {*FIXED, "plain", "joint"}
        assert len({tuple(prompts) for prompts in of.values()}) == 1
        assert all(name.startswith("test") for name in of["plain"])
    assert blocks[0, "concurrency:1"]["plain"] != blocks[1, "concurrency:1"]["plain"]
    assert len(blocks[0, "concurrency:32"]["plain"]) == 64


def test_tables_are_tuned_on_validation_prompts_for_those_who_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = bench(replace(PLAN, methods=("plain", TABLE)), tmp_path / "runs.jsonl", monkeypatch)
    tuned = [run for run in runs if run["phase"] == TUNE]
    assert len(tuned) == 2 * len(FIXED)
    assert all(name.startswith("validation") for run in tuned for name in run["prompts"])
    assert best_table(runs) == {1: 4, 32: 1}


def test_an_interrupted_measurement_goes_on_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.jsonl"
    whole = bench(PLAN, file, monkeypatch)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:10]) + "\n")
    assert bench(PLAN, file, monkeypatch) == whole
    assert len(bench(replace(PLAN, repetitions=3), file, monkeypatch)) == len(whole) * 3 // 2
    with pytest.raises(ValueError, match="runs with other settings"):
        bench(replace(PLAN, seed=1), file, monkeypatch)


def test_figures_are_against_the_best_fixed_length_of_each_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = bench(PLAN, tmp_path / "runs.jsonl", monkeypatch)
    loads = summarise(runs)
    assert [of["best_fixed"] for of in loads.values()] == ["fixed:4", "fixed:1", "fixed:4"]
    assert loads["concurrency:1"]["methods"]["joint"]["ratio"] == pytest.approx(1 / 1.1, rel=1e-4)
    next(run for run in runs if run["method"] == "joint")["digests"][0] = "another text"
    texts = 2 * (4 + 64 + 6) * 6  # repetitions, requests, methods beside `plain`
    assert texts_of(runs) == {"texts": texts, "texts_equal": texts - 1, "texts_that_differ": {"joint": 1}}
    report = {"loads": loads, "texts": 720, "texts_equal": 720}
    said = headline({"pair": report}, "joint")
    assert said["worst_regret_at"] == "pair concurrency:32"
    assert said["worst_regret_percent"] == pytest.approx(100 * (1 - 1.1 / 1.3), abs=0.01)
    assert said["changing_load_gain_percent"] == pytest.approx(100 * (1 / 1.1 - 1), abs=0.01)
    assert said["decision_us_at_32"] == 200
    with pytest.raises(ValueError, match="policy 'goodput' has no complete repetition"):
        headline({"pair": report}, "goodput")


def test_engines_differ_in_what_decides_alone() -> None:
    table = [(1, 3, 5), (4, 32, 1)]
    assert "speculative_config" not in arguments(PLAIN, BASE, [PLAIN], "c.json")
    decided = arguments(TABLE, BASE, [TABLE], "c.json", table)["speculative_config"]
    assert decided == {"method": "dflash", "num_speculative_tokens": 15, "num_speculative_tokens_per_batch_size": table}
    features = arguments(FEATURES, BASE, ["joint@features"], "c.json")
    assert features["additional_config"]["bpkit"]["policies"] == ["joint"]
    assert features["worker_cls"] == "bpkit_vllm.FeatureWorker"
    assert "policies" not in arguments(POLICIES, BASE, ["joint"], "c.json")["additional_config"]["bpkit"]


def test_the_window_is_of_steps_in_which_all_rows_run() -> None:
    run = EngineRun([[1]] * 3, 6.0, live=[2, 2, 2, 2, 1], left=[1, 1, 0, 0, 0], ends=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert window(run, np.array([0, 2, 1, 2, 1]), 2) == (1, 4)
    assert window(run, np.array([0, 1, 1, 1, 1]), 2) == (0, 4)


def test_a_replay_predicts_runs_that_took_what_the_costs_say_and_tells_others_apart() -> None:
    cost = PackedCost(passes={1: 0.01, 64: 0.05}, row=0.001, draft={2: 0.002, 64: 0.01})
    prompts = {
        prompt.id: prompt for prompt in (synthetic_prompt(i, block_sizes=(2, 3, 4, 5, 6, 7, 8)) for i in range(6))
    }
    spec = DecoderSpec("target", "drafter", BLOCK_DIFFUSION, 8, 8, 8, 64)
    engine, runs = Simulated(prompts, spec, cost, 2, {}, 512), []
    for load in ("concurrency:2", "changing:1-2-1"):
        for method, factor in (("fixed:1", 1.0), ("fixed:3", 1.0), ("turbospec", 1.25)):
            run = {"phase": MEASURE, "repetition": 0, "load": load, "method": method, "prompts": [*prompts]}
            rate = factor * replayed_rate(run, engine)
            runs.append({**run, "window": {"tokens": rate, "seconds": 1.0}})
    found = predictions(runs, engine, lambda *said: None)
    of = found["loads"]["concurrency:2"]["methods"]
    assert of["fixed:3"]["error"] == pytest.approx(0, abs=0.03)  # decisions are charged as they are measured
    assert of["turbospec"]["error"] == pytest.approx(-0.2, abs=0.05)
    assert found["headline"]["pairs"] > 0
    json.dumps(found)
    with pytest.raises(ValueError, match="of the runs, such as 'nobody'"):
        replayed_rate({**runs[0], "prompts": ["nobody"]}, engine)
