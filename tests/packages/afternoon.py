"""The policy author's afternoon by the clock: every step from an empty folder to a package and an ONNX file.

`make afternoon` runs this with the Python of build/packages/venv, where bpkit is an ordinary wheel, and writes
docs/benchmarks/afternoon.json: seconds of every command, and the lines that the author wrote for it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import torch
from try_packages import BIN, MADE, Road  # type: ignore[import-not-found]

from bpkit.installation.machine import describe_machine

WORK = MADE.parent / "afternoon"
PACKAGE = "bpkit-my-trained"
RULE = """from bpkit import Policy, PolicyConfig


class Config(PolicyConfig):
    most: int = 16


class Cautious(Policy):
    Config, wants = Config, frozenset()

    def select(self, state, context):
        return (context.remaining // 4 + 2).clamp(max=self.config.most)
"""
LEARNED = """from torch import nn
from bpkit.learn import LearnedPolicy


class MyPolicy(LearnedPolicy):
    wants = frozenset({"last_hidden", "anchor_entropy"})

    def network(self, inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, outputs))
"""
CONFIG = "policy: {name: ./cautious.py:Cautious, most: 8}\n"
PROMPT = "def mean(values):\n"
LIMIT = "10"
"""Prompts of each domain, so that the afternoon is short; figures of so few say nothing."""


class Afternoon(Road):
    """Keeps what was written and what it took, part by part."""

    def __init__(self) -> None:
        super().__init__("")
        self.steps: list[dict[str, object]] = []

    def part(self, name: str, **files: str) -> None:
        """Begin a part by writing its files."""
        self.kind = name
        for stem, text in files.items():
            path = WORK / (f"{stem}.yaml" if text.startswith("policy:") else f"{stem}.py")
            path.write_text(text, encoding="utf-8")
            print(f"{name:10} {path.name}: {lines_of(text)} lines", flush=True)
            self.steps.append({"part": name, "wrote": path.name, "lines": lines_of(text)})

    def run(self, what: str, *command: str, inside: Path = WORK) -> None:
        """A step by the clock."""
        self.step(what, *command, inside=inside)
        typed = " ".join(command).replace(PROMPT, f'"{PROMPT.strip()}"')
        self.steps.append({"part": self.kind, "command": typed, "seconds": round(self.seconds[what], 1)})


def lines_of(text: str) -> int:
    """Lines that hold something."""
    return sum(bool(line.strip()) for line in text.splitlines())


def one_file(road: Afternoon) -> None:
    """A rule in a file, through every command that a rule can go through."""
    mine = "./cautious.py:Cautious"
    road.part("one file", cautious=RULE, settings=CONFIG)
    road.run("generate", "bpkit", "generate", PROMPT, "--policy", f"{mine}:8", "--stats")
    road.run("config", "bpkit", "generate", PROMPT, "--config", "settings.yaml")
    road.run("check", "bpkit", "check", mine)
    road.run("bench", "bpkit", "bench", "--policy", "fixed:4", "--policy", mine, "--limit", "2")
    trace = ("--features", "last_hidden", "--features", "anchor_entropy", "--limit", LIMIT)
    road.run("trace", "bpkit", "trace", "--out", "trace", *trace)
    road.run("calibrate", "bpkit", "calibrate", "--out", "cost.json", "--max-minutes", "2")
    road.run("evaluate", "bpkit", "evaluate", "trace", "--cost", "cost.json", "--policy", mine, "--permutations", "0")


def learned(road: Afternoon) -> None:
    """A trained policy in a file, from training to its ONNX file at work."""
    mine = "./my_policy.py:MyPolicy"
    road.part("learned", my_policy=LEARNED)
    road.run("train", "bpkit", "train", mine, "trace", "--out", "runs/mine", "--cost", "cost.json")
    road.run("check", "bpkit", "check", f"{mine}:runs/mine")
    trained = ("--policy", f"{mine}:runs/mine", "--permutations", "0")
    road.run("evaluate", "bpkit", "evaluate", "trace", "--cost", "cost.json", *trained)
    road.run("generate", "bpkit", "generate", PROMPT, "--policy", f"{mine}:runs/mine", "--stats")
    road.run("export", "bpkit", "export", f"{mine}:runs/mine", "--trace", "trace", "--name", "mine")
    road.run("onnx", "bpkit", "generate", PROMPT, "--policy", "onnx:exported/mine", "--stats")


def package(road: Afternoon) -> None:
    """A distribution, from nothing to a wheel."""
    road.part("package")
    folder = WORK / PACKAGE
    road.run("new", "bpkit", "new", PACKAGE, "--kind", "trained")
    road.run("install", "pip", "install", "--quiet", "-e", f"./{PACKAGE}[test]")
    road.run("list", "bpkit", "policies", "my_trained")
    road.run("check", "bpkit", "check", "my_trained")
    road.run("test", "python", "-m", "pytest", "-q", inside=folder)
    road.run("wheel", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ".", inside=folder)


def main() -> None:
    """All parts, and the record of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write what was measured")
    out = parser.parse_args().json.resolve()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    subprocess.run([BIN / "pip", "uninstall", "--quiet", "--yes", PACKAGE], check=True)
    machine = describe_machine(torch.device("cpu"))
    road = Afternoon()
    for part in (one_file, learned, package):
        part(road)
    seconds = sum(float(str(step.get("seconds", 0))) for step in road.steps)
    record = {"schema_version": 1, "machine": machine, "prompts_of_each_domain": int(LIMIT), "steps": road.steps}
    out.write_text(json.dumps({**record, "seconds": round(seconds, 1)}, indent=1) + "\n", encoding="utf-8")
    print(f"{seconds / 60:.1f} minutes; wrote {out.name}")


if __name__ == "__main__":
    main()
