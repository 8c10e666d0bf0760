"""`load-table` and `load-summary`: what several evaluations under load come to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from recipes.load.summary import summarise, table_of


def entry(ratio: float, gap_share: float | None = None) -> dict[str, Any]:
    return {
        "tokens_per_second": 100.0 * ratio,
        "tokens_per_second_ratio": ratio,
        "interval": [ratio - 0.01, ratio + 0.01],
        "gap_share": gap_share,
        "simulated_steps_per_second": 1000.0,
        "simulated_row_steps_per_second": 3000.0,
        "steps": 5,
    }


def load(kind: str, rows: int, best: int, ratio: float, gap_share: float | None = None) -> dict[str, Any]:
    return {
        "kind": kind,
        "rows": rows,
        "requests": 64,
        "best_fixed": {"block_size": best, **entry(1.0)},
        "bound": {"name": "clairvoyant", **entry(1.2, 1.0)},
        "fixed": {"1": entry(0.8), str(best): entry(1.0)},
        "policies": {"joint": entry(ratio, gap_share)},
    }


def report(charged: bool = True, **loads: dict[str, Any]) -> dict[str, Any]:
    settings = {"target": "t", "drafter": "d", "cost": {}, "prompts": {}, "seeds": 2, "bound_seeds": 1}
    settings |= {"decision_time_charged": charged, "mixes_passes": False, "max_tokens": None}
    named = {name.replace("_", ":"): of for name, of in loads.items()}
    return {"settings": settings, "provenance": {"command": "bpkit evaluate-load"}, "loads": named}


ONE = report(
    concurrency_1=load("concurrency", 1, 6, 0.99, 0.4),
    concurrency_16=load("concurrency", 16, 3, 1.05, 0.25),
    changing_x=load("changing", 16, 4, 1.1),
)
FREE = report(charged=False, concurrency_8=load("concurrency", 8, 2, 1.1, 0.35))
OTHER = report(concurrency_4=load("concurrency", 4, 1, 1.02), changing_x=load("changing", 4, 2, 1.21))


def test_the_headline_is_the_worst_of_all_loads_and_the_means_of_others() -> None:
    found = summarise({"h100": ONE, "cpu": OTHER, "free": FREE}, "joint")
    assert found["headline"] == {
        "policy": "joint",
        "worst_regret_percent": 1.0,
        "worst_regret_at": "h100 concurrency:1",
        "changing_load_gain_percent": pytest.approx(100 * ((1.1 * 1.21) ** 0.5 - 1), rel=1e-4),
        "changing_load_gain_percent_by_run": {"h100 changing:x": 10.0, "cpu changing:x": 21.0},
        "decisions_free": {
            "worst_regret_percent": -10.0,
            "worst_regret_at": "free concurrency:8",
            "changing_load_gain_percent": None,
            "changing_load_gain_percent_by_run": {},
        },
        "gap_share_from_8_rows": 0.3,
        "steps_per_second": 1000.0,
        "row_steps_per_second": 3000.0,
    }
    kept = found["runs"]["h100"]["loads"]["concurrency:16"]
    assert kept["best_fixed"]["block_size"] == 3
    assert kept["policies"]["joint"]["interval"] == [1.04, 1.06]
    assert "steps" not in kept["policies"]["joint"]
    with pytest.raises(ValueError, match="cpu: policy 'other'"):
        summarise({"cpu": OTHER}, "other")


def test_the_table_of_an_evaluation_is_a_policy() -> None:
    from bpkit.registry.resolve import resolve_policy

    assert table_of(ONE) == "batch_table:1:6+16:3"
    assert table_of(OTHER) == "batch_table:1:1", "the smallest load that was tried stands for those below"
    assert resolve_policy(table_of(ONE)).config.model_dump()["table"] == {1: 6, 16: 3}
    with pytest.raises(ValueError, match="no closed loop"):
        table_of(report(changing_x=load("changing", 4, 2, 1.0)))


def test_commands_write_and_print_them(recipe: Callable[..., Result], tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("h100", "cpu", "load")}
    files["h100"].write_text(json.dumps(ONE))
    files["cpu"].write_text(json.dumps(OTHER))
    runs = [text for name in ("h100", "cpu") for text in ("--run", f"{name}={files[name]}")]
    result = recipe("load-summary", "--json", files["load"], *runs)
    assert result.exit_code == 0, result.stderr
    written = json.loads(files["load"].read_text())
    assert written["headline"]["policy"] == "joint"
    assert {**written, "command": ""} == {
        "command": "",
        **json.loads(json.dumps(summarise({"h100": ONE, "cpu": OTHER}, "joint"))),
    }
    assert "batch_table:1:6+16:3" in recipe("load-table", files["h100"]).output
