"""The bench: figures from rows made by hand, order of runs, prompts, and a real run on a tiny pair."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bpkit.assets import shipped
from bpkit.cli.main import build_app
from bpkit.cli.options import named_policies
from bpkit.config import Config
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.files import write_json
from bpkit.judge.loops import ends_in_loop
from bpkit.judge.statistics import RESAMPLES, resample
from bpkit.judge.wall_clock.bench import BenchSettings, measure, rated, run_bench
from bpkit.judge.wall_clock.decoders import LOOP, TRANSFORMERS, EncodedPrompt, Measurement, Outcome
from bpkit.judge.wall_clock.figures import BenchFigures, differences
from bpkit.judge.wall_clock.threads import best_counts, candidate_counts, try_thread_counts
from bpkit.prompts import KINDS, Prompt, choose_prompts, read_prompts
from bpkit.trace.cost import CostTable, read_cost

ROLES: dict[str, Any] = {
    "plain": (LOOP, TRANSFORMERS),
    "policies": ("fixed:2", "fixed:4", "other"),
    "against": ("peer",),
}


def outcome(tokens: Iterable[int], seconds: float, steps: int, **more: Any) -> Outcome:
    return Outcome(
        tokens=tuple(tokens),
        seconds=seconds,
        steps=steps,
        target_seconds=more.pop("target", 0.5 * seconds),
        drafter_seconds=more.pop("drafter", 0.25 * seconds),
        policy_seconds=more.pop("policy", 0.125 * seconds),
        **more,
    )


LOOPING = [5] * 64


def rows_by_hand() -> list[Measurement]:
    """Two prompts of domain `a` (one loops) and one of `b`; 11, 64 and 21 tokens; times chosen for round figures."""
    texts = {"a1": list(range(11)), "a2": LOOPING, "b1": list(range(21))}
    seconds = {  # decoder -> seconds of each prompt
        LOOP: [1.0, 4.0, 2.0],
        TRANSFORMERS: [2.0, 8.0, 4.0],
        "fixed:2": [1.0, 2.0, 1.0],
        "fixed:4": [2.0, 1.0, 0.5],
        "other": [1.0, 4.0, 2.0],
        "peer": [4.0, 4.0, 4.0],
    }
    rows = []
    for name, times in seconds.items():
        for (prompt, tokens), spent in zip(texts.items(), times, strict=True):
            plain = name in (LOOP, TRANSFORMERS)
            steps = len(tokens) - 1 if plain else 5
            said = [*tokens[:7], 99, *tokens[8:]] if (name, prompt) == ("other", "b1") else tokens
            ties = (3,) if (name, prompt) == (LOOP, "b1") else ()
            made = outcome(said, spent, steps, near_ties=ties, fallbacks=1 if name == "other" else 0)
            rows.append(Measurement(name, prompt, prompt[0], 0, made))
    return rows


def test_figures_of_rows_made_by_hand() -> None:
    report = BenchFigures(rows_by_hand(), **ROLES, seed=0).as_json()
    overall = report["overall"]
    assert (overall["prompts"], overall["loops"]) == (3, 1)
    assert overall["plain"]["source"] == LOOP
    assert overall["plain"]["tokens_per_second"] == pytest.approx(96 / 7)
    assert overall["plain"]["others"][0]["tokens_per_second"] == pytest.approx(96 / 14)
    entry = overall["policies"]["fixed:2"]
    assert entry["tokens_per_second"] == pytest.approx(96 / 4)
    assert entry["speedup"] == pytest.approx(7 / 4)
    assert entry["acceptance_length"] == pytest.approx((10 + 63 + 20) / 15)
    assert entry["acceptance_length_per_prompt"] == pytest.approx((10 / 5 + 63 / 5 + 20 / 5) / 3)
    assert entry["share"] == pytest.approx({"target": 0.5, "drafter": 0.25, "policy": 0.125, "other": 0.125})
    assert entry["identical_text"] is True
    assert overall["against"]["peer"]["speedup"] == pytest.approx(7 / 12)


def test_the_best_fixed_size_is_told_for_each_group() -> None:
    report = BenchFigures(rows_by_hand(), **ROLES, seed=0).as_json()
    assert report["overall"]["best_fixed"] == "fixed:4"
    assert report["domains"]["b"]["best_fixed"] == "fixed:4"
    assert report["without_loops"]["domains"]["a"]["best_fixed"] == "fixed:2"


def test_prompts_whose_plain_output_loops_are_left_out_below() -> None:
    rest = BenchFigures(rows_by_hand(), **ROLES, seed=0).as_json()["without_loops"]
    assert (rest["overall"]["prompts"], rest["overall"]["loops"]) == (2, 0)
    assert rest["overall"]["policies"]["fixed:4"]["speedup"] == pytest.approx(3 / 2.5)
    only_loops = [row for row in rows_by_hand() if row.prompt == "a2"]
    assert BenchFigures(only_loops, **ROLES, seed=0).as_json()["without_loops"] == {
        "overall": None,
        "domains": {"a": None},
    }


def test_another_text_is_told_by_prompt_place_and_near_tie() -> None:
    entry = BenchFigures(rows_by_hand(), **ROLES, seed=0).as_json()["overall"]["policies"]["other"]
    assert entry["identical_text"] is False
    assert entry["different_prompts"] == [{"id": "b1", "first_difference": 7, "near_tie": True}]
    assert entry["fallbacks"] == 3
    plain = {"p": [outcome([1, 2, 3], 1.0, 2, near_ties=(2,))]}
    found = differences({"p": [outcome([1, 9, 3], 1.0, 2)]}, plain, plain)
    assert found == [{"id": "p", "first_difference": 1, "near_tie": False}]


def test_intervals_are_paired_over_prompts() -> None:
    overall = BenchFigures(rows_by_hand(), **ROLES, seed=0).as_json()["overall"]
    # Twice as slow on every prompt: the ratio is the same in every resample, although the rates are not.
    assert overall["plain"]["others"][0]["tokens_per_second_interval"][0] < 80 / 14
    always = BenchFigures(
        [row for row in rows_by_hand() if row.decoder in (LOOP, TRANSFORMERS, "other")],
        plain=(LOOP, TRANSFORMERS),
        policies=("other",),
        seed=0,
    ).as_json()
    assert always["overall"]["policies"]["other"]["speedup_interval"] == pytest.approx([1.0, 1.0])
    low, high = overall["policies"]["fixed:4"]["speedup_interval"]
    assert low == pytest.approx(0.5)  # three times the first prompt
    assert high == pytest.approx(4.0)
    assert resample(3, 0).shape == (RESAMPLES, 3)
    assert (resample(3, 0) == resample(3, 0)).all()


def test_repeats_are_summed_and_each_is_compared() -> None:
    rows = [Measurement(LOOP, "p", "d", r, outcome([1, 2], 1.0, 1)) for r in range(2)]
    rows += [Measurement("x", "p", "d", r, outcome([1, 2 + r], 0.5, 1)) for r in range(2)]
    entry = BenchFigures(rows, plain=(LOOP,), policies=("x",), seed=0).as_json()["overall"]["policies"]["x"]
    assert (entry["tokens"], entry["speedup"]) == (4, pytest.approx(2.0))
    assert [d["id"] for d in entry["different_prompts"]] == ["p"]


def test_peers_are_not_compared_when_sampling_and_shares_may_be_unknown() -> None:
    rows = [Measurement(LOOP, "p", "d", 0, outcome([1, 2], 1.0, 1))]
    rows += [Measurement("peer", "p", "d", 0, outcome([1, 3], 1.0, 0, target=None))]
    found = BenchFigures(rows, plain=(LOOP,), policies=(), against=("peer",), comparable=False, seed=0).as_json()
    group = found["overall"]
    assert group["against"]["peer"]["identical_text"] is None
    assert group["against"]["peer"]["share"] is None
    assert group["against"]["peer"]["acceptance_length"] is None
    assert group["best_fixed"] is None


def test_loops_are_repetitions_of_the_last_64_tokens() -> None:
    assert ends_in_loop([9, 9, *range(32)] + list(range(32)) * 2)
    assert not ends_in_loop(list(range(33)) * 4)  # a period of 33
    assert not ends_in_loop([5] * 63)
    assert not ends_in_loop([5] * 63 + [6])


# Runs


class Fake:
    """A decoder that writes down its calls and takes as long as it is told."""

    def __init__(self, name: str, log: list[tuple[str, int]], seconds: dict[int, float] | None = None) -> None:
        self.name, self.log, self.seconds = name, log, seconds or {}

    def run(self, ids: torch.Tensor, stream_id: int) -> Outcome:
        self.log.append((self.name, stream_id))
        return outcome([1, 2], self.seconds.get(torch.get_num_threads(), 1.0), 1)


def tasks(count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(Prompt(f"p{i}", "d", "x"), torch.tensor([[1]]), i) for i in range(count)]


def test_runs_are_interleaved_in_an_order_that_the_seed_fixes() -> None:
    orders = []
    for seed in (0, 0, 1):
        log: list[tuple[str, int]] = []
        rows = measure([Fake(n, log) for n in "abc"], tasks(6), repeats=2, seed=seed, threads={})
        assert [(r.decoder, int(r.prompt[1])) for r in rows] == log
        for turn in range(12):  # every decoder once before the next prompt comes
            part = log[3 * turn : 3 * turn + 3]
            assert {name for name, _ in part} == set("abc")
            assert {prompt for _, prompt in part} == {turn % 6}
        orders.append(log)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_each_decoder_runs_with_its_own_threads() -> None:
    usual = torch.get_num_threads()
    rows = measure([Fake("a", [], {1: 7.0, 2: 8.0})], tasks(1), repeats=1, seed=0, threads={"a": 2})
    assert rows[0].outcome.seconds == 8.0
    assert torch.get_num_threads() == usual


def test_thread_counts_are_chosen_for_each_and_hopeless_ones_are_dropped() -> None:
    log: list[tuple[str, int]] = []
    fakes = [Fake("a", log, {1: 1.0, 2: 0.6}), Fake("b", log, {1: 1.0, 2: 50.0})]
    table = try_thread_counts({fake.name: partial(rated, fake) for fake in fakes}, tasks(2), [1, 2])
    assert best_counts(table) == {"a": 2, "b": 1}
    assert list(table["b"]) == [1]
    assert len(log) == 4 + 2 * 3  # after the first round, `b` runs with one thread only
    assert best_counts({"tie": {2: 1.0, 1: 1.0}}) == {"tie": 1}
    assert candidate_counts(1) == [1]
    assert candidate_counts(24) == [1, 2, 3, 4, 8, 16, 24]


# Prompts


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "id": 7, "domain": "x", "more": 1}\n', encoding="utf-8")
    assert read_prompts(file) == [Prompt("line-1", "prompts", "a"), Prompt("7", "x", "b")]
    assert [p.text for p in choose_prompts(file, ["x"], None)] == ["b"]
    with pytest.raises(ValueError, match=r"no prompts of domain 'y'; it has: prompts, x"):
        choose_prompts(file, ["y"], None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\nnot json', "line 2: not valid JSON"),
        ('{"promt": "a"}', "line 1: needs a 'prompt'"),
        ('{"prompt": ""}', "line 1: needs a 'prompt'"),
        ('["a"]', "line 1: needs a 'prompt'"),
        ('{"prompt": "a", "domain": ["x"]}', "'domain' must be a text"),
        ('{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": 1}', "id '1' stands on 2 lines"),
        ("\n", "holds no prompts"),
    ],
)
def test_a_bad_line_names_file_line_and_fix(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"p\.jsonl") as caught:
        read_prompts(file)
    assert said in str(caught.value)


def test_shipped_prompts_have_a_limit_for_each_domain() -> None:
    assert len(choose_prompts(None, (), None)) == 60
    assert [p.domain for p in choose_prompts(None, ["code"], 2)] == ["code", "code"]
    with pytest.raises(ValueError, match="there is no domain 'prose'"):
        choose_prompts(None, ["prose"], 2)


def test_policies_are_named_as_typed() -> None:
    assert list(named_policies(["fixed:4", "bandit"], Config(policy="svip"))) == ["fixed:4", "bandit"]
    assert named_policies([], Config(policy={"name": "fixed", "block_size": 2})) == {
        "fixed:block_size=2": {"name": "fixed", "block_size": 2}
    }
    assert named_policies([], Config()) == {}
    with pytest.raises(ValueError, match="more than once"):
        named_policies(["fixed:4", "fixed:4"], Config())


# Everything, on a tiny pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bpkit.testing import tiny_pair

    folder = tmp_path_factory.mktemp("pair")
    tiny_pair(folder)
    return folder


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = [{"prompt": text, "domain": d} for text, d in (("x = 1", "code"), ("y", "code"), ("Once", "prose"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


ENTRY = {
    "tokens_per_second",
    "tokens_per_second_interval",
    "speedup",
    "speedup_interval",
    "acceptance_length",
    "acceptance_length_per_prompt",
    "identical_text",
    "different_prompts",
    "share",
    "fallbacks",
    "near_ties",
}


def test_bench_writes_the_report_and_a_plot(pair: Path, prompt_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    arguments = ["--target", str(pair / "target"), "--drafter", str(pair / "drafter"), "--threads", "1"]
    arguments += ["--prompts", str(prompt_file), "--max-new-tokens", "16", "--against", "transformers-dflash"]
    arguments += ["--policy", "fixed:4", "--policy", "fixed:8", "--policy", "threshold:0.1", "--policy", "bandit"]
    result = CliRunner().invoke(build_app(), ["bench", *arguments, "--json", str(out), "--plot", str(plot)])
    assert result.exit_code == 0, result.stderr
    for part in ("overall (3 prompts", "code (2 prompts", "prose (1 prompt", "plain (", "Machine:", "3,", "fixed:8"):
        assert part in result.stdout
    assert plot.read_text(encoding="utf-8").startswith("<?xml")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["machine"]["threads"][LOOP] == 1
    assert {"cpu", "torch", "transformers", "bpkit"} <= report["machine"].keys()
    assert sorted(report["settings"]["prompts"]) == ["line-1", "line-2", "line-3"]
    assert len(report["measurements"]) == 3 * (2 + 4 + 1)
    for group in (report["overall"], *report["domains"].values(), report["without_loops"]["overall"]):
        assert group["plain"]["tokens_per_second"] > 0
        assert {group["plain"]["source"], group["plain"]["others"][0]["source"]} == {LOOP, TRANSFORMERS}
        assert set(group["policies"]) == {"fixed:4", "fixed:8", "threshold:0.1", "bandit"}
        for entry in (*group["policies"].values(), group["against"]["transformers-dflash"]):
            assert entry.keys() >= ENTRY
            assert entry["identical_text"] is True
            assert entry["different_prompts"] == []
            assert sum(entry["share"].values()) == pytest.approx(1)
            assert min(entry["share"].values()) >= 0


def test_sampling_compares_with_plain_sampling_of_the_same_seed(pair: Path, prompt_file: Path) -> None:
    decoder = SpeculativeDecoder.from_pretrained(str(pair / "target"), str(pair / "drafter"), device="cpu")
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    settings = BenchSettings({"fixed:4": "fixed:4", "threshold": "threshold"}, options, threads=1, repeats=2, seed=5)
    report = run_bench(decoder, read_prompts(prompt_file), settings)
    plain = report["overall"]["plain"]
    assert (plain["source"], plain["others"]) == (LOOP, [])
    assert all(entry["identical_text"] for entry in report["overall"]["policies"].values())
    assert {row["repeat"] for row in report["measurements"]} == {0, 1}


def test_threads_are_found_by_trial_when_left_to_the_bench(
    pair: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpkit.judge.wall_clock.bench.available_cores", lambda: 2)
    decoder = SpeculativeDecoder.from_pretrained(str(pair / "target"), "ngram", device="cpu")
    settings = BenchSettings({"fixed:4": "fixed:4"}, {"max_new_tokens": 4, "temperature": 0.0})
    machine = run_bench(decoder, read_prompts(prompt_file)[:1], settings)["machine"]
    assert machine["threads"].keys() == machine["threads_tried"].keys() == {LOOP, TRANSFORMERS, "fixed:4"}
    for name, count in machine["threads"].items():
        assert count in machine["threads_tried"][name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "fixed:4", "--policy", "fixd"], "'fixed'"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--json", "no/such/folder/b.json"], "no folder"),
        (["--plot", "b.bmp"], ".png or .svg"),
        (["--domain", "prose"], "there is no domain 'prose'"),
    ],
)
def test_bad_input_is_told_before_any_model_is_loaded(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(build_app(), ["bench", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_policies_have_drafters_of_their_own(pair: Path, prompt_file: Path, tmp_path: Path) -> None:
    """In one process and in turn with the others; costs are those of the same drafter alone."""
    out, cost = tmp_path / "bench.json", tmp_path / "cost.json"
    write_json(cost, CostTable(draft={32: 0.1}, verify={1: 1.0, 64: 2.0}, rest=0.1))
    drafter = f"block-diffusion:path={pair / 'drafter'}"
    arguments = ["--target", str(pair / "target"), "--drafter", f"{drafter},branches=3", "--threads", "1"]
    arguments += ["--prompts", str(prompt_file), "--max-new-tokens", "8", "--cost", str(cost), "--json", str(out)]
    policies = ["fixed:9", f"fixed:9@{drafter}", f"goodput@{drafter}", "fixed:4@ngram"]
    policies = [part for name in policies for part in ("--policy", name)]
    result = CliRunner().invoke(build_app(), ["bench", *arguments, *policies])
    assert result.exit_code == 0, result.stderr
    entries = json.loads(out.read_text(encoding="utf-8"))["overall"]["policies"]
    assert list(entries) == policies[1::2]
    assert all(entry["identical_text"] for entry in entries.values())
    tree, chain, *_ = (entry["acceptance_length"] for entry in entries.values())
    assert tree >= chain

    decoder = SpeculativeDecoder.from_pretrained(str(pair / "target"), str(pair / "drafter"), cost=read_cost(str(cost)))
    named = {"a": "fixed:4", "b": "fixed:4", "c": "fixed:4"}
    drafters = {"b": f"{drafter},branches=2", "c": "ngram"}
    made = BenchSettings(named, {}, drafters=drafters).under_policies(decoder)
    assert [one.spec.branches for one in made.values()] == [1, 2, 1]
    assert [one.cost is not None for one in made.values()] == [True, True, False]
    with pytest.raises(ValueError, match="given more than once"):
        named_policies(["fixed:4@ngram", "fixed:4@ngram"], Config(), {"fixed:4@ngram": "fixed:4"})


def test_default_policies_that_the_drafter_cannot_serve_are_left_out(pair: Path, prompt_file: Path) -> None:
    arguments = [
        "--target",
        str(pair / "target"),
        "--drafter",
        "ngram",
        "--prompts",
        str(prompt_file),
        "--threads",
        "1",
    ]
    result = CliRunner().invoke(build_app(), ["bench", *arguments, "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.stderr
    assert "Left out: policy Threshold wants draft_probability" in result.stderr
    assert "bandit" in result.stdout
    assert CliRunner().invoke(build_app(), ["bench", *arguments, "--policy", "threshold"]).exit_code == 2


def test_a_peer_that_does_not_fit_the_drafter_is_refused(pair: Path, prompt_file: Path) -> None:
    arguments = ["--target", str(pair / "target"), "--drafter", "ngram", "--prompts", str(prompt_file)]
    for peer, said in (("transformers-dflash", "block-diffusion drafters only"), ("vllm", "transformers-dflash")):
        result = CliRunner().invoke(build_app(), ["bench", *arguments, "--against", peer])
        assert result.exit_code == 2
        assert said in result.stderr


def test_the_instructions_that_ship_leave_the_second_test_closed() -> None:
    found = choose_prompts(Path("instructions"), (), None, shipped_limit=None)
    assert all(prompt.chat for prompt in found)
    assert {prompt.split for prompt in found} <= {"train", "validation", "test", "demo"}
    assert list(dict.fromkeys(prompt.domain for prompt in found)) == list(KINDS)
    closed = [
        prompt
        for kind in KINDS
        for prompt in read_prompts(shipped("prompts") / "instructions" / f"{kind}.jsonl")
        if prompt.split == "closed"
    ]
    assert len(closed) == 48
    assert not {prompt.text for prompt in closed} & {prompt.text for prompt in found}


def test_demo_streams_and_compares(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpkit.cli.demo.MEASURED_TOKENS", 12)
    arguments = ["--target", str(pair / "target"), "--drafter", str(pair / "drafter"), "--threads", "1", "--limit", "1"]
    result = CliRunner().invoke(build_app(), ["demo", *arguments])
    assert result.exit_code == 0, result.stderr
    for part in (
        "maths (",
        "code (",
        "structured (",
        "overall (3 prompts",
        "bandit",
        "The text was the same every time",
    ):
        assert part in result.stdout
