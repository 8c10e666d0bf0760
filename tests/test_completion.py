"""What the shells are told at Tab, asked as they ask: by the variables that the installed scripts set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bpkit.cli import completion
from bpkit.registry.discovery import build, registry

MAIN = "import bpkit.cli.main; bpkit.cli.main.main()"
LIGHT = """
import atexit, sys
import bpkit.cli.main
@atexit.register
def look():
    heavy = {"torch", "transformers", "lightning", "matplotlib"} & set(sys.modules)
    if heavy:
        print("imported", *heavy)
bpkit.cli.main.main()
"""


def asked(line: str, *, shell: str = "zsh", program: str = LIGHT) -> str:
    """What bpkit answers to a shell whose line, up to the cursor, is this."""
    words = line.split(" ")
    by_shell = {
        "bash": {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    environment = {**os.environ, "_BPKIT_COMPLETE": f"complete_{shell}", **by_shell[shell]}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "imported" not in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("line", "expected", "absent"),
    [
        ("bpkit ", ["generate", "bench", "doctor"], ["threshold"]),
        ("bpkit --plugin no:band", ["no:bandit"], ["no:fixed"]),
        ("bpkit generate --policy th", ["threshold"], ["fixed"]),
        ("bpkit bench --policy fixed --policy ", ["threshold", "bandit", "onnx"], ["ngram"]),
        ("bpkit evaluate TRACE --cost df", ["dflash-h200-qwen3-4b"], []),
        ("bpkit check bandi", ["bandit"], ["fixed"]),
        ("bpkit check --skip l", ["lossless"], ["sizes"]),
        ("bpkit train ", ["forecast", "drafter"], ["fixed"]),
        ("bpkit export fore", ["forecast"], []),
        ("bpkit trace --features last", ["last_hidden"], []),
    ],
)
def test_names_are_completed_in_bash(line: str, expected: list[str], absent: list[str]) -> None:
    found = asked(line, shell="bash").splitlines()
    assert set(expected) <= set(found)
    assert not set(absent) & set(found)


def test_zsh_and_fish_are_told_what_a_name_means() -> None:
    summary = registry().policies["threshold"].summary
    assert len(summary) > completion.MOST_OF_HELP, "this is about long ones, which fish would take for two names"
    (line,) = asked("bpkit policies thr", shell="fish").splitlines()
    name, told = line.split("\t")
    assert name == "threshold"
    assert summary.startswith(told.removesuffix(" ..."))
    assert summary.split("'")[0] in asked("bpkit generate -p thr", shell="zsh")
    assert asked("bpkit generate --drafter ngram:", shell="fish").startswith("ngram:max_ngram=\t")


def test_options_of_a_policy_follow_its_name() -> None:
    assert ("threshold:threshold=", "least probability that the draft so far stands; 0 keeps all of it") in (
        completion.policies("threshold:")
    )
    assert [value for value, _ in completion.policies("threshold:threshold=0.5,bl")] == [
        "threshold:threshold=0.5,threshold=",
        "threshold:threshold=0.5,block_size=",
    ]
    assert completion.policies("./mine.py:My") == []
    assert completion.policies("nobody:") == []


def test_one_broken_plugin_spoils_no_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build()
    made.policies["threshold"] = made.policies["threshold"].__class__(
        **{**vars(made.policies["threshold"]), "config": "no_such_module:Config"}
    )
    monkeypatch.setattr(completion, "registry", lambda: made)
    assert completion.policies("threshold:") == []
    assert "threshold" in dict(completion.policies(""))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_shown_for_each_shell(shell: str) -> None:
    environment = {**os.environ, "_BPKIT_COMPLETE": f"source_{shell}"}
    done = subprocess.run([sys.executable, "-c", MAIN], env=environment, capture_output=True, text=True, check=True)
    assert f"complete_{shell}" in done.stdout
    assert "bpkit" in done.stdout


def test_completion_is_installed_where_the_shell_looks(tmp_path: Path) -> None:
    bash = "/bin/bash"
    if not Path(bash).exists():
        pytest.skip("no bash")
    environment = {**os.environ, "HOME": str(tmp_path)}
    words = f"{sys.executable} -c '{MAIN}' --install-completion; true"  # bash is the shell that is detected
    done = subprocess.run([bash, "-c", words], env=environment, capture_output=True, text=True, check=True)
    assert "bash completion installed" in done.stdout, done.stderr
    assert "_BPKIT_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "bpkit.sh").read_text(encoding="utf-8")
