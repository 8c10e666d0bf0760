"""`bpkit generate --prompts`: a file of texts, in the order of the prompts, that can be gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bpkit import SpeculativeDecoder
from bpkit.cli.main import build_app
from bpkit.decode.result import RunMany

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "x = ", "id": "first"},
    {"prompt": "def f(a, b):\n    return ", "max_new_tokens": 30},
    {"prompt": "1, 2, 3, 1, 2, 3,", "domain": "lists", "seed": 5},
    {"prompt": "a", "stop_strings": ["b", "8", "W", "j"]},
    {"prompt": "The quick brown fox", "stream_id": 40},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", PROMPTS)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def generate(folder: Path, *arguments: object) -> Result:
    models = ["--target", folder / "target", "--drafter", folder / "drafter", "--max-new-tokens", 12]
    return CliRunner().invoke(build_app(), [*map(str, ["generate", *models, *arguments])])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_those_of_each_prompt_alone_in_the_order_of_the_file(
    tiny_folder: Path, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "texts.jsonl"
    done = generate(tiny_folder, "--prompts", file, "--out", out, "--batch-size", 2, "--temperature", 1, "--seed", 3)
    assert done.exit_code == 0, done.output
    rows = rows_of(out)
    assert [row["id"] for row in rows] == ["first", "line-2", "line-3", "line-4", "line-5"]
    decoder = SpeculativeDecoder.from_pretrained(tiny_folder / "target", tiny_folder / "drafter")
    for place, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        options = {"max_new_tokens": 12, "seed": 3, "stream_id": place, "temperature": 1.0} | prompt
        text = options.pop("prompt")
        for name in ("id", "domain"):
            options.pop(name, None)
        alone = decoder.generate(text, **options)
        assert (row["text"], row["tokens"], row["seed"]) == (alone.text, alone.tokens.shape[1], alone.seed)
    assert rows[1]["tokens"] > 12
    assert rows[2]["domain"] == "lists"


def test_the_same_command_goes_on_where_it_was_interrupted(
    tiny_folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "texts.jsonl", tmp_path / "whole.jsonl"
    assert generate(tiny_folder, "--prompts", file, "--out", whole).exit_code == 0
    ended = RunMany.ended

    def interrupted(self: RunMany) -> Any:
        for number, one in enumerate(ended(self)):
            yield one
            if number or len(rows_of(out)) >= 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunMany, "ended", interrupted)
        stopped = generate(tiny_folder, "--prompts", file, "--out", out, "--batch-size", 2)
    assert stopped.exit_code == 130
    kept = rows_of(out)
    assert 2 <= len(kept) < len(PROMPTS)
    out.write_text(out.read_text() + '{"id": "line-5", "te')  # cut off while it was written

    decoded: list[str] = []
    run_many = SpeculativeDecoder.run_many

    def noted(self: SpeculativeDecoder, prompts: Any, **options: Any) -> RunMany:
        decoded.extend(row["prompt"] for row in prompts)
        return run_many(self, prompts, **options)

    monkeypatch.setattr(SpeculativeDecoder, "run_many", noted)
    assert generate(tiny_folder, "--prompts", file, "--out", out, "--batch-size", 2).exit_code == 0
    assert len(decoded) == len(PROMPTS) - len(kept)
    assert out.read_text() == whole.read_text()


def test_a_file_of_other_texts_is_not_touched(tiny_folder: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    assert generate(tiny_folder, "--prompts", file, "--out", out).exit_code == 0
    before = out.read_text()
    other = generate(tiny_folder, "--prompts", file, "--out", out, "--temperature", 0.5)
    assert other.exit_code == 2
    assert "is of another prompt or of other settings; name another file" in other.output
    out.write_text("hello\n" + before)
    assert "line 1 is no text of this command" in generate(tiny_folder, "--prompts", file, "--out", out).output
    assert out.read_text() == "hello\n" + before


def test_prompts_that_fail_are_named_and_tried_again(tiny_folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "x = ", "id": "good"},
        {"prompt": "y" * 8, "id": "bad", "max_new_tokens": 0},
    ]
    file, out = written(tmp_path / "prompts.jsonl", rows), tmp_path / "texts.jsonl"
    done = generate(tiny_folder, "--prompts", file, "--out", out)
    assert done.exit_code == 1
    assert "1 of 2 prompts failed, the same command tries them again: bad: ValueError" in done.output
    good, bad = rows_of(out)
    assert good["text"]
    assert "error" in bad
    assert generate(tiny_folder, "--prompts", file, "--out", out).exit_code == 1
    assert [row["id"] for row in rows_of(out)] == ["good", "bad"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "{file}"], "belong together"),
        (["x", "--prompts", "{file}", "--out", "{out}"], "give one prompt, or --prompts FILE, not both"),
        (["--prompts", "{out}.nowhere", "--out", "{out}"], "there is no prompt file"),
        (["--prompts", "{bad}", "--out", "{out}"], "'max_new_tokens' must be a whole number, not 'many'"),
    ],
)
def test_what_does_not_fit_is_said(
    tiny_folder: Path, file: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    bad = written(tmp_path / "bad.jsonl", [{"prompt": "x", "max_new_tokens": "many"}])
    places = {"file": file, "out": tmp_path / "texts.jsonl", "bad": bad}
    done = generate(tiny_folder, *(argument.format(**places) for argument in arguments))
    assert done.exit_code != 0
    assert said in done.output
