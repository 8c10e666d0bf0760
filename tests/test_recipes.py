"""What is not in the wheel: commands of `bpkit --plugin recipes`, and that nothing of bpkit needs them."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from bpkit_mlp.blockpilot import BlockPilot
from torch import nn
from typer.testing import Result

from bpkit.cli.main import build_app
from bpkit.prompts import read_prompts
from bpkit.registry.discovery import choose_plugins, registry
from recipes.fold.measure import TOLERANCE, FoldSettings, bench_fold, weights

ROOT = Path(__file__).parent.parent
Recipe = Callable[..., Result]


@pytest.fixture
def commands() -> dict[str, Any]:
    """Those that the plug-in adds, by name."""
    ours: Any = typer.main.get_command(build_app())
    whole: Any = typer.main.get_command(build_app(["--plugin", "recipes"]))
    assert "recipes" not in registry().failures
    choose_plugins(())
    return {name: command for name, command in whole.commands.items() if name not in ours.commands}


def test_every_command_is_documented_and_every_documented_line_is_one(commands: dict[str, Any]) -> None:
    pages = [
        ROOT / "README.md",
        *(page for folder in ("docs", "recipes", "bpkit") for page in (ROOT / folder).rglob("*.md")),
    ]
    texts = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages]
    texts += [command.help for command in commands.values()]
    lines = [
        shlex.split(line) for text in texts for line in re.findall(r"bpkit --plugin recipes ([a-z][^`\n#]*)", text)
    ]
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert {name for name in commands if f"| `{name}` |" in readme} == commands.keys() == {line[0] for line in lines}
    for name, *rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, name


def test_the_wheel_has_no_recipes_and_bpkit_imports_none() -> None:
    packaging = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert [name for name in (*packaging["packages"], *packaging["package-dir"]) if name.startswith("recipes")] == []
    for file in (*(ROOT / "bpkit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.partition(".")[0] == "recipes"], file


@pytest.fixture
def on(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Options that name the tiny pair, and two prompts of each of three domains."""
    rows = [{"id": f"{d}{i}", "domain": d, "prompt": f"{d} = {i} + 1, {d}"} for d in "abc" for i in (1, 2)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    models = ["--target", str(tiny_folder / "target"), "--drafter", str(tiny_folder / "drafter")]
    return [*models, "--prompts", str(file), "--max-new-tokens", "9"]


def test_reads_of_the_device_are_counted(recipe: Recipe, on: list[str], tmp_path: Path) -> None:
    out = tmp_path / "reads.json"
    result = recipe(
        "bench-reads", *on, "-p", "fixed:4", "-p", "threshold", "-p", "blockpilot", "--limit", 1, "--json", out
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {row["policy"]: (row["mean"], row["most"]) for row in report["rows"]} == {
        "fixed:4": (1, 1),
        "threshold": (2, 2),
    }
    assert all(row["texts_equal"] for row in report["rows"])
    assert [list(policies) for policies in report["left_out"].values()] == [["blockpilot"]]
    assert "cannot serve blockpilot" in result.stdout


def test_prompts_of_drafters_are_what_they_always_were(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from recipes.pair.corpus import training_prompts

    maths = tmp_path / "maths.jsonl"
    maths.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n', encoding="utf-8")
    out = tmp_path / "prompts.jsonl"
    result = recipe("drafter-prompts", "--out", out, "--maths", maths, "--per-domain", 5)
    assert result.exit_code == 0, result.stderr
    found = [prompt.text for prompt in read_prompts(out)]
    assert found == training_prompts(maths, per_domain=5, seed=0)
    assert len(found) == 11


def test_real_prompts_are_of_five_kinds_and_three_splits(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maths = tmp_path / "maths.jsonl"
    maths.write_text('{"question": "What is 1 + 1?"}\n{"question": "What is 2 + 2?"}\n', encoding="utf-8")
    arguments = ("real-prompts", "--out", tmp_path / "real.jsonl", "--maths", maths, "--maths-train", maths)
    refused = recipe(*arguments)
    assert refused.exit_code == 2
    assert "lacks 24 of the 24 questions of split 'train'" in " ".join(refused.stderr.split())
    wanted = {"train": "What is 1 + 1?", "closed": "What is 2 + 2?"}
    digests = {split: [hashlib.sha256(text.encode()).hexdigest()[:16]] for split, text in wanted.items()}
    monkeypatch.setattr("recipes.real.prompts.named_questions", lambda: digests)
    for more, splits in ((), {"train", "validation", "test"}), (("--closed",), {"closed"}):
        result = recipe(*arguments, *more)
        assert result.exit_code == 0, result.stderr
        found = read_prompts(tmp_path / "real.jsonl")
        assert {prompt.split for prompt in found} == splits
        assert {prompt.domain for prompt in found} == {"chat", "maths", "code", "rewriting", "conversion"}
        assert all(prompt.chat for prompt in found)
        assert len({prompt.id for prompt in found}) == len(found)


def group_of(block_size: int, rate: float, policies: dict[str, float]) -> dict[str, Any]:
    """What an evaluation says of a group, as far as the summary reads it."""
    ratio = {"value": 1.0, "interval": [1.0, 1.0]}
    best = {"block_size": block_size, "tokens_per_second": rate, "acceptance_length": 2.0}
    entries = {
        name: {
            "tokens_per_second": speed,
            "tokens_per_second_ratio": ratio,
            "gap_share": {"value": 0.0},
            "tuning": {"chosen": {"discount": 0.9} if name == "goodput" else {}},
        }
        for name, speed in policies.items()
    }
    fixed = {"1": {"tokens_per_second": 10.0}}
    return {"prompts": 2, "best_fixed": best, "fixed": fixed, "policies": entries, "oracle": {}, "bounds": {}}


def test_what_is_called_best_on_a_real_model_is_chosen_on_validation_prompts(recipe: Recipe, tmp_path: Path) -> None:
    def report(name: str, group: dict[str, Any]) -> Path:
        file = tmp_path / f"{name}.json"
        costs = {"measured": {"overall": group, "domains": {}, "learnable": None}}
        file.write_text(json.dumps({"cost_models": costs, "loops": {"overall": 1}, "left_out": {}}), encoding="utf-8")
        return file

    speeds = {"bpkit plain": 10, "fixed:4@ngram": 12, "goodput:discount=0.9@dflash": 15, "fixed:3@dflash": 20}
    rows = [
        {"contestant": name, "prompt": prompt, "tokens": 60, "seconds": 60 / speed}
        for name, speed in speeds.items()
        for prompt in ("a", "b")
    ]
    contestants = {name: {"over_plain": speed / 10} for name, speed in speeds.items()}
    overall = {"prompts": 2, "loops": 1, "contestants": contestants}
    peers = tmp_path / "peers.json"
    settings = {"prompts": ["a", "b"], "seed": 0}
    peers.write_text(json.dumps({"overall": overall, "measurements": rows, "settings": settings}), encoding="utf-8")
    on_test = group_of(3, 99.0, {"threshold": 99.0})
    arguments = ["real-summary", "--json", tmp_path / "real.json", "--peers", peers]
    for name, chosen in (
        ("ngram", group_of(4, 12.0, {"goodput": 11.0})),
        ("dflash", group_of(3, 11.0, {"goodput": 13.0, "threshold": 12.5})),
    ):
        arguments += ["--evaluation", f"{name}={report(f'test-{name}', on_test)}"]
        arguments += ["--selection", f"{name}={report(f'selection-{name}', chosen)}"]
    result = recipe(*arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "real.json").read_text(encoding="utf-8"))["headline"]
    assert (found["best_fixed"], found["best_policy"]) == ("fixed:4@ngram", "goodput:discount=0.9@dflash")
    assert found["best_fixed_speedup"] == 1.2
    assert found["gain_over_best_fixed_percent"] == pytest.approx(25)
    assert found["gain_interval"] == pytest.approx([25, 25])
    assert found["loops_percent"] == 50
    assert found["peers"] == {"bpkit plain": 1.0}
    del contestants["fixed:4@ngram"]
    peers.write_text(json.dumps({"overall": overall, "measurements": rows, "settings": settings}), encoding="utf-8")
    refused = recipe(*arguments)
    assert refused.exit_code == 2
    assert "bench-peers was run without fixed:4@ngram" in " ".join(refused.stderr.split())


def test_the_target_is_trained_as_its_options_say(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    seen: dict[str, Any] = {}
    monkeypatch.setattr("recipes.pair.target.train_target", lambda out, **more: seen.update(out=out, **more))
    result = recipe("train-target", "--out", tmp_path, "--layers", 3, "--minutes", 2, "--devices", 2)
    assert result.exit_code == 0, result.stderr
    assert (seen["out"], seen["layers"], seen["maths"]) == (tmp_path, 3, None)
    run = seen["run"]
    assert (run.max_minutes, run.devices, run.resume, run.batch_size) == (2.0, 2, True, 20)


def test_without_lightning_it_is_said_how_to_get_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = recipe("train-target", "--out", tmp_path)
    assert result.exit_code == 1
    assert "pip install 'block-policy-kit[train]'" in result.stderr


def test_bench_model_compares_replay_with_the_clock(recipe: Recipe, on: list[str], tmp_path: Path) -> None:
    trace, out = tmp_path / "trace", tmp_path / "model.json"
    made = recipe("trace", "--out", trace, *on, "--block-sizes", "2+4")
    assert made.exit_code == 0, made.stderr
    costs = ROOT / "docs" / "benchmarks" / "costs.json"
    result = recipe(
        "bench-model", trace, "--cost", costs, *on[:4], "-p", "fixed:4", "-p", "threshold", "--limit", 1, "--json", out
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["settings"]["prompts"] == ["a1", "b1", "c1"]
    for name in ("fixed:4", "threshold"):
        entry = report["policies"][name]
        ratio = entry["modelled_tokens_per_second"] / entry["measured_tokens_per_second"]
        assert entry["modelled_over_measured"]["value"] == pytest.approx(ratio)
        assert entry["prompts_with_the_same_steps"] == 3
        assert name in result.stdout


def test_bench_trace_reports_against_both_brute_forces(recipe: Recipe, on: list[str], tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    more = ["--block-sizes", "2+4+8", "--positions", "2", "--batch-size", "4"]
    result = recipe("bench-trace", *on, *more, "--json", str(out))
    assert result.exit_code == 0, result.stderr
    for part in ("tracing 6 prompts", "3 generations", "from every position (scaled)", "SCALED from 25.0%", "bounds"):
        assert part in result.stdout
    report = json.loads(out.read_text(encoding="utf-8"))
    for name in ("trace", "together"):
        assert sum(report[name]["parts"].values()) == pytest.approx(1)
    assert report["sampled_share"] == 0.25
    rows = report["measurements"]
    assert [len(row["prompts"]) for row in rows] == [4, 2]
    for name in ("generations", "generations_together", "positions"):
        entry = report[name]
        assert entry["prompts_per_minute"] == pytest.approx(60 * 6 / sum(row["seconds"][name] for row in rows))
        for key in ("ratio", "median_ratio"):
            low, high = entry[f"{key}_interval"]
            assert 0 < low <= entry[key] <= high
    assert report["trace"]["prompts_per_minute"] > report["positions"]["prompts_per_minute"]
    assert report["batch_ratio"] == pytest.approx(report["trace"]["seconds"] / report["together"]["seconds"])
    assert report["generation_bound"] > 1


def test_bench_trace_compares_with_another_checkout(recipe: Recipe, on: list[str], tmp_path: Path) -> None:
    """Here with this one."""
    out, more = tmp_path / "b.json", ["--block-sizes", "2+4", "--positions", "0", "--limit", "2"]
    result = recipe("bench-trace", *on, *more, "--against", tmp_path)
    assert result.exit_code != 0
    assert "there is no bpkit in this folder" in result.stderr
    result = recipe("bench-trace", *on, *more, "--against", Path(__file__).parents[1], "--json", str(out))
    assert result.exit_code == 0, result.stderr
    assert "trace by the other checkout" in result.stdout
    assert "from every position" not in result.stdout
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["trace_ratio"] == pytest.approx(report["earlier"]["seconds"] / report["together"]["seconds"])
    assert 0.2 < report["earlier"]["seconds"] / report["trace"]["seconds"] < 5  # the same, at one prompt


def test_the_fold_decides_the_same_and_says_so(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "fold.json"
    sizes = ("--vocab-size", "600", "--hidden-size", "24", "--width", "32", "--states", "80", "--rounds", "3")
    result = recipe("bench-fold", *sizes, "--json", str(out))
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    decisions = report["decisions"]
    assert decisions["clear_agree"] == decisions["clear"] > 0
    assert decisions["clear"] + decisions["within_tolerance"] == decisions["states"] == 80
    assert decisions["largest_difference"] < TOLERANCE
    assert len(decisions["sizes_chosen"]) > 1
    assert (report["raw"]["calls"], report["folded_cold"]["calls"], report["folded"]["calls"]) == (3, 3, 60)
    assert "Same decision on" in result.stdout


def test_another_fold_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FoldSettings(vocab_size=300, hidden_size=16, width=16, states=64, rounds=2)

    right = BlockPilot.folded

    def wrong(self: BlockPilot, lm_head: nn.Module, **options: Any) -> BlockPilot:
        return right(self, nn.Linear(16, 300, bias=False), **options)

    monkeypatch.setattr(BlockPilot, "folded", wrong)
    decisions = bench_fold(settings)["decisions"]
    assert decisions["clear_agree"] < decisions["clear"]
    assert decisions["largest_difference"] > TOLERANCE


def test_weights_are_counted() -> None:
    found = weights(FoldSettings(vocab_size=100, hidden_size=10, width=4))
    assert (found["raw"], found["folded"]) == (400 + 16 + 20, 40 + 16 + 20)


def test_bench_rows_sums_up_both_drafters_and_figures_of_other_commands(
    recipe: Recipe, on: list[str], tmp_path: Path
) -> None:
    out, costs, traced = tmp_path / "rows.json", tmp_path / "costs.json", tmp_path / "traced.json"
    costs.write_text(json.dumps({"measured": {"held_out": {"mean_error": 0.0625}}}), encoding="utf-8")
    traced.write_text(json.dumps({"trace_ratio": 3}), encoding="utf-8")
    given = ["bench-rows", *on, "--threads", 1, "-p", "fixed:2", "-p", "svip", "--limit", 1]
    result = recipe(*given, "--batch-size", "8,16", "--cost-table", costs, "--trace-bench", traced, "--json", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    head, by_drafter = report["headline"], report["reports"]
    assert {name: list(of["batch_sizes"]) for name, of in by_drafter.items()} == {
        "block-diffusion": ["8", "16"],
        "ngram": ["8"],
    }
    # Of plain decoding and two policies at two sizes, and of plain decoding and the fixed size with n-gram drafts.
    assert head["texts"] == head["texts_equal"] == 3 * (3 * 2 + 2)
    assert (head["cost_error_percent"], head["trace_ratio"]) == (6.25, 3)
    for name, drafter in (("speedup_at_8", "block-diffusion"), ("speedup_at_8_ngram", "ngram")):
        policies = by_drafter[drafter]["batch_sizes"]["8"]["policies"]
        assert head[name] == max(entry["ratio_to_plain"] for entry in policies.values())
        assert head[name] == policies[head[f"{name}_by"]]["ratio_to_plain"]
    plain = by_drafter["block-diffusion"]["batch_sizes"]["16"]["plain"]
    assert head["plain_ratio_to_transformers_at_16"] == plain["ratio_to_transformers"]
    free, policies = (
        report["drafts_for_free"]["block-diffusion"]["8"],
        by_drafter["block-diffusion"]["batch_sizes"]["8"],
    )
    assert all(ratio > policies["policies"][name]["ratio_to_plain"] for name, ratio in free.items())
    assert "headline" in result.stdout

    traced.write_text("{}", encoding="utf-8")
    for more, said in (
        (["--trace-bench", traced], "traced.json has no number at trace_ratio"),
        (["--batch-size", "1,8"], "the headline needs 8 and 16"),
    ):
        refused = recipe(*given, *more)
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_gains_over_single_sources_and_rules_are_paired_over_prompts(recipe: Recipe, tmp_path: Path) -> None:
    def written(name: str, content: Any) -> Path:
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / f"{name}.json"

    speeds = {"portfolio": 15.0, "fixed:6": 12.0, "fixed:3,source=1": 11.0, "priority": 14.0}
    rows = [
        {"contestant": name, "prompt": prompt, "tokens": 60 * more, "seconds": 60 * more / speed}
        for name, speed in speeds.items()
        for prompt, more in (("a", 1), ("b", 2))
    ]
    entries = {
        name: {"speedup": speed / 10, "speedup_interval": [1, 2], "acceptance_length": 2.0, "identical_text": True}
        for name, speed in speeds.items()
    }
    group = {"prompts": 2, "loops": 0, "policies": entries}
    about = {"machine": {}, "settings": {"seed": 0}, "measurements": rows}
    live = written("live", {"overall": group, "domains": {"chat": group}, **about})
    best = {**group_of(6, 12.0, {"portfolio": 15.0}), "oracle": {}}
    best["best_fixed"]["source"] = "a store"
    costs = {"measured": {"overall": best, "domains": {}}}
    replay = written(
        "replay", {"cost_models": costs, "settings": {"sources": [{"drafter": "a store"}, {"drafter": "b"}]}}
    )
    passes = written("last_pass", {"headline": {"jacobi_passes_ratio": 3.5}})
    arguments = ["sources-summary", "--json", tmp_path / "sources.json", "--last-pass", passes]
    arguments += ["--live", f"pair={live}", "--replay", f"pair={replay}"]
    arguments += ["--single", "pair=fixed:6", "--single", "pair=fixed:3,source=1", "--rule", "pair=priority"]
    result = recipe(*arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "sources.json").read_text(encoding="utf-8"))
    headline = found["headline"]
    assert found["pairs"]["pair"]["best_single"] == "fixed:6"
    assert headline["gain_over_best_single_percent"]["value"] == pytest.approx(25)
    assert headline["gain_over_best_single_percent"]["interval"] == pytest.approx([25, 25])
    assert headline["gain_over_fixed_rules_percent"]["priority"]["value"] == pytest.approx(100 / 14)
    assert headline["least_over_plain_in_any_kind"] == 1.5
    assert headline["jacobi_passes_ratio"] == 3.5
    refused = recipe(*arguments, "--rule", "pair=other")
    assert refused.exit_code == 2
    assert "bpkit bench was run without other" in " ".join(refused.stderr.split())
