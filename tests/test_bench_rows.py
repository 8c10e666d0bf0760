"""The bench of many rows: figures from runs made by hand, what takes turns with what, and real runs on a tiny pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bpkit.cli.main import build_app
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.judge.wall_clock.bench import BenchSettings, encoded
from bpkit.judge.wall_clock.decoders import LOOP, TRANSFORMERS, EncodedPrompt, plain_loop
from bpkit.judge.wall_clock.rows.bench import choose_rows_threads, dealt, measure_rows, run_rows_bench
from bpkit.judge.wall_clock.rows.decoders import GenerateRows, PolicyRows, RunOutcome, Text, left_padded
from bpkit.judge.wall_clock.rows.figures import RowsFigures, RowsMeasurement
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair

GREEDY = {"max_new_tokens": 12, "temperature": 0.0}


# Figures


def ran(seconds: float, *, steps: int = 5, **texts: Sequence[int]) -> RunOutcome:
    made = {name: Text(tuple(tokens), (2,) if name == "tied" else ()) for name, tokens in texts.items()}
    return RunOutcome(made, seconds, 0.25, 5, steps, 0.5 * seconds, 0.25 * seconds, 0.125 * seconds)


def runs_by_hand() -> list[RowsMeasurement]:
    """Two sets at batch size 4, of 10 and 20 tokens; `fixed:2` says something else in the second."""
    first, second = {"a": range(10)}, {"b": range(8), "tied": range(12)}
    other = {**second, "tied": [0, 1, 2, 9, *range(4, 12)]}
    seconds = {LOOP: (1.0, 2.0), TRANSFORMERS: (2.0, 4.0), "fixed:2": (0.5, 0.5), "fixed:4": (0.25, 2.0)}
    return [
        RowsMeasurement(name, 4, part, 0, ran(spent, **(other if (name, part) == ("fixed:2", 1) else texts)))
        for name, of in seconds.items()
        for part, (spent, texts) in enumerate(zip(of, (first, second), strict=True))
    ]


def test_figures_of_runs_made_by_hand() -> None:
    reference = {"a": Text(tuple(range(10))), "b": Text(tuple(range(8))), "tied": Text(tuple(range(12)), (2,))}
    found = RowsFigures(runs_by_hand(), reference=reference, policies=["fixed:2", "fixed:4"], seed=0).as_json()
    group = found["4"]
    assert (group["runs"], group["best_fixed"]) == (2, "fixed:2")
    assert group["plain"]["tokens_per_second"] == pytest.approx(30 / 3)
    assert group["plain"]["ratio_to_transformers"] == pytest.approx(2)
    assert group["plain"]["ratio_to_transformers_interval"] == pytest.approx([2, 2])  # paired: twice on every run
    entry = group["policies"]["fixed:2"]
    assert (entry["tokens"], entry["ratio_to_plain"]) == (30, pytest.approx(3))
    assert entry["ratio_to_plain_interval"] == pytest.approx([2, 4])
    assert entry["prefill_share"] == pytest.approx(0.5 / 1)
    assert entry["steps_ratio_to_plain"] == pytest.approx((3 - 0.5) / (1 - 0.5))
    assert entry["acceptance_length"] == pytest.approx((9 + 7 + 11) / 10)
    assert entry["share"] == pytest.approx({"target": 0.5, "drafter": 0.25, "policy": 0.125, "other": 0.125})
    assert (entry["texts"], entry["texts_equal"]) == (3, 2)
    assert entry["different_prompts"] == [{"id": "tied", "first_difference": 3, "near_tie": True}]
    assert group["policies"]["fixed:4"]["texts_equal"] == 3


def test_one_run_has_no_interval_and_other_noise_no_equal_texts() -> None:
    runs = [RowsMeasurement(name, 2, 0, 0, ran(1.0, a=[1, 2])) for name in (LOOP, TRANSFORMERS)]
    found = RowsFigures(runs, reference={"a": Text((1, 2))}, policies=[], comparable=False, seed=0).as_json()["2"]
    assert found["plain"]["ratio_to_transformers_interval"] is None
    assert (found["plain"]["texts_equal"], found["transformers"]["texts_equal"]) == (1, None)
    assert found["best_fixed"] is None


# Turns


class Fake:
    """A decoder that writes down its calls."""

    def __init__(self, name: str, log: list[tuple[str, int, int]]) -> None:
        self.name, self.log = name, log

    def run(self, tasks: Sequence[EncodedPrompt], batch_size: int) -> RunOutcome:
        self.log.append((self.name, batch_size, tasks[0].stream_id))
        return ran(1.0, a=[1])


def tasks(count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(Prompt(f"p{i}", "d", "x"), torch.tensor([[1]]), i) for i in range(count)]


def test_decoders_take_turns_on_every_set_at_every_batch_size() -> None:
    log: list[tuple[str, int, int]] = []
    decoders = {size: [Fake(name, log) for name in "abc"] for size in (1, 4)}
    threads = {size: dict.fromkeys("abc", 1) for size in (1, 4)}
    measured = measure_rows(decoders, dealt(tasks(8), 4), repeats=2, seed=3, threads=threads)
    assert [(one.decoder, one.batch_size, one.part) for one in measured] == log
    turns = [log[start : start + 3] for start in range(0, len(log), 3)]
    assert [turn[0][1:] for turn in turns] == [(1, 0), (4, 0), (1, 1), (4, 1)] * 2
    assert all({name for name, _, _ in turn} == set("abc") for turn in turns)
    assert len({tuple(name for name, _, _ in turn) for turn in turns}) > 1


def test_sets_are_two_of_the_largest_batches_or_three_smaller_ones() -> None:
    assert [len(part) for part in dealt(tasks(96), 16)] == [32, 32, 32]
    assert [len(part) for part in dealt(tasks(60), 16)] == [20, 20, 20]
    assert [len(part) for part in dealt(tasks(33), 16)] == [17, 16]
    assert [len(part) for part in dealt(tasks(3), 16)] == [3]
    assert {task.stream_id for part in dealt(tasks(50), 4) for task in part} == set(range(50))


# On a tiny pair


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "d", "Once upon a time " * (1 + i % 3) + str(i)) for i in range(count)]


def decoder_of(pair: TinyPair, policy: str = "fixed:3") -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target, pair.agreeable(0.3), policy, tokenizer=pair.tokenizer)


def test_batches_are_padded_on_the_left() -> None:
    ids, mask = left_padded([torch.tensor([[5, 6, 7]]), torch.tensor([[8]])], pad=1)
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_only_tokens_up_to_the_end_of_each_row_count(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(pair)
    few = encoded(decoder, prompts(5), seed=0)
    config = pair.target.generation_config
    monkeypatch.setattr(config, "eos_token_id", None)
    whole = GenerateRows(TRANSFORMERS, pair.target, GREEDY, 0).run(few, 2)
    assert whole.tokens == 5 * 12
    monkeypatch.setattr(config, "eos_token_id", whole.texts["p0"].tokens[4])
    theirs = GenerateRows(TRANSFORMERS, pair.target, GREEDY, 0).run(few, 2)
    ours = PolicyRows(LOOP, plain_loop(decoder), GREEDY, 0).run(few, 2)
    assert theirs.tokens == ours.tokens < whole.tokens
    assert {name: text.tokens for name, text in theirs.texts.items()} == {
        name: text.tokens for name, text in ours.texts.items()
    }
    assert theirs.row_steps == ours.row_steps == ours.tokens - 5
    assert ours.passes < ours.row_steps
    for outcome in (ours, theirs):
        assert outcome.prefill_seconds is not None
        assert 0 < outcome.prefill_seconds < outcome.seconds
    assert (ours.drafter_seconds, theirs.drafter_seconds) == (0, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_compared_with_those_alone(pair: TinyPair, temperature: float) -> None:
    options = {**GREEDY, "temperature": temperature}
    settings = BenchSettings({"fixed:3": "fixed:3", "bandit": "bandit"}, options, threads=1, repeats=2, seed=5)
    report = run_rows_bench(decoder_of(pair), prompts(5), settings, [2])
    assert list(report["batch_sizes"]) == ["2"]
    assert sorted(id for part in report["settings"]["sets"] for id in part) == [f"p{i}" for i in range(5)]
    for group in report["batch_sizes"].values():
        assert group["runs"] == 4
        for entry in (group["plain"], *group["policies"].values()):
            assert (entry["texts"], entry["texts_equal"]) == (5, 5)
        assert group["transformers"]["texts_equal"] == (5 if temperature == 0 else None)
        assert group["transformers"]["tokens"] == group["plain"]["tokens"] or temperature > 0
        assert group["policies"]["fixed:3"]["acceptance_length"] > 1


def test_threads_are_found_by_trial_at_each_batch_size(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpkit.judge.wall_clock.bench.available_cores", lambda: 2)
    monkeypatch.setattr(
        "bpkit.judge.wall_clock.threads.use_threads", lambda count: None
    )  # they are slow on a busy machine
    options = {**GREEDY, "max_new_tokens": 3}
    settings = BenchSettings({"fixed:2": "fixed:2", "fixed:3": "fixed:3"}, options)
    threads, tried = choose_rows_threads(
        decoder_of(pair), encoded(decoder_of(pair), prompts(2), 0), settings, [1, 2], None
    )
    for size in (1, 2):
        assert tried[size].keys() == {LOOP, TRANSFORMERS, "fixed:2"}
        assert all(counts.keys() <= {1, 2} for counts in tried[size].values())
        best = {name: max(sorted(rates), key=rates.__getitem__) for name, rates in tried[size].items()}
        assert threads[size] == {**best, "fixed:3": best["fixed:2"]}


def test_bench_of_batch_sizes_writes_the_report_and_a_plot(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot, file = tmp_path / "rows.json", tmp_path / "rows.svg", tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i} = "}) + "\n" for i in range(4)), encoding="utf-8")
    arguments = ["--target", str(tiny_folder / "target"), "--drafter", str(tiny_folder / "drafter"), "--threads", "1"]
    arguments += ["--prompts", str(file), "--max-new-tokens", "8", "--batch-size", "2,1", "-p", "fixed:2", "-p", "svip"]
    result = CliRunner().invoke(build_app(), ["bench", *arguments, "--json", str(out), "--plot", str(plot)])
    assert result.exit_code == 0, result.stderr
    for part in ("batch size 1 (4 prompts)", "batch size 2 (4 prompts)", "fixed:2", "svip", "4/4", "Machine:"):
        assert part in result.stdout
    assert plot.read_text(encoding="utf-8").startswith("<?xml")
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["settings"]["batch_sizes"] == [1, 2]
    assert report["machine"]["threads"]["2"][TRANSFORMERS] == 1
    assert len(report["measurements"]) == 2 * 2 * 4  # sets, batch sizes, decoders
    for group in report["batch_sizes"].values():
        assert group["policies"]["fixed:2"]["ratio_to_plain"] > 0
        assert group["best_fixed"] == "fixed:2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-size", "4,x"], "--batch-size 4,x"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--batch-size", "2", "--against", "transformers-dflash"], "one prompt at a time"),
    ],
)
def test_bad_input_is_told_before_any_model_is_loaded(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(build_app(), ["bench", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
