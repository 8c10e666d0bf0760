"""A policy that is one small file runs in every command, with options from the command line or a config."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bpkit.cli.main import build_app
from bpkit.cli.train_policy import with_config
from bpkit.config import Config
from bpkit.policy import Policy, PolicyError
from bpkit.registry.class_file import class_of_file
from bpkit.registry.resolve import parse_spec, resolve_policy, spec_of
from bpkit.trace.cost import CostTable, write_cost

MY_POLICY = """\
from torch import nn
from bpkit.learn import LearnedConfig, LearnedPolicy

class MyPolicy(LearnedPolicy):
    class Config(LearnedConfig):
        width: int = 64
    wants = frozenset({"last_hidden", "anchor_entropy"})
    def network(self, inputs, outputs):
        width = self.config.width
        return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))
"""
CAUTIOUS = """\
from bpkit import Policy
class Cautious(Policy):
    class Config(Policy.Config): most: int = 16
    wants = frozenset()
    def begin(self, context):
        return {"size": context.full(self.config.most)}
    def select(self, state, context):
        return state["size"]
    def observe(self, state, step):
        state["size"] = (step.acceptance_length + 2).clamp(max=self.config.most)
"""
RULE = """\
import torch
from torch import nn
from bpkit import Policy
from bpkit.export.core import Core, Export, Port

class Rule(nn.Module):
    def forward(self, anchor_entropy):
        return torch.where(anchor_entropy < 1.0, 8, 2), (anchor_entropy - 1.0).abs()

class Calm(Policy):
    wants = frozenset({"anchor_entropy"})

    def select(self, state, context):
        return Rule()(context["anchor_entropy"])[0]

    def export(self):
        entropy = Port("anchor_entropy", ("batch",), "float32", "entropy at the anchor, in nats")
        size = Port("block_size", ("batch",), "int64", "positions to draft")
        margin = Port("margin", ("batch",), "float32", "how far the entropy is from 1")
        return Export({"policy": Core("select", Rule(), (entropy,), (size, margin))}, [1, 2, 8])
"""
PROMPT = "id,name,score\n1,Ada,90\n2,Bo,91\n"
MINE = "./my_policy.py:MyPolicy"


@pytest.fixture(autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves `sys.path` as it was."""
    before = list(sys.path)
    yield
    sys.path[:] = before


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), [*map(str, arguments)])


def done(*arguments: object) -> Any:
    """The result of a command that must end well."""
    result = run(*arguments)
    assert result.exit_code == 0, f"{arguments}: {result.output}"
    return result


def refused(*arguments: object) -> str:
    """What a command says that must refuse its input, as one line."""
    result = run(*arguments)
    assert result.exit_code == 2, f"{arguments}: {result.output}"
    return " ".join(str(result.stderr).split())


@pytest.mark.parametrize("text", [MY_POLICY, CAUTIOUS])
def test_the_files_have_ten_lines_at_most(text: str) -> None:
    assert len(text.splitlines()) <= 10


# Naming classes in files


def test_a_spec_of_a_file_splits_into_class_and_options() -> None:
    assert parse_spec("./a.py:Mine:runs/mine,width=3") == {"name": "./a.py:Mine", "": "runs/mine", "width": "3"}
    assert parse_spec("./a.py:runs/mine,width=3") == {"name": "./a.py", "": "runs/mine", "width": "3"}
    assert parse_spec("a.py:width=3") == {"name": "a.py", "width": "3"}
    assert parse_spec("a.py") == {"name": "a.py"}
    assert parse_spec("onnx:path=b.py") == {"name": "onnx", "path": "b.py"}


def test_a_file_with_one_class_needs_no_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CAUTIOUS, encoding="utf-8")
    assert repr(resolve_policy(f"{file}:most=8")) == "Cautious(most=8)"
    assert repr(resolve_policy({"name": str(file), "most": 4})) == "Cautious(most=4)"
    file.write_text(CAUTIOUS + "class Bold(Cautious):\n    pass\n", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"has several policy classes: name one.*mine.py:Cautious \(Cautious, Bold\)"):
        resolve_policy(str(file))
    assert repr(resolve_policy(f"{file}:Bold")) == "Bold(most=16)"
    file.write_text("from bpkit import Policy\n", encoding="utf-8")
    with pytest.raises(PolicyError, match="has no policy class: define one"):
        resolve_policy(str(file))


def test_a_class_may_be_imported_from_a_module_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "beside_the_file.py").write_text(CAUTIOUS, encoding="utf-8")
    file = tmp_path / "mine.py"
    file.write_text("from bpkit import Policy\nfrom beside_the_file import Cautious\n", encoding="utf-8")
    assert repr(resolve_policy(f"{file}:Cautious:8")) == "Cautious(most=8)"
    assert repr(resolve_policy(str(file))) == "Cautious(most=16)"
    file.write_text("from .beside_the_file import Cautious\n", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"relative import.*by its bare name, as in `import helpers`"):
        resolve_policy(str(file))


def test_files_of_one_name_lead_back_to_themselves(tmp_path: Path) -> None:
    kinds = []
    for folder, size in (("one", 3), ("two", 5)):
        file = tmp_path / folder / "mine.py"
        file.parent.mkdir()
        file.write_text(CAUTIOUS.replace("16", str(size)), encoding="utf-8")
        kinds.append(class_of_file(f"{file}:Cautious", Policy))
    assert [repr(kind()) for kind in kinds] == ["Cautious(most=3)", "Cautious(most=5)"]
    assert [Path(spec_of(kind).partition(":")[0]).parent.name for kind in kinds] == ["one", "two"]


def test_a_config_gives_options_to_train_with_but_no_weights() -> None:
    mine = Config(policy={"name": "./a.py:Mine", "width": 32, "weights": "runs/mine"})
    assert with_config("./a.py:Mine", mine) == {"name": "./a.py:Mine", "width": 32}
    assert with_config("./a.py:Mine:width=8", mine) == {"name": "./a.py:Mine", "width": "8"}
    assert with_config("./b.py:Mine", mine) == "./b.py:Mine"
    assert with_config("ldlp:width=8", Config(policy="ldlp:normalise=standard")) == {
        "name": "ldlp",
        "normalise": "standard",
        "width": "8",
    }


# Every command, with the pair that ships


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files, a trace of twelve prompts, costs and a trained policy; commands run in it."""
    folder = tmp_path_factory.mktemp("one_file")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, text in (("my_policy", MY_POLICY), ("cautious", CAUTIOUS), ("calm", RULE)):
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
        costs = CostTable(
            draft={size: 0.0011 + 0.00004 * size for size in range(2, 17)},
            verify={width: 0.0042 + 0.0003 * width for width in range(1, 17)},
            name="made up",
        )
        write_cost(costs, folder / "cost.json")
        features = ("--features", "last_hidden", "--features", "anchor_entropy")
        sizes = ("--block-sizes", "2-16", "--max-new-tokens", 16, "--limit", 4)
        done("trace", "--out", "TRACE", *sizes, *features)
        trained = ("--out", "runs/mine", "--cost", "cost.json", "--epochs", 2)
        result = done("train", f"{MINE}:width=32", "TRACE", *trained)
        assert f"use it with --policy {MINE}:runs/mine" in " ".join(result.stderr.split())
        yield folder


@pytest.mark.slow
def test_without_weights_the_error_says_how_to_make_and_name_them(place: Path) -> None:
    said = refused("generate", PROMPT, "--policy", MINE, "--max-new-tokens", 4)
    train = f"`bpkit train {MINE} TRACE --out FOLDER --cost COST`"
    assert f"policy 'my_policy' has no weights: train it with {train}, and use `--policy {MINE}:FOLDER`" in said


@pytest.mark.slow
def test_it_decodes_the_same_text_from_the_command_line_and_from_a_config(place: Path) -> None:
    plain = done("generate", PROMPT, "--policy", "fixed:1", "--max-new-tokens", 24).stdout
    costs = ("--max-new-tokens", 24, "--cost", "cost.json", "--stats")
    for spec in (f"{MINE}:runs/mine", f"{MINE}:runs/mine,rate=1", "my_policy.py:runs/mine", "./cautious.py:most=4"):
        result = done("generate", PROMPT, "--policy", spec, *costs)
        assert result.stdout == plain
        assert "fallbacks 0" in result.stderr
    Path("config.yaml").write_text(f"policy: {{name: {MINE}, weights: runs/mine, margin: 0.2}}\n", encoding="utf-8")
    assert done("generate", PROMPT, "--config", "config.yaml", *costs).stdout == plain
    assert "this folder" not in refused("generate", PROMPT, "--policy", f"{MINE}:runs/nowhere")


@pytest.mark.slow
def test_bench_names_each_contestant_as_it_was_typed(place: Path) -> None:
    specs = [f"{MINE}:runs/mine", f"{MINE}:runs/mine,rate=1", "./cautious.py:most=4", "fixed:4"]
    few = ("--limit", 1, "--domain", "code", "--threads", 1)
    flags = [part for spec in specs for part in ("--policy", spec)]
    done("bench", *flags, *few, "--max-new-tokens", 16, "--cost", "cost.json", "--json", "bench.json")
    report = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    found = {name for name in specs if json.dumps(name) in json.dumps(report)}
    assert found == set(specs)
    pytest.importorskip("onnxruntime")
    how = ("--batch", 1, "--calls", 20, "--warm-up", 1, "--block-size", 4, "--json", "latency.json")
    done("bench", "policy", *specs[:1], *specs[2:3], *few, "--max-new-tokens", 8, *how)
    text = Path("latency.json").read_text(encoding="utf-8")
    assert all(json.dumps(name) in text for name in (specs[0], specs[2]))


@pytest.mark.slow
def test_evaluate_tunes_what_is_left_open(place: Path) -> None:
    specs = [f"{MINE}:runs/mine", f"{MINE}:runs/mine,rate=0.85", "./cautious.py:most=8"]
    quick = ("--cost", "cost.json", "--permutations", 0, "--orders", 1, "--json", "evaluation.json")
    done("evaluate", "TRACE", *(part for spec in specs for part in ("--policy", spec)), *quick)
    policies = json.loads(Path("evaluation.json").read_text(encoding="utf-8"))["cost_models"]["made up"]
    judged = policies["groups"]["overall"]["policies"] if "groups" in policies else policies["overall"]["policies"]
    assert set(judged) == set(specs)
    tried = {name: found["tuning"]["candidates"] for name, found in judged.items()}
    assert tried[specs[0]] > tried[specs[1]] > tried[specs[2]] == 1
    Path("config.yaml").write_text(f"policy: {{name: {MINE}, weights: runs/mine}}\n", encoding="utf-8")
    done("evaluate", "TRACE", "--config", "config.yaml", "--no-tune", *quick)
    assert f"{MINE}:weights=runs/mine" in Path("evaluation.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_another_text_of_the_file_is_another_run(place: Path) -> None:
    arguments = ("train", f"{MINE}:width=32", "TRACE", "--out", "runs/mine", "--cost", "cost.json", "--epochs", 2)
    done(*arguments)  # finished: nothing is done again
    Path("my_policy.py").write_text(MY_POLICY.replace("SiLU", "ReLU"), encoding="utf-8")
    try:
        assert "runs/mine holds another run (policy file: " in refused(*arguments)
    finally:
        Path("my_policy.py").write_text(MY_POLICY, encoding="utf-8")


@pytest.mark.slow
def test_the_exported_policy_runs(place: Path) -> None:
    pytest.importorskip("onnxscript")
    Path("config.yaml").write_text(f"policy: {{name: {MINE}, weights: runs/mine}}\n", encoding="utf-8")
    how = ("--trace", "TRACE", "--cost", "cost.json")
    done("export", f"{MINE}:runs/mine", *how)
    described = json.loads(Path("exported/my_policy/policy.json").read_text(encoding="utf-8"))
    assert (described["name"], described["policy"]) == ("my_policy", "my_policy")
    assert described["options"]["width"] == 32
    done("export", *how, "--config", "config.yaml", "--name", "again")
    assert Path("exported/again/policy.json").is_file()
    texts = [
        done("generate", PROMPT, "--policy", policy, "--max-new-tokens", 24, "--cost", "cost.json").stdout
        for policy in ("fixed:1", "onnx:exported/my_policy")
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_rule_with_a_network_of_its_own_is_exported_without_training(place: Path) -> None:
    pytest.importorskip("onnxscript")
    done("export", "./calm.py:Calm", "--trace", "TRACE")
    assert json.loads(Path("exported/calm/policy.json").read_text(encoding="utf-8"))["policy"] == "calm"
    done("generate", PROMPT, "--policy", "onnx:exported/calm", "--max-new-tokens", 8)


@pytest.mark.slow
def test_what_cannot_be_trained_or_exported_is_told_what_to_do(place: Path) -> None:
    said = refused("train", "./cautious.py", "TRACE", "--out", "runs/no", "--cost", "cost.json")
    assert "'./cautious.py' has no weights, so there is nothing to train: derive it from bpkit.learn" in said
    said = refused("export", "./cautious.py:Cautious", "--trace", "TRACE")
    assert "'./cautious.py:Cautious' has no trained weights and no `export(self)`, so there is nothing" in said
    assert "name a policy to export" in refused("export", "--trace", "TRACE")
    assert "has no weights: train it with" in refused("export", MINE, "--trace", "TRACE")
    assert done("train", MINE, "--help").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", [MINE, f"{MINE}:width=8", "./cautious.py:most=4"])
def test_check_passes(place: Path, spec: str) -> None:
    done("check", spec)
