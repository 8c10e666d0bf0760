"""Latency benches: rows and batches, agreement, figures from made-up times, and both commands on small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bpkit_forecast.policy import VECTORS, Forecast, ForecastConfig
from torch import nn
from typer.testing import CliRunner, Result

from bpkit.cli.bench_policy import batch_sizes, chosen
from bpkit.cli.main import build_app
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.judge.latency.backends import ONNXRUNTIME, TORCH, Backends, backends_of, decide, whole_step
from bpkit.judge.latency.measure import agreement, measure_pair
from bpkit.judge.latency.questions import Question, Recorder, batches, mixed
from bpkit.judge.latency.report import sentences
from bpkit.judge.latency.timing import BLOCK, interleave, percentile, ratio
from bpkit.policy import Policy, State
from bpkit.progress import NoProgress
from bpkit.prompts import Prompt
from bpkit.registry.discovery import registry
from bpkit.registry.policy_folder import shipped_folders
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.types import Context, Draft, DraftWork, Feature, Step
from tests.random_rows import random_context, random_draft, random_step

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = [2, 4, 6, 8]
PROMPTS = [Prompt(str(i), "tiny", text) for i, text in enumerate(("abc abc ab", "x = y + 1", "1, 2, 3, 4"))]
CPU = torch.device("cpu")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> SpeculativeDecoder:
    return SpeculativeDecoder.from_pretrained(
        str(tiny_folder / "target"), str(tiny_folder / "drafter"), "fixed:4", device="cpu"
    )


@pytest.fixture(scope="module")
def policy_folder(decoder: SpeculativeDecoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`forecast` with random weights that chooses among its sizes, and truncates."""
    layers, hidden = len(decoder.drafter.feature_layers), decoder.spec.hidden_size
    facts = {
        "block_sizes": SIZES,
        "yields": [1.6, 2.0, 2.2, 2.3],
        "curves": {"steps": [2.0, 2.2, 2.4, 2.6, 2.8], "verify": [1.0 + 0.01 * width for width in range(1, 9)]},
        "outlook": [[0.5, 0.9, 1.2, 1.3], [0.1, 0.1, 0.1, 0.1], [1.0, 2.0, 3.0, 4.0]],
        "inputs": (layers + 2) * hidden,
        "hidden": 8,
        "dropout": 0.1,
    }
    config = ForecastConfig(truncate=True, decision=0.0)
    torch.manual_seed(0)
    networks = Forecast.untrained(config).build(facts)
    for network in networks.values():
        nn.init.normal_(next(network.parameters()))
    folder = tmp_path_factory.mktemp("policies") / "forecast"
    Forecast.trained(config, facts, networks, decoder.spec).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backends(decoder: SpeculativeDecoder, policy_folder: Path) -> Backends:
    return backends_of(str(policy_folder), decoder)


@pytest.fixture(scope="module")
def recorder(decoder: SpeculativeDecoder, backends: Backends) -> Recorder:
    made = Recorder(backends.policies[TORCH], backends.wants)
    under = decoder.with_policy(made)
    for prompt in PROMPTS:
        under.run(prompt.text, max_new_tokens=16, temperature=0.0).finish()
    return made


@pytest.fixture
def run() -> Run:
    """Run the command line in this process."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(build_app(), list(arguments), prog_name="bpkit")

    return invoke


def on(folder: Path) -> list[str]:
    return ["--target", str(folder / "target"), "--drafter", str(folder / "drafter"), "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Options that name a file of short prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompt.text for prompt in PROMPTS), encoding="utf-8")
    return ["--prompts", str(file), "--max-new-tokens", "12"]


# Rows


@pytest.mark.slow
def test_a_recorder_keeps_what_was_asked_and_changes_nothing(
    decoder: SpeculativeDecoder, backends: Backends, recorder: Recorder
) -> None:
    bare = decoder.with_policy(backends.policies[TORCH])
    steps = [bare.run(p.text, max_new_tokens=16, temperature=0.0).finish().steps for p in PROMPTS]
    assert len(recorder.begun) == len(PROMPTS)
    assert len(recorder.steps) == sum(map(len, steps)) == len(recorder.seconds["select"])
    with torch.inference_mode():
        decided = [decide(backends.policies[TORCH], "select", row) for row in recorder.of("select")]
    assert [int(size) for size in decided] == [int(step.block_size) for each in steps for step in each]


@pytest.mark.slow
def test_batches_hold_every_row_once_and_are_filled_from_the_first(recorder: Recorder) -> None:
    rows = recorder.of("select")
    made = batches(rows, 4)
    assert all(batch.begin.batch_size == 4 for batch in made)
    lengths = torch.cat([batch.context.context_length for batch in made if batch.context])
    expected = [int(row.context.context_length) for row in rows if row.context]
    assert lengths[: len(rows)].tolist() == expected
    assert lengths[len(rows) :].tolist() == expected[: len(lengths) - len(rows)]
    assert sorted(map(id, mixed(rows))) == sorted(map(id, rows))
    assert list(map(id, mixed(rows))) == list(map(id, mixed(rows))) != list(map(id, rows))
    [large] = batches(rows[:3], 8)
    assert large.begin.batch_size == 8
    assert large.context is not None
    assert large.context[Feature.LAST_HIDDEN].shape[0] == 8


def test_rows_of_unlike_drafts_become_one_batch_with_padding() -> None:
    random, wants = torch.Generator().manual_seed(0), (Feature.DRAFT_PROBABILITY, Feature.DRAFT_HIDDEN)
    rows = []
    for length in (3, 0, 1):
        context = random_context(1, [Feature.LAST_HIDDEN], random)
        draft = random_draft(context, torch.tensor([length + 1]), [length], wants, random)
        step = random_step(draft, draft.draft_length, 0.1, random)
        rows.append(Question(context, context, draft if length else None, step))
    [batch] = batches(rows, 3)
    assert batch.draft is not None
    assert batch.step is not None
    assert batch.draft.context is batch.context
    assert batch.draft.draft_length.tolist() == batch.step.draft_length.tolist() == [3, 0, 1]
    assert batch.draft.block_size.tolist() == [4, 1, 2]
    assert batch.draft.tokens.shape == (3, 3)
    for name in wants:
        made = batch.draft[name]
        assert made[:, :1].count_nonzero(dim=tuple(range(1, made.ndim))).bool().tolist() == [True, False, True]
        assert not made[2, 1:].any()
        assert rows[0].draft is not None
        assert torch.equal(made[0], rows[0].draft[name][0])
    assert batch.step.seconds.total == pytest.approx(0.3)
    assert batch.step.num_accepted.tolist() == [int(row.step.num_accepted) for row in rows if row.step]


# Backends


@pytest.mark.slow
def test_both_backends_decide_alike(backends: Backends, recorder: Recorder) -> None:
    assert backends.methods == ("select", "truncate", "step")
    assert backends.asks
    for method in (core.method for core in backends.cores.values()):
        with torch.inference_mode():
            made = [batch for size in (1, 8) for batch in batches(recorder.of(method), size)]
            found = agreement(backends, method, made)
        assert found["rows"] == sum(batch.begin.batch_size for batch in made)
        assert found["agree"] + found["near_ties"] == found["rows"]


@pytest.mark.slow
def test_disagreement_is_counted_and_only_near_ties_excuse_it(backends: Backends, recorder: Recorder) -> None:
    class Other(Forecast):
        name = "forecast"

        def select(self, state: State, context: Context) -> torch.Tensor:
            return context.full(99)

    other = Other(ForecastConfig(weights=str(backends.policies[TORCH].folder)))  # type: ignore[attr-defined]
    wrong = Backends("other", {**backends.policies, TORCH: other}, backends.cores)
    with torch.inference_mode():
        found = agreement(wrong, "select", batches(recorder.of("select"), 8))
    assert found["agree"] == 0
    assert found["near_ties"] < found["rows"]


def test_a_policy_without_networks_runs_in_torch_alone(decoder: SpeculativeDecoder) -> None:
    made = backends_of("threshold:0.5", decoder)
    assert set(made.policies) == {TORCH}
    assert "not exportable" in (made.why_not or "")
    assert made.methods == ("select", "extend", "truncate", "step")
    assert made.asks
    assert backends_of("goodput", decoder).methods == ("begin", "select", "observe", "step")


def test_a_step_asks_for_all_that_the_loop_does() -> None:
    asked = []

    class Told(Policy):
        wants = frozenset({Feature.DRAFT_PROBABILITY})

        def select(self, state: State, context: Context) -> torch.Tensor:
            asked.append("select")
            return context.full(4)

        def extend(self, state: State, draft: Draft) -> torch.Tensor:
            asked.append(f"extend {draft.tokens.shape[1]}")
            return draft.draft_length > 0

        def truncate(self, state: State, draft: Draft) -> torch.Tensor:
            asked.append(f"truncate {draft.draft_length.tolist()}")
            return draft.draft_length

        def observe(self, state: State, step: Step) -> None:
            asked.append("observe")

    random = torch.Generator().manual_seed(0)
    context = random_context(2, Told.wants, random)
    draft = random_draft(context, context.full(4), [1, 3], Told.wants, random)
    question = Question(context, context, draft, random_step(draft, draft.draft_length, 0.1, random))
    whole_step(Told(), question)({})
    assert asked == ["select", "truncate [1, 3]", "observe"]
    asked.clear()
    one_by_one = replace(context.spec, work=DraftWork("tokens", "each"))
    context.spec = one_by_one
    whole_step(Told(), question)({})
    assert asked == ["select", "extend 1", "extend 2", "extend 3", "truncate [1, 3]", "observe"]
    whole_step(Told(), replace(question, draft=None))({})
    assert asked[-2:] == ["select", "observe"]


# Figures


def test_calls_are_interleaved_in_blocks_that_take_turns() -> None:
    said: list[str] = []
    asked: list[int] = []

    def a(number: int) -> None:
        said.append("a")
        asked.append(number)

    found = interleave({"a": a, "b": lambda _: said.append("b")}, calls=2 * BLOCK + 1, warm_up=3, device=CPU)
    assert said[:6] == ["a"] * 3 + ["b"] * 3
    blocks = [said[6 + i * BLOCK] for i in range(6)]
    assert blocks == [*"ab", *"ba", *"ab"]
    assert asked[3:] == list(range(3 * BLOCK))
    assert found["a"].shape == found["b"].shape == (3, BLOCK)


def test_a_ratio_compares_neighbouring_blocks() -> None:
    drift = np.array([[1.0], [2.0], [10.0], [3.0]])
    fast = drift * np.full((4, 5), 1000)
    found = ratio(3 * fast, fast)
    assert found["value"] == pytest.approx(3)
    assert found["interval"] == pytest.approx([3, 3])
    assert found["quartiles"] == pytest.approx([3, 3])
    assert found["pairs"] == 4
    assert percentile(np.arange(1001) * 1000, 99) == pytest.approx(990)


def test_the_pair_is_measured_at_its_fastest_size(decoder: SpeculativeDecoder) -> None:
    found = measure_pair(decoder, PROMPTS, 8, None, NoProgress())
    rates = {int(size): rate for size, rate in found["tokens_per_second"].items()}
    assert max(rates) <= decoder.spec.max_block_size
    assert found["block_size"] == max(rates, key=lambda size: rates[size])
    assert found["prefill_ms"]["count"] == len(rates) * len(PROMPTS)
    assert measure_pair(decoder, PROMPTS, 8, 3, NoProgress())["block_size"] == 3
    with pytest.raises(ValueError, match="beyond its first token"):
        measure_pair(decoder, PROMPTS, 1, 3, NoProgress())


# bench policy


@pytest.mark.slow
def test_the_command_writes_every_figure(
    run: Run, tiny_folder: Path, policy_folder: Path, prompts: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "latency.json", tmp_path / "latency.png"
    arguments = ("--calls", "20", "--warm-up", "2", "--batch", "1+8", "--block-size", "4")
    files = ("--json", str(out), "--plot", str(picture))
    result = run("bench", "policy", str(policy_folder), "threshold", *arguments, *files, *on(tiny_folder), *prompts)
    assert result.exit_code == 0, result.stderr
    assert picture.stat().st_size > 1000
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["policies"]) == {str(policy_folder), "threshold"}
    assert report["machine"]["onnxruntime"]
    assert report["settings"]["threads"] == {"decisions": 1, "models": 1}
    methods = report["policies"][str(policy_folder)]["methods"]
    assert list(methods) == ["select", "truncate", "step"]
    for entry in methods.values():
        for backend in (TORCH, ONNXRUNTIME):
            of = entry[backend]
            assert set(of["p50_us"]) == set(of["p99_us"]) == {"1", "8"}
            assert of["calls"] == {"1": 20, "8": 20}
            assert 0 < of["min_us"]["1"] <= of["p50_us"]["1"] <= of["p99_us"]["1"]
            # Of one block each, the median over pairs of blocks is that of the blocks.
            assert of["largest_over_smallest"]["value"] == pytest.approx(of["p50_us"]["8"] / of["p50_us"]["1"])
            assert of["largest_over_smallest"]["of_min"] == pytest.approx(of["min_us"]["8"] / of["min_us"]["1"])
            assert of["share_of_step"] == pytest.approx(of["p50_us"]["1"] / 1e3 / report["pair"]["step_ms"]["p50"])
            assert of["in_loop"]["calls"] > 0
        if entry is not methods["step"]:
            assert entry["agreement"]["agree"] + entry["agreement"]["near_ties"] == entry["agreement"]["rows"]
        assert set(entry["torch_over_onnxruntime"]) == {"1", "8"}
    assert ONNXRUNTIME not in report["policies"]["threshold"]["methods"]["truncate"]
    assert any("threshold: torch only" in sentence for sentence in sentences(report))
    assert list(report["policies"]["threshold"]["methods"]) == ["select", "truncate", "step"]
    for word in ("forecast", "same decisions", "A prefill takes", "8/1"):
        assert word in result.stdout


@pytest.mark.slow
def test_files_of_an_export_are_timed_as_they_are(
    run: Run, decoder: SpeculativeDecoder, tiny_folder: Path, policy_folder: Path, prompts: list[str], tmp_path: Path
) -> None:
    from bpkit.export.write import export_policy
    from bpkit.registry.resolve import resolve_policy

    wants = frozenset({*VECTORS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY})
    tracer = Tracer(decoder, TraceOptions((2, 4, 6, 8), 16, features=wants))
    traces = [tracer.trace(i, prompt) for i, prompt in enumerate(PROMPTS)]
    policy = resolve_policy(str(policy_folder))
    assert isinstance(policy, Forecast)
    exported, out = tmp_path / "exported", tmp_path / "latency.json"
    export_policy(policy, traces, decoder.spec, exported, name="forecast", summary="A policy.")
    arguments = ("--weights", str(policy_folder), "--calls", "20", "--batch", "2", "--block-size", "4")
    result = run("bench", "policy", f"onnx:{exported}", *arguments, "--json", str(out), *on(tiny_folder), *prompts)
    assert result.exit_code == 0, result.stderr
    [entry] = json.loads(out.read_text(encoding="utf-8"))["policies"].values()
    for method in ("select", "truncate"):
        found = entry["methods"][method]["agreement"]
        assert found["agree"] + found["near_ties"] == found["rows"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "1,8"], "such as 1+8+64"),
        (["forcast"], "'forecast'"),
        (["onnx:nowhere"], "nowhere"),
        (["--json", "nowhere/latency.json"], "there is no folder"),
        (["--plot", "latency.txt"], ".png"),
    ],
)
def test_bad_input_is_a_paragraph_and_exit_code_2(run: Run, arguments: list[str], said: str) -> None:
    result = run("bench", "policy", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_policy_that_is_registered_can_be_timed(decoder: SpeculativeDecoder) -> None:
    found = {each.name: each for each in chosen(["goodput"], decoder, "cpu", None, every=True)}
    untrained = {name for name in registry().policies if not shipped_folders(name)} - {"onnx"}
    assert set(found) == untrained, "those that ship were trained for another pair"
    assert all("step" in each.methods for each in found.values())


def test_batch_sizes_and_the_policies_that_ship() -> None:
    assert batch_sizes("64+1+8+8") == (1, 8, 64)
    for wrong in ("", "0+1", "1-8", "a"):
        with pytest.raises(ValueError, match="--batch"):
            batch_sizes(wrong)
    assert {"forecast", "blockpilot"} <= set(filter(shipped_folders, registry().policies))
