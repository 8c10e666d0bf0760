"""The whole job of a trace: killed and taken up again, by one process or many, on disk and back; what is refused."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from bpkit.cli import models as cli_models
from bpkit.cli.main import build_app
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.result import Generation
from bpkit.draft.ngram import NgramDrafter
from bpkit.prompts import Prompt, read_dataset, read_prompts
from bpkit.testing import TinyPair, tiny_pair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.collect.job import describe, run_job
from bpkit.trace.collect.ray_workers import OnRay
from bpkit.trace.collect.tracer import Output, Traces
from bpkit.trace.collect.workers import Models, Processes, Task, WorkerError
from bpkit.trace.fingerprint import fingerprint_model
from bpkit.trace.records import PromptTrace
from bpkit.trace.store import parquet as tables
from bpkit.trace.store.joined import open_trace
from bpkit.trace.store.manifest import Manifest, TraceError, read_manifest
from bpkit.trace.store.parquet import from_tables, to_tables
from bpkit.trace.store.storage import LOCK, Trace, claimed
from bpkit.types import Feature

SIZES = (2, 3, 5, 8)
TEXTS = ("f(x) = 2 * x", "a, b, a, b, a, ", "Once", '{"a": 1, "a": 1,', "0 1 2 3 4 5", "zz")
PROMPTS = [Prompt(f"p{i}", f"domain {i % 2}", text) for i, text in enumerate(TEXTS)]
SAMPLED = {"temperature": 1.0, "top_p": 0.95}


def decoder_of(pair: TinyPair, drafter: Any = None) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target, drafter or pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)


def job(
    folder: Path, decoder: SpeculativeDecoder, options: TraceOptions, prompts: Sequence[Prompt] = PROMPTS
) -> Manifest:
    """A whole job in this process."""
    return run_job(folder, describe(decoder, prompts, options), prompts, Tracer(decoder, options))


def assert_same_prompt(found: PromptTrace, expected: PromptTrace, close: float = 0.0) -> None:
    """Tokens and counts are equal, and floats are within `close`."""
    for name in ("index", "id", "domain", "max_new_tokens"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("prompt_tokens", "output_tokens", "prefill_top_tokens", "near_ties"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    ours, theirs = found.drafts, expected.drafts
    for name in ("block_sizes", "draft_length", "num_accepted", "tokens"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    floats: dict[str, tuple[Any, Any]] = {
        "top": (found.prefill_top_log_probabilities, expected.prefill_top_log_probabilities),
        "entropy": (np.float32(found.prefill_entropy), np.float32(expected.prefill_entropy)),
    }
    assert (ours.match_probability is None) == (theirs.match_probability is None)
    if ours.match_probability is not None and theirs.match_probability is not None:
        floats["match"] = (ours.match_probability, theirs.match_probability)
    for mine, other in ((found.features, expected.features), (ours.features, theirs.features)):
        assert mine.keys() == other.keys()
        floats |= {str(name): (mine[name], other[name]) for name in mine}
    for name, (mine_, other_) in floats.items():
        assert np.shape(mine_) == np.shape(other_), name
        np.testing.assert_allclose(mine_, other_, rtol=close, atol=close, err_msg=name)


def assert_same(found: Sequence[PromptTrace], expected: Sequence[PromptTrace], close: float = 0.0) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert_same_prompt(mine, other, close)


# On disk and back


class EndsAtOnce(Tracer):
    """Whose output of some prompts is a single token, as if the target ended them at once."""

    short: frozenset[int] = frozenset()

    def _output(self, index: int, prompt: Prompt, generation: Generation) -> Output:
        output = super()._output(index, prompt, generation)
        return replace(output, tokens=output.tokens[:, :1]) if index in self.short else output


DRAFTERS: dict[str, Callable[[TinyPair], Any]] = {
    "block-diffusion": lambda pair: pair.block_diffusion(),
    "autoregressive": lambda pair: pair.autoregressive(),
    "agreeable": lambda pair: pair.agreeable(),
    "n-gram": lambda pair: NgramDrafter(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "sampling"),
    [({0}, {"temperature": 0.0}), ({2}, SAMPLED), ({0, 1, 2, 3, 4, 5}, SAMPLED)],
    ids=["first", "middle", "all"],
)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_what_is_read_is_what_was_traced(
    pair: TinyPair, kind: str, sampling: dict[str, float], short: set[int], tmp_path: Path
) -> None:
    decoder = decoder_of(pair, DRAFTERS[kind](pair))
    features = frozenset(map(Feature, tables.MORE_OF_PROMPTS.names)) | (
        {Feature.DRAFT_HIDDEN} if kind != "n-gram" else set()
    )
    options = TraceOptions(SIZES, 6, sampling, 3 if sampling["temperature"] else None, features)
    tracer = EndsAtOnce(decoder, options)
    tracer.short = frozenset(short)
    expected = [tracer.trace(i, prompt) for i, prompt in enumerate(PROMPTS)]
    manifest = run_job(tmp_path / "t", describe(decoder, PROMPTS, options), PROMPTS, tracer)
    found = open_trace(tmp_path / "t")
    for i, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine.output_length == (1 if i in short else 6)
        if Feature.DRAFT_HIDDEN in features and i in short:  # no drafts, no width
            assert mine.drafts.features.pop(Feature.DRAFT_HIDDEN).shape[:3] == (0, len(SIZES), max(SIZES) - 1)
            del other.drafts.features[Feature.DRAFT_HIDDEN]
        assert_same_prompt(mine, other)
    assert manifest.output_tokens == sum(p.output_length for p in expected)
    assert manifest.near_ties == sum(len(p.near_ties) for p in expected)
    assert found.ids == [p.id for p in PROMPTS]
    assert found.domains == [p.domain for p in PROMPTS]
    assert [p.id for p in found[1:4]] == ["p1", "p2", "p3"]
    assert found[-1].id == "p5"


def test_ragged_drafts_of_an_ngram_drafter_keep_their_places(pair: TinyPair) -> None:
    options = TraceOptions((2, 5, 9), 24)
    trace = Tracer(decoder_of(pair, NgramDrafter()), options).trace(0, PROMPTS[1])
    lengths = set(trace.drafts.draft_length.ravel().tolist())
    assert len(lengths) > 2
    assert_same_prompt(from_tables(*to_tables(trace), options.block_sizes), trace)
    assert trace.drafts.features == {}
    assert trace.drafts.match_probability is None


# Killed and taken up again


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": p.id, "domain": p.domain, "prompt": p.text} for p in PROMPTS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def arguments(tiny_folder: Path, prompt_file: Path, out: Path, *more: str) -> list[str]:
    on = ["--target", str(tiny_folder / "target"), "--drafter", str(tiny_folder / "drafter"), "--threads", "1"]
    common = ["--block-sizes", "2+3+5+8", "--max-new-tokens", "12", "--temperature", "1", "--device", "cpu"]
    return ["trace", "--out", str(out), "--prompts", str(prompt_file), *on, *common, *more]


def run(*given: str) -> Result:
    return CliRunner().invoke(build_app(), list(given), prog_name="bpkit")


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The trace of the prompt file, by one process in one go."""
    out = tmp_path_factory.mktemp("traces") / "uninterrupted"
    result = run(*arguments(tiny_folder, prompt_file, out))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    return Trace(out)


def pause_after_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment between any two changes of the folder, so that a kill at random meets all of them."""

    def slowly(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*given: Any, **options: Any) -> None:
            change(*given, **options)
            time.sleep(0.01)

        return changed

    monkeypatch.setattr("bpkit.trace.store.storage.pq.write_table", slowly(pq.write_table))
    for name in ("replace", "mkdir", "unlink", "rmdir"):
        of = os if name == "replace" else Path
        monkeypatch.setattr(of, name, slowly(getattr(of, name)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the job runs in a fork of this process")
def test_killed_at_random_and_started_again_it_ends_as_if_nothing_had_happened(
    pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, options, out = decoder_of(pair), TraceOptions(SIZES, 4, SAMPLED, 1), tmp_path / "killed"
    job(tmp_path / "whole", decoder, options)
    rng, kills = random.Random(0), 0
    seen: set[str] = set()
    pause_after_every_change(monkeypatch)
    while True:
        child = os.fork()
        if child == 0:
            try:
                job(out, decoder, options)
                os._exit(0)
            finally:
                os._exit(1)
        ends = time.monotonic() + rng.uniform(0, 0.15)
        while time.monotonic() < ends or kills == 20:
            now = check_parts(out)
            complete = (out / "manifest.json").exists() and read_manifest(out).complete
            assert seen <= now or complete, "a prompt that was finished is gone"
            seen = now
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        kills += 1
    monkeypatch.undo()
    assert kills >= 5
    assert sorted(path.name for path in out.iterdir()) == ["drafts.parquet", "manifest.json", "prompts.parquet"]
    assert_same(open_trace(out), open_trace(tmp_path / "whole"))


@pytest.mark.slow
def test_the_command_that_was_killed_goes_on_when_it_is_run_again(
    tiny_folder: Path, prompt_file: Path, uninterrupted: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tiny_folder, prompt_file, tmp_path / "t")
    process = subprocess.Popen([sys.executable, "-c", STOPS_AFTER_THREE + MAIN, *given], stderr=subprocess.DEVNULL)
    while len(check_parts(tmp_path / "t")) < 3:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = check_parts(tmp_path / "t")
    assert len(left) == 3
    traced: list[int] = []
    retraced = Tracer.retraced

    def noted(self: Tracer, outputs: Sequence[Output]) -> list[PromptTrace]:
        traced.extend(output.index for output in outputs)
        return retraced(self, outputs)

    monkeypatch.setattr(Tracer, "retraced", noted)
    result = run(*given)
    assert result.exit_code == 0, result.stderr
    assert len(traced) == len(PROMPTS) - len(left)
    # Those that are traced together are others, so that passes are padded otherwise.
    assert_same(open_trace(tmp_path / "t"), uninterrupted, close=1e-5)


MAIN = "from bpkit.cli.main import main; main()"
STOPS_AFTER_THREE = """
import time
from bpkit.trace.store.storage import TraceWriter

write = TraceWriter.write

def third(self, trace):
    write(self, trace)
    if len(self.missing()) == 3:
        time.sleep(600)

TraceWriter.write = third
"""
"""All prompts are traced together and written at once, so that who waits for a part would find all of them."""


def check_parts(out: Path) -> set[str]:
    """Every part can be read, at any time, and a prompt has its drafts; returns the names of prompts that are there."""
    parts = out / "parts"
    found = set()
    try:
        names = sorted(name for name in os.listdir(parts) if name.endswith(".prompts.parquet"))
    except FileNotFoundError:  # not there yet, or cleared away
        names = []
    for path in (parts / name for name in names):
        try:
            row, drafts = pq.read_table(path), pq.read_table(path.with_name(path.name.replace("prompts", "drafts")))
        except FileNotFoundError:  # joined, and cleared away
            continue
        assert len(row) == 1
        assert len(drafts) == (len(row.column("output_tokens")[0]) - 1) * len(SIZES)
        found.add(path.name)
    return found


@pytest.mark.parametrize("moment", ["before the manifest", "joining", "clearing"])
def test_a_folder_that_was_left_in_between_is_taken_up(pair: TinyPair, moment: str, tmp_path: Path) -> None:
    decoder, options = decoder_of(pair), TraceOptions(SIZES, 4)
    job(tmp_path / "whole", decoder, options)
    out = tmp_path / "t"
    if moment == "before the manifest":
        out.mkdir()
        (out / ".manifest.json.1.tmp").write_text("{", encoding="utf-8")
    else:
        stop_at(out, decoder, options, count=3)
        (out / ".drafts.1.tmp").write_bytes(b"PAR1")
        (out / "parts" / "000004.drafts.1.tmp").write_bytes(b"PAR1")
    if moment == "clearing":
        job(out, decoder, options)
        (out / "parts").mkdir()
        (out / "parts" / "000001.prompts.parquet").write_bytes(b"")
    job(out, decoder, options)
    assert_same(open_trace(out), open_trace(tmp_path / "whole"))
    if moment != "before the manifest":
        assert len(list(out.iterdir())) == 3


class StopsAfter(Tracer):
    """Is interrupted after so many prompts; says whether it was closed."""

    count, closed = 0, False

    def traces(self, prompts: Sequence[tuple[int, Prompt]]) -> Traces:
        try:
            for done, trace in enumerate(super().traces(prompts)):
                if done == self.count:
                    raise KeyboardInterrupt
                yield trace
        finally:
            self.closed = True


def stop_at(out: Path, decoder: SpeculativeDecoder, options: TraceOptions, count: int) -> None:
    workers = StopsAfter(decoder, options)
    workers.count = count
    with pytest.raises(KeyboardInterrupt):
        run_job(out, describe(decoder, PROMPTS, options), PROMPTS, workers)
    assert workers.closed


def test_what_is_traced_is_not_traced_again(pair: TinyPair, tmp_path: Path) -> None:
    decoder, options = decoder_of(pair), TraceOptions(SIZES, 4)
    stop_at(tmp_path, decoder, options, count=4)
    with pytest.raises(TraceError, match=r"4 of 6 prompts\): run the same `bpkit trace --out .*` again"):
        open_trace(tmp_path)
    asked: list[int] = []

    class Notes(Tracer):
        def traces(self, prompts: Sequence[tuple[int, Prompt]]) -> Traces:
            asked.extend(i for i, _ in prompts)
            yield from super().traces(prompts[::-1])  # the order in which they come does not matter

    class Bar:
        ticks, total = 0, 0

        def start(self, phase: str, total: int) -> None:
            self.total = total

        def tick(self) -> None:
            self.ticks += 1

    bar = Bar()
    run_job(tmp_path, describe(decoder, PROMPTS, options), PROMPTS, Notes(decoder, options), bar)
    assert asked == [4, 5]
    assert (bar.ticks, bar.total) == (6, 6)
    assert [p.index for p in open_trace(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_worker_is_closed_when_writing_fails(pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, options = decoder_of(pair), TraceOptions(SIZES, 4)
    workers = StopsAfter(decoder, options)
    workers.count = 99

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("bpkit.trace.store.storage.pq.write_table", full)
    with pytest.raises(OSError, match="no space"):
        run_job(tmp_path, describe(decoder, PROMPTS, options), PROMPTS, workers)
    assert workers.closed


def test_a_second_run_with_the_same_arguments_does_nothing(
    tiny_folder: Path, prompt_file: Path, uninterrupted: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> PromptTrace:
        raise AssertionError("nothing is to be traced")

    monkeypatch.setattr(Tracer, "trace", never)
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.path.iterdir()}
    result = run(*arguments(tiny_folder, prompt_file, uninterrupted.path))
    assert result.exit_code == 0, result.stderr
    assert "is complete" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.path.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-new-tokens", "9"], "max_new_tokens: 12, not 9"),
        (["--temperature", "0.5"], "sampling: {'temperature': 1.0}, not {'temperature': 0.5}"),
        (["--seed", "4"], "seed: 0, not 4"),
        (["--block-sizes", "2+3"], "block_sizes: [2, 3, 5, 8], not [2, 3]"),
        (["--features", "last_hidden"], "features: [], not ['last_hidden']"),
        (["--limit", "1"], "prompt_ids: other prompts"),
    ],
)
def test_other_arguments_on_the_same_folder_are_refused_by_name(
    tiny_folder: Path, prompt_file: Path, uninterrupted: Trace, more: list[str], said: str
) -> None:
    result = run(*arguments(tiny_folder, prompt_file, uninterrupted.path), *more)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "name a new folder" in result.stderr
    assert result.stderr.count("\n") == 1


def test_other_weights_or_texts_are_another_trace(pair: TinyPair, tmp_path: Path) -> None:
    options = TraceOptions(SIZES, 4)
    job(tmp_path, decoder_of(pair), options)
    other = tiny_pair(seed=1)
    assert fingerprint_model(pair.target) == fingerprint_model(tiny_pair().target)
    assert fingerprint_model(pair.target) != fingerprint_model(other.target)
    with pytest.raises(TraceError, match=r"target: .*drafter: "):
        job(tmp_path, decoder_of(other), options)
    with pytest.raises(TraceError, match="drafter_kind: block-diffusion, not n-gram"):
        job(tmp_path, decoder_of(pair, NgramDrafter()), options)
    with pytest.raises(TraceError, match="prompts_fingerprint"):
        job(tmp_path, decoder_of(pair), options, [replace(PROMPTS[0], text="another"), *PROMPTS[1:]])


# Folders that cannot be used


def test_a_second_run_on_the_same_folder_is_refused(pair: TinyPair, tmp_path: Path) -> None:
    decoder, options, out = decoder_of(pair), TraceOptions(SIZES, 4), tmp_path / "t"
    with claimed(out), pytest.raises(TraceError, match=r"is being traced by another run: .* name another"):
        job(out, decoder, options)
    assert list(out.iterdir()) == []
    with claimed(out), pytest.raises(TraceError, match="being traced"), claimed(tmp_path / "." / "t"):
        pass
    job(out, decoder, options)
    assert open_trace(out).manifest.complete


HOLD = """
import sys
from pathlib import Path
from bpkit.trace.store.storage import claimed

with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_in_another_process_keeps_others_out(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(TraceError, match="another run"), claimed(tmp_path):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with claimed(tmp_path):  # ended, though nobody has waited for it
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["", "{", '{"pid": 1, "host": "elsewhere"}'])
def test_a_lock_that_a_dead_process_left_is_taken_over(pair: TinyPair, left: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(left, encoding="utf-8")
    job(tmp_path, decoder_of(pair), TraceOptions(SIZES, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafts.parquet", "manifest.json", "prompts.parquet"]


@pytest.mark.skipif(sys.platform == "win32", reason="there, locks are others")
def test_a_file_system_without_locks_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    claim, told = claimed(tmp_path), pytest.warns(UserWarning, match="flock not supported")
    with told, claim, pytest.raises(TraceError, match="being traced"), claimed(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_refused(pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(TraceError, match="is not empty and holds no trace; name a new folder"):
        job(tmp_path, decoder_of(pair), TraceOptions(SIZES, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_is_no_trace_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make one with `bpkit trace --out"):
        open_trace(tmp_path)


@pytest.mark.parametrize("name", ["prompts", "drafts"])
@pytest.mark.parametrize("damage", ["gone", "truncated", "garbled", "other"])
def test_damaged_tables_are_trace_errors(pair: TinyPair, name: str, damage: str, tmp_path: Path) -> None:
    job(tmp_path / "t", decoder_of(pair), TraceOptions(SIZES, 4))
    table = tmp_path / "t" / f"{name}.parquet"
    content = table.read_bytes()
    if damage == "gone":
        table.unlink()
    elif damage == "truncated":
        table.write_bytes(content[: len(content) // 2])
    elif damage == "garbled":
        table.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    else:
        job(tmp_path / "other", decoder_of(pair), TraceOptions(SIZES, 4), PROMPTS[:2])
        table.write_bytes((tmp_path / "other" / table.name).read_bytes())
    with pytest.raises(TraceError, match="trace again into a new folder"):
        list(open_trace(tmp_path / "t"))


@pytest.mark.parametrize("damage", ["{", '{"schema_version": 2}', '{"complete": "perhaps"}'])
def test_a_manifest_of_another_version_or_none_is_a_trace_error(damage: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(damage, encoding="utf-8")
    with pytest.raises(TraceError, match="not a manifest that this version reads"):
        open_trace(tmp_path)


def test_a_part_that_cannot_be_read_is_named(pair: TinyPair, tmp_path: Path) -> None:
    decoder, options = decoder_of(pair), TraceOptions(SIZES, 4)
    stop_at(tmp_path, decoder, options, count=3)
    part = tmp_path / "parts" / "000001.prompts.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(TraceError, match=r"000001\.prompts\.parquet cannot be read .* delete it and run the same"):
        job(tmp_path, decoder, options)
    part.unlink()
    job(tmp_path, decoder, options)
    assert len(open_trace(tmp_path)) == len(PROMPTS)


# Memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is in use")
def test_memory_stays_flat_over_hundreds_of_prompts(pair: TinyPair, tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", "many", f"{i} = ") for i in range(400)]
    features = frozenset({Feature.DRAFT_HIDDEN, Feature.LAST_HIDDEN, Feature.PREFILL_LOGITS})
    decoder, options = decoder_of(pair), TraceOptions(tuple(range(2, 17)), 3, features=features)
    held: dict[int, int] = {}

    class Counts:
        ticks = 0

        def start(self, phase: str, total: int) -> None: ...

        def tick(self) -> None:
            self.ticks += 1
            if self.ticks in (100, 400):
                gc.collect()
                held[self.ticks] = resident_bytes()

    workers = Tracer(decoder, options)
    run_job(tmp_path, describe(decoder, prompts, options), prompts, workers, Counts())
    # A trace of these takes some 130 kB in memory: were they kept, this would be 39 MB.
    assert held[400] - held[100] < 13_000_000
    assert len(open_trace(tmp_path)) == 400


# Several workers


def on_disk(tiny_folder: Path, **more: Any) -> Models:
    return Models(str(tiny_folder / "target"), str(tiny_folder / "drafter"), "cpu", None, **more)


@pytest.mark.parametrize("many", [pytest.param(["--num-workers", "2"], marks=pytest.mark.slow)])
def test_several_processes_give_the_trace_of_one(
    tiny_folder: Path, prompt_file: Path, uninterrupted: Trace, many: list[str], tmp_path: Path
) -> None:
    result = run(*arguments(tiny_folder, prompt_file, tmp_path / "t", *many))
    assert result.exit_code == 0, result.stderr
    assert_same(open_trace(tmp_path / "t"), uninterrupted, close=1e-6)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_trace_of_one_process(
    tiny_folder: Path, prompt_file: Path, uninterrupted: Trace, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    result = run(*arguments(tiny_folder, prompt_file, tmp_path / "t", "--num-workers", "2", "--ray", "local"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert_same(open_trace(tmp_path / "t"), uninterrupted, close=1e-6)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_process_that_dies_is_told_with_its_prompt_and_the_others_end(tiny_folder: Path) -> None:
    workers = Processes(on_disk(tiny_folder), TraceOptions(SIZES, 4), 2)
    traces = workers.traces([(i % 6, PROMPTS[i % 6]) for i in range(50)])
    next(traces)
    children = own_children()
    assert len(children) == 2
    os.kill(children[0], signal.SIGKILL)
    # The other one may have been the first to work; this one may be loading yet.
    doing = r"(with prompt 'p\d'|while it loaded the models)"
    with pytest.raises(WorkerError, match=rf"worker process is gone {doing} \(SIGKILL.*same command goes on"):
        list(traces)
    assert own_children() == []


@pytest.mark.slow
def test_closing_the_traces_ends_the_processes_in_the_middle_of_a_prompt(tiny_folder: Path) -> None:
    workers = Processes(on_disk(tiny_folder), TraceOptions(SIZES, 80), 2)
    traces = workers.traces(list(enumerate(PROMPTS)))
    next(traces)
    assert len(own_children()) == 2
    started = time.monotonic()
    traces.close()
    assert time.monotonic() - started < 5
    assert own_children() == []


def own_children() -> list[int]:
    """Worker processes of this one."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "spawn_main" in line]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(
    tiny_folder: Path, prompt_file: Path, how: signal.Signals, tmp_path: Path
) -> None:
    given = arguments(tiny_folder, prompt_file, tmp_path / "t", "--num-workers", "2")
    given[given.index("--max-new-tokens") + 1] = "200"
    # Who starts the tests in the background makes them, and all that they start, deaf to Ctrl-C.
    hearing = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{MAIN}"
    process = subprocess.Popen([sys.executable, "-c", hearing, *given], stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not check_files(tmp_path / "t"):
        time.sleep(0.01)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does it
    else:
        process.send_signal(how)
    _, stderr = process.communicate(timeout=60)  # the workers share its stderr: this waits for them too
    if how == signal.SIGINT:
        assert process.returncode == 130
        said = stderr.decode()
        assert "the same command goes on" in said
        assert "Traceback" not in said
    ends = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert members(process.pid) == []


def check_files(out: Path) -> list[Path]:
    return list((out / "parts").glob("*.prompts.parquet"))


def members(group: int) -> list[str]:
    """Processes of a group that still run."""
    found = subprocess.run(["ps", "-ww", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in found.splitlines()]
    return [row[2] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ({"weights": ("0" * 16, "0" * 16)}, TraceOptions(SIZES, 4), "cannot load the models: .* others here"),
        (
            {},
            TraceOptions(SIZES, 4, {"temperature": 1.0, "top_p": -1.0}, 1),
            "prompt 'p0' cannot be traced: .* goes on from there",
        ),
    ],
)
def test_what_a_worker_cannot_do_is_told(
    tiny_folder: Path, models: dict[str, Any], options: TraceOptions, said: str
) -> None:
    with pytest.raises(WorkerError, match=said):
        list(Processes(on_disk(tiny_folder, **models), options, 1).traces([(0, PROMPTS[0])]))


def test_no_prompts_need_no_workers() -> None:
    nothing = Models("./nowhere", None, None, None)
    assert list(Processes(nothing, TraceOptions(SIZES), 2).traces([])) == []
    assert list(OnRay(nothing, TraceOptions(SIZES), 2, address="local").traces([])) == []


def test_a_cluster_that_is_not_there_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    traces = OnRay(Models(None, None, None, None), TraceOptions(SIZES), 2, address="auto").traces([(0, PROMPTS[0])])
    with pytest.raises(WorkerError, match=r"Could not find .* start a cluster with `ray start --head`"):
        list(traces)


class FakeActor:
    """Stands for an actor: what it returns is known at once, or never."""

    def __init__(self, number: int, ready: bool, dies_at: str | None = None) -> None:
        self.number, self.ready, self.dies_at = number, ready, dies_at
        self.run = types.SimpleNamespace(remote=self._run)

    def _run(self, task: Task | None) -> Reference:
        if task is None:
            return Reference(self.ready, [])
        died = any(prompt.id == self.dies_at for _, prompt in task)
        gone = FakeRay.exceptions.RayError("The actor died.\nlong story") if died else None
        return Reference(True, gone or [(self.number, index) for index, _ in task])


class Reference:
    def __init__(self, ready: bool, result: Any) -> None:
        self.ready, self.result = ready, result


class FakeRay:
    """As much of Ray as workers need; it is connected, and its actors are those that it was made with."""

    class exceptions:  # noqa: N801
        class RayError(Exception): ...

        class RayTaskError(RayError): ...

    def __init__(self, *actors: FakeActor) -> None:
        self.actors = iter(actors)

    def is_initialized(self) -> bool:
        return True

    def remote(self, worker: type) -> Any:
        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=lambda *_: next(self.actors)))

    def kill(self, actor: FakeActor) -> None: ...

    def wait(self, references: list[Reference], timeout: float | None = None) -> tuple[list[Reference], list[Any]]:
        return [r for r in references if r.ready][:1], []

    def get(self, reference: Reference) -> Any:
        if isinstance(reference.result, Exception):
            raise reference.result
        return reference.result

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}


def on_fake_ray(monkeypatch: pytest.MonkeyPatch, *actors: FakeActor) -> list[Any]:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(*actors))
    models = Models(None, None, "cpu", None)
    return list(OnRay(models, TraceOptions(SIZES), len(actors), address="auto").traces(list(enumerate(PROMPTS))))


def test_actors_without_room_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_fake_ray(monkeypatch, FakeActor(0, False), FakeActor(1, True))
    assert sorted(found) == [(1, i) for i in range(6)]
    with pytest.raises(WorkerError, match="no worker could start within 10 minutes; the cluster has"):
        on_fake_ray(monkeypatch, FakeActor(0, False))


def test_an_actor_that_is_gone_is_told_with_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerError, match=r"gone with prompt 'p2' \(The actor died\.\)\. .*the same command goes on"):
        on_fake_ray(monkeypatch, FakeActor(0, True, dies_at="p2"))


# Prompts


def test_prompts_of_a_text_file_are_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\n\n  three\n", encoding="utf-8")
    assert [(p.id, p.text) for p in read_prompts(file)] == [("line-1", "one"), ("line-3", "  three")]


def test_prompts_of_a_jsonl_file_may_have_another_column(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "why?", "id": 7, "domain": "d"}\n', encoding="utf-8")
    assert read_prompts(file, "question") == [Prompt("7", "d", "why?")]
    with pytest.raises(ValueError, match=r"line 1: needs a 'prompt' .*such as --column question"):
        read_prompts(file)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the `datasets` library; notes what it was asked for."""
    asked: list[Any] = []

    def load_dataset(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        if path == "nowhere":
            raise RuntimeError("Dataset 'nowhere' doesn't exist on the Hub")
        return [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_prompts_of_a_dataset(datasets: list[Any]) -> None:
    found = read_dataset("openai/gsm8k:main", "train", "question")
    assert [(p.id, p.text) for p in found] == [("line-1", "1 + 1?"), ("line-2", "2 + 2?")]
    read_dataset("folder", column="answer")
    assert datasets == [("openai/gsm8k", "main", "train"), ("folder", None, "test")]
    with pytest.raises(ValueError, match=r"dataset folder, row 1: needs a 'prompt' .*--column question or --column"):
        read_dataset("folder")
    with pytest.raises(ValueError, match=r"dataset 'nowhere', split 'test', cannot be loaded: .* on the Hub"):
        read_dataset("nowhere")


def test_without_the_library_a_dataset_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("trace", "--out", str(tmp_path / "t"), "--dataset", "openai/gsm8k")
    assert result.exit_code == 1
    assert "pip install datasets" in result.stderr


def test_a_dataset_is_traced(datasets: list[Any], tiny_folder: Path, tmp_path: Path) -> None:
    on = ["--target", str(tiny_folder / "target"), "--drafter", "ngram", "--threads", "1", "--max-new-tokens", "3"]
    result = run("trace", "--out", str(tmp_path / "t"), "--dataset", "some", "--column", "question", *on)
    assert result.exit_code == 0, result.stderr
    found = open_trace(tmp_path / "t")
    assert found.ids == ["line-1", "line-2"]
    assert found.manifest.block_sizes == (2, 3, 4, 5, 6, 7, 8)
    assert found.manifest.drafter.fingerprint is None


# What is refused before anything is written


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--features", "hiden"], "--features hiden: there is no such feature; to be added are: anchor_embedding"),
        (["--block-sizes", "2-40"], "block sizes to trace are 2 .. "),
        (["--block-sizes", "1-4"], "1 is less than 2"),
        (["--drafter", "ngram", "--features", "draft_hidden"], "drafter n-gram has no hidden states"),
        (["--dataset", "some"], "exclude each other"),
        (["--domain", "prose"], "no prompts of domain 'prose'"),
        (["--num-workers", "0"], "--num-workers"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(
    tiny_folder: Path, prompt_file: Path, more: list[str], said: str, tmp_path: Path
) -> None:
    result = run(*arguments(tiny_folder, prompt_file, tmp_path / "t"), *more)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "t").exists()


def test_the_rejection_rule_is_refused(tiny_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("runtime: {rule: rejection}\n", encoding="utf-8")
    result = run(*arguments(tiny_folder, prompt_file, tmp_path / "t"), "--config", str(config))
    assert result.exit_code == 2
    assert "only outputs of rule 'coupled' can be traced" in result.stderr


def test_a_drafter_that_remembers_requests_is_refused(pair: TinyPair) -> None:
    drafter = NgramDrafter()
    drafter.remembers_requests = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"drafter n-gram remembers earlier requests.*order of prompts"):
        Tracer(decoder_of(pair, drafter), TraceOptions(SIZES))


def test_without_pyarrow_or_ray_the_extra_is_named(
    tiny_folder: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module, more in (("pyarrow", []), ("ray", ["--ray", "local"])):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, missing=module: None if name == missing else True)
        decoder = SpeculativeDecoder.from_pretrained(
            str(tiny_folder / "target"), str(tiny_folder / "drafter"), "fixed:4", device="cpu"
        )
        monkeypatch.setattr(cli_models, "load_decoder", lambda *_, made=decoder: made)
        result = run(*arguments(tiny_folder, prompt_file, tmp_path / "t", *more))
        assert result.exit_code == 1
        assert f"pip install 'block-policy-kit[{'traces' if module == 'pyarrow' else module}]'" in result.stderr


# bpkit bench


def test_options_of_bench_before_its_command_are_refused() -> None:
    result = run("bench", "--policy", "fixed:4", "policy")
    assert result.exit_code == 2
    assert "write them after `policy`" in result.stderr
    assert run("bench", "polic").exit_code == 2


# The document


def test_every_column_and_field_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs" / "traces.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    fields = (*tables.PROMPTS, *tables.MORE_OF_PROMPTS, *tables.DRAFTS, *tables.MORE_OF_DRAFTS)
    schema = {field.name: field for field in fields}
    assert documented == schema.keys() | Manifest.model_fields.keys()
    for name, field in schema.items():
        kind = re.sub(r"list<\w+: (\w+)>", r"list of \1", str(field.type))
        kind = kind.replace("float", "float32").replace("double", "float64")
        assert re.search(rf"^\| `{name}` \| {kind} \|", text, re.MULTILINE), f"{name} is {kind}"


def test_a_manifest_reads_what_it_wrote(uninterrupted: Trace) -> None:
    manifest = read_manifest(uninterrupted.path)
    assert manifest == uninterrupted.manifest
    assert manifest.complete
    assert manifest.command.startswith("bpkit")
    assert manifest.spec.max_block_size == max(SIZES)
    assert manifest.dtype == str(torch.float32).removeprefix("torch.")
