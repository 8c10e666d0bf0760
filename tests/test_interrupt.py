"""Ctrl-C and SIGTERM, sent to real processes at work: an exit code, a sentence, and nothing torn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bpkit.cli.errors import Terminated, checkpoint_in, exit_code, explain, nothing_written, when_interrupted
from bpkit.cli.main import build_app

# Who starts the tests in the background makes them, and all that they start, deaf to Ctrl-C.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import bpkit.cli.main
bpkit.cli.main.main()
"""
LONGEST = 60
"""Seconds until something is wrong."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"x = {i} + "}) + "\n" for i in range(200)), encoding="utf-8")
    return file


def on(tiny_folder: Path) -> list[str]:
    return ["--target", str(tiny_folder / "target"), "--drafter", str(tiny_folder / "drafter"), "--device", "cpu"]


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def stopped(
    process: subprocess.Popen[str], working: Callable[[], bool], how: signal.Signals = signal.SIGINT
) -> tuple[int, str, str]:
    """Send the signal once the process is at work. Returns its exit code, stdout and stderr."""
    ends = time.monotonic() + LONGEST
    while process.poll() is None and not working():
        assert time.monotonic() < ends, "it never got to work"
        time.sleep(0.01)
    process.send_signal(how)
    out, said = process.communicate(timeout=LONGEST)
    return process.returncode, out, said


def holds(file: Path) -> Callable[[], bool]:
    return lambda: file.is_file() and file.stat().st_size > 0


@pytest.mark.slow
def test_generate_keeps_the_text_until_then(tiny_folder: Path, tmp_path: Path) -> None:
    steps = tmp_path / "steps.jsonl"
    process = started(
        "generate",
        "x = ",
        *on(tiny_folder),
        "--max-new-tokens",
        "4000",
        "--observe",
        f"jsonl:path={steps}",
        "--policy",
        "fixed:2",
    )
    code, out, said = stopped(process, lambda: holds(steps)() and steps.read_text().count("\n") > 3)
    assert (code, said) == (130, "Interrupted. The text until then is all that was written.\n")
    assert out.endswith("\n")


@pytest.mark.slow
def test_bench_says_that_nothing_was_written(tiny_folder: Path, prompts: Path, tmp_path: Path) -> None:
    steps, report = tmp_path / "steps.jsonl", tmp_path / "bench.json"
    process = started(
        *(
            "bench",
            *on(tiny_folder),
            "--prompts",
            str(prompts),
            "--policy",
            "fixed:2",
            "--json",
            str(report),
            "--threads",
            "1",
        ),
        *("--observe", f"jsonl:path={steps}"),
    )
    code, out, said = stopped(process, holds(steps), signal.SIGTERM)
    assert (code, said) == (143, f"Terminated. Nothing was written: {report} is not there.\n")
    assert out == ""
    assert not report.exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trace_goes_on_where_it_was_interrupted(
    tiny_folder: Path, prompts: Path, tmp_path: Path, workers: int
) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "trace"
    process = started(
        *("trace", *on(tiny_folder), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "24"),
        *("--block-sizes", "2+4", "--num-workers", str(workers)),
    )
    code, _, said = stopped(process, lambda: any(out.glob("**/*.parquet")))
    assert (code, said) == (130, f"Interrupted. What was traced is in {out}; the same command goes on from there.\n")
    assert any(out.glob("**/*.parquet"))
    ends = time.monotonic() + 10
    while group_is_there(process.pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not group_is_there(process.pid), "the workers are still there"


def group_is_there(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_training_goes_on_from_the_last_checkpoint(tiny_folder: Path, prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("lightning")
    few, trace, out = tmp_path / "few.jsonl", tmp_path / "trace", tmp_path / "out"
    few.write_text("".join(prompts.read_text(encoding="utf-8").splitlines(keepends=True)[:12]), encoding="utf-8")
    given = ["trace", *on(tiny_folder), "--prompts", str(few), "--out", str(trace), "--max-new-tokens", "16"]
    traced = CliRunner().invoke(build_app(), [*given, "--block-sizes", "2-8", "--features", "last_hidden"])
    assert traced.exit_code == 0, traced.output
    file = tmp_path / "mine.py"
    file.write_text(POLICY, encoding="utf-8")
    arguments = ["train", f"{file}:Mine", str(trace), "--out", str(out), "--cost", "dflash-h200-qwen3-4b"]
    code, _, said = stopped(started(*arguments, "--epochs", "100000"), holds(out / "checkpoints" / "last.ckpt"))
    assert code == 130, said
    assert said.endswith(
        f"Interrupted. The last checkpoint is in {out / 'checkpoints'}; the same command goes on from there.\n"
    )
    assert "Traceback" not in said


POLICY = """
from torch import nn
from bpkit import Feature
from bpkit.learn import LearnedPolicy


class Mine(LearnedPolicy):
    wants = frozenset({Feature.LAST_HIDDEN})

    def network(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs)
"""


def test_what_was_saved_is_said_at_that_moment(tmp_path: Path) -> None:
    file, last = tmp_path / "out.json", tmp_path / "checkpoints" / "last.ckpt"

    def work(error: BaseException) -> None:
        with when_interrupted(nothing_written(file, None)):
            file.touch()
            raise error

    def ended(error: BaseException) -> str:
        with pytest.raises(type(error)) as caught:
            work(error)
        return explain(caught.value)

    assert ended(KeyboardInterrupt()) == f"Interrupted. Nothing was written: {file} is as it was."
    assert ended(Terminated()).startswith("Terminated. Nothing")
    assert exit_code(Terminated()) == 143
    assert "Nothing" not in ended(ValueError("an error is no interruption"))
    assert checkpoint_in(tmp_path)() == f"No checkpoint was written to {tmp_path} yet."
    last.parent.mkdir()
    last.touch()
    assert "goes on" in checkpoint_in(tmp_path)()
    assert nothing_written(None)() == "Nothing was written."
