"""`bpkit store`: what goes into a store, what it says of itself, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from bpkit.cli.main import build_app
from bpkit.draft.stores.files import open_store
from bpkit.draft.stores.tables import SEPARATOR
from bpkit.draft.vocabulary import fingerprint_tokenizer
from bpkit.testing import TinyPair
from bpkit.trace.store.joined import open_trace

TEXTS = ["x = 1, x = 2", "def f(a):", "y = 1, x = 2"]


@pytest.fixture(scope="module")
def run() -> Callable[..., Result]:
    app = build_app()
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), prog_name="bpkit")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    parts = ("train", "test", "train")
    rows = [
        {"id": str(i), "prompt": "any", "text": text, "split": part}
        for i, (text, part) in enumerate(zip(TEXTS, parts, strict=True))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trace(run: Callable[..., Result], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    rows = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(TEXTS)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = run(
        *("trace", "--out", folder / "trace", "--prompts", folder / "p.jsonl", "--target", tiny_folder / "target"),
        *("--drafter", "ngram", "--max-new-tokens", 12, "--block-sizes", "2"),
    )
    assert made.exit_code == 0, made.stderr
    return folder / "trace"


def corpus(folder: Path) -> list[list[int]]:
    """The texts of a store's corpus."""
    found: list[list[int]] = [[]]
    for token in np.load(folder / "tokens.npy").tolist():
        if token == SEPARATOR:
            found.append([])
        else:
            found[-1].append(token)
    return found[:-1]


def test_a_store_of_texts_holds_them_and_its_history(
    run: Callable[..., Result], pair: TinyPair, tiny_folder: Path, texts: Path, tmp_path: Path
) -> None:
    out, target = tmp_path / "store", tiny_folder / "target"
    made = run("store", "build", "--texts", texts, "--target", target, "--out", out, "--split", texts)
    assert made.exit_code == 0, made.stderr
    assert f"wrote {out}" in made.stderr
    assert corpus(out) == [pair.ids(TEXTS[place])[0].tolist() for place in (0, 2)]
    facts = open_store(out).facts
    assert (facts.texts, facts.tokens, facts.vocab_size) == (2, 24, pair.target.config.vocab_size)
    assert facts.tokenizer == fingerprint_tokenizer(str(target)) is not None
    assert facts.source == ["texts texts.jsonl"]
    assert facts.part == "train of texts.jsonl, seed 0"
    shown = run("store", "show", out)
    for said in (str(facts.tokenizer), "2 texts, 24 tokens", "of 5 tokens", "texts.jsonl", facts.made):
        assert said in shown.stdout
    assert json.loads(run("store", "show", out, "--json").stdout) == facts.model_dump(mode="json")
    again = run("store", "build", "--texts", texts, "--target", target, "--out", out, "--ngrams", 3)
    assert again.exit_code == 0, again.stderr
    assert (open_store(out).facts.texts, open_store(out).facts.ngrams) == (3, 3)
    decoded = run(
        *("generate", "x = ", "--target", target, "--drafter", f"hierarchy:store={out}", "--policy", "fixed:4"),
        *("--max-new-tokens", 6, "--temperature", 0),
    )
    assert decoded.exit_code == 0, decoded.stderr


def test_a_store_of_a_trace_holds_outputs_and_none_of_prompts_held_out(
    run: Callable[..., Result], trace: Path, tmp_path: Path
) -> None:
    opened = open_trace(trace)
    outputs = [one.output_tokens.tolist() for one in opened]
    whole = run("store", "build", trace, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    assert corpus(tmp_path / "whole") == outputs
    facts = open_store(tmp_path / "whole").facts
    assert facts.target_fingerprint == opened.manifest.target.fingerprint
    assert facts.tokenizer is not None
    part = run("store", "build", trace, "--out", tmp_path / "part", "--split", "0.34,0.33,0.33")
    assert part.exit_code == 0, part.stderr
    assert len(corpus(tmp_path / "part")) == 1
    assert open_store(tmp_path / "part").facts.part == "train of 0.34,0.33,0.33, seed 0"


def test_what_cannot_be_built_is_refused_in_words(
    run: Callable[..., Result], tiny_folder: Path, texts: Path, trace: Path, tmp_path: Path
) -> None:
    of_texts, out = ("--texts", texts, "--target", tiny_folder / "target"), ("--out", tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    for arguments, said in (
        (out, "name traces, or a file with --texts"),
        ((trace, *of_texts, *out), "one of both"),
        (("--texts", texts, *out), "--texts needs --target"),
        ((*of_texts, *out, "--max-tokens", 10), "--max-tokens is 10: take fewer texts or raise it"),
        ((*of_texts, *out, "--column", "words"), "needs a 'words'"),
        ((*of_texts, *out, "--split", "0,0.5,0.5"), "no training prompts are left"),
        ((*of_texts, "--out", tmp_path / "other"), "has other files than a store: name a new folder"),
        ((tmp_path / "nowhere", *out), "is no trace"),
    ):
        result = run("store", "build", *arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    assert not (tmp_path / "out").exists()
    assert "is no store" in run("store", "show", tmp_path).stderr
