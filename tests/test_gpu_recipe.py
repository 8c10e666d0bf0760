"""`make gpu` at tiny sizes: it runs to its end on a CPU, says so, and keeps what it has when a part fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bpkit.decode.result import Generation
from bpkit.types import Prefill, Seconds, Step
from recipes.gpu import __main__ as gpu
from recipes.gpu.clock import Deadline
from recipes.gpu.sizes import TINY, Sizes
from recipes.gpu.texts import compared


def test_a_whole_run_at_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which this takes minutes")
    file = tmp_path / "out" / "gpu.json"
    gpu.main(["--json", str(file)])
    report = json.loads(file.read_text(encoding="utf-8"))
    assert "there is no GPU: tiny sizes" in capsys.readouterr().out
    assert report["sizes"] == "tiny"
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    assert [*rows] == ["steps", "texts", "loop", "exported"]
    assert all(section["error"] is None and not section["cut"] for section in report["sections"].values())
    passes = [row for row in rows["steps"] if row["what"] in ("verify", "draft")]
    assert {(row["what"], row["batch"]) for row in passes} == {
        (what, n) for what in ("verify", "draft") for n in (1, 2)
    }
    assert all(min(row["eager_ms"], row["captured_ms"], row["floor_ms"]) > 0 for row in passes)
    assert {(row["attention"], row["context"]) for row in passes if "attention" in row} == {
        ("sdpa", TINY.long_context),
        ("bpkit_sdpa", TINY.long_context),
        ("bpkit_sdpa", TINY.context),
    }
    assert {(row["dtype"], row["sampling"], row["policy"]) for row in rows["texts"]} == {
        (dtype, kind, policy)
        for dtype in ("float32", "bfloat16")
        for kind in ("greedy", "sampled")
        for policy in TINY.policies or ()
    }
    assert all(row["texts"] == row["equal"] + row["differ_at_near_ties"] > 0 for row in rows["texts"])
    steps = [row for row in rows["loop"] if row["what"] == "step"]
    assert {(row["pair"], row["capture"]) for row in steps} == {
        (p, c) for p in ("random", "shipped") for c in ("on", "off")
    }
    assert all(0 < row["loop_share"] < 1 for row in steps)
    assert [row["reads_per_step"] for row in rows["loop"] if row["what"] == "reads"] == [1]
    on_cpu, on_cuda = rows["exported"]
    assert on_cpu["equal"] == on_cpu["same_decisions_as_torch"] == 3 or "left_out" in on_cpu
    assert "cuda" in on_cuda["left_out"] or "onnxruntime" in on_cuda["left_out"]


def test_a_section_that_fails_or_runs_out_of_time_leaves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(sizes: Sizes, device: torch.device, deadline: Deadline) -> Iterator[dict[str, Any]]:
        yield {"found": 1}
        raise RuntimeError("out of memory")

    def long(sizes: Sizes, device: torch.device, deadline: Deadline) -> Iterator[dict[str, Any]]:
        while deadline:
            yield {"differ": 0}

    monkeypatch.setattr(gpu, "SECTIONS", {"failing": (failing, 0.5), "long": (long, 0.5)})
    file = tmp_path / "gpu.json"
    report: dict[str, Any] = {"sections": {}}
    gpu.measure(report, TINY, torch.device("cpu"), 0.4, ["failing", "long"], file)
    assert json.loads(file.read_text(encoding="utf-8")) == report
    first, second = report["sections"].values()
    assert (first["rows"], first["error"]) == ([{"found": 1}], "RuntimeError: out of memory")
    assert second["cut"]
    assert second["rows"]
    assert 0.3 < second["seconds"] < 5  # what the first left was the second's


def generation(tokens: list[int], tie: int | None = None) -> Generation:
    """Plain decoding's, with a near tie at one of the tokens."""
    one, places = torch.ones(1, dtype=torch.long), range(len(tokens))
    records: list[Any] = [Prefill(torch.tensor([tokens[:1]]), Seconds(), (int(tie == 0),), (0,), (False,))]
    records += [
        Step(one, one - 1, one - 1, one - 1, torch.tensor([[tokens[i]]]), one, Seconds(), 0, (int(tie == i),), (0,))
        for i in places[1:]
    ]
    ids = torch.tensor([tokens])
    return Generation(ids, ids, None, None, [(record, 0) for record in records])


def test_texts_that_part_at_a_near_tie_are_told_from_others() -> None:
    plain = [generation([5, 6, 7], tie) for tie in (None, None, 1, 2)]
    found = [generation(tokens) for tokens in ([5, 6, 7], [5, 9, 7], [5, 9, 7], [5, 9, 7])]
    counts = compared(plain, found)
    assert (counts["texts"], counts["equal"], counts["differ_at_near_ties"], counts["differ"]) == (4, 1, 1, 2)
