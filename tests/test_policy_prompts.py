"""`bpkit --plugin recipes policy-prompts`: the same prompts each time, none that ships with bpkit, and no two alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from bpkit import assets
from bpkit.learn.training.provenance import fingerprint
from bpkit.prompts import read_prompts
from recipes.pair.policy_prompts import PromptSources, beginning, code_folder, draw_prompts

Recipe = Callable[..., Result]
DEFINITION = '''def function_{n}(items, limit={n}):
    """Return the items of part {n} that lie below the limit, in the order they came in."""
    found = []
    for place, item in enumerate(items):
        if item < limit:
            found.append((place, item))
        else:
            raise ValueError("item %d is not below the limit" % place)
    for place, item in found:
        items[place] = item + limit
    return found, limit, len(items), sum(item for _, item in found), {n}
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 questions in `maths.jsonl`, and 40 definitions in `package`."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"{n} + {n} = {2 * n}"} for n in range(40)]
    (folder / "maths.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "package").mkdir()
    code = "import sys\n\n\n" + "\n\n".join(DEFINITION.format(n=n) for n in range(40))
    (folder / "package" / "code.py").write_text(code, encoding="utf-8")
    return folder


def all_of(sources: Path, records: int = 40) -> PromptSources:
    return PromptSources(sources / "maths.jsonl", str(sources / "package"), records, records_seed=5)


def test_the_domains_take_turns_and_prompts_are_beginnings(sources: Path) -> None:
    drawn = draw_prompts(all_of(sources), count=12, seed=3).prompts
    assert [p.domain for p in drawn] == ["maths", "code", "structured"] * 12
    assert [p.id for p in drawn[:4]] == [
        "train-maths-0000",
        "train-code-0000",
        "train-structured-0000",
        "train-maths-0001",
    ]
    assert len({beginning(p.text) for p in drawn}) == 36
    for prompt in drawn:
        if prompt.domain == "maths":
            assert prompt.text.startswith("Question: What is ")
            assert prompt.text.endswith("?\nAnswer:")
        else:
            assert prompt.text.endswith("\n")
        if prompt.domain == "code":
            assert prompt.text.startswith("def function_")
            assert len(prompt.text) <= 320


def test_the_same_arguments_give_the_same_prompts_and_always_did(sources: Path) -> None:
    def texts(seed: int) -> list[str]:
        return [p.text for p in draw_prompts(all_of(sources), count=12, seed=seed).prompts]

    assert texts(3) == texts(3) != texts(4)
    assert fingerprint(texts(3))[:16] == "378df1978562b937"


def test_repeats_are_replaced_and_nothing_else_changes(sources: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (sources / "maths.jsonl").read_text(encoding="utf-8").splitlines()]
    usual = draw_prompts(PromptSources(sources / "maths.jsonl"), count=20, seed=0)
    assert (usual.repeats, usual.shipped) == (0, 0)
    places = [int(p.text.split()[3]) for p in usual.prompts]
    rows[places[7]]["question"] = f"What  is {places[2]} plus {places[2]}?"  # begins like one that was drawn before it
    rows[places[9]]["question"] = (
        assets.prompts("maths")[4]["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
    )
    (tmp_path / "maths.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    drawn = draw_prompts(PromptSources(tmp_path / "maths.jsonl"), count=20, seed=0)
    assert (drawn.repeats, drawn.shipped) == (1, 1)
    changed = [place for place in range(20) if drawn.prompts[place] != usual.prompts[place]]
    assert changed == [7, 9]
    assert len({beginning(p.text) for p in drawn.prompts}) == 20


def test_no_prompt_begins_like_a_shipped_one(tmp_path: Path) -> None:
    shipped = assets.prompts(*assets.DOMAINS, *assets.EXTRA_DOMAINS)
    known = {beginning(p["prompt"]) for p in shipped}
    questions = [p["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:") for p in shipped]
    rows = "\n".join(json.dumps({"question": question, "answer": ""}) for question in questions[:120])
    (tmp_path / "maths.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(ValueError, match="maths: 0 different prompts are there, 1 are wanted"):
        draw_prompts(PromptSources(tmp_path / "maths.jsonl"), count=1, seed=0)
    whole = [
        p["prompt"] for p in assets.prompts("code") if p["prompt"].count("\ndef ") == p["prompt"].count("\n@") == 0
    ]
    code = [f"{text}        pass\n{'#' * 400}\n" for text in whole if text.startswith("def ") and len(text) > 80]
    assert len(code) > 10
    (tmp_path / "code.py").write_text("\n".join([*code, DEFINITION.format(n=0)]), encoding="utf-8")
    drawn = draw_prompts(PromptSources(code=str(tmp_path)), count=1, seed=0)
    assert drawn.shipped == 1
    assert drawn.prompts[0].text.startswith("def function_0")
    assert not known & {beginning(p.text) for p in draw_prompts(PromptSources(records=300), count=300, seed=0).prompts}


def test_files_parts_and_provenance(recipe: Recipe, sources: Path, tmp_path: Path) -> None:
    given = ("--maths", sources / "maths.jsonl", "--code", sources / "package", "--structured", 20, "--count", 9)
    whole = recipe("policy-prompts", "--out", tmp_path / "whole.jsonl", *given)
    assert whole.exit_code == 0, whole.stderr
    assert whole.stdout == ""
    assert "9 prompts each of maths, code, structured" in whole.stderr
    prompts = read_prompts(tmp_path / "whole.jsonl")
    assert len(prompts) == 27
    assert recipe("policy-prompts", "--out", tmp_path / "part.jsonl", *given, "--parts", 2).exit_code == 0
    parts = [read_prompts(tmp_path / f"part{number}.jsonl") for number in range(2)]
    assert [len(part) for part in parts] == [12, 15]
    assert [*parts[0], *parts[1]] == prompts
    text = (tmp_path / "whole.provenance.json").read_text(encoding="utf-8")
    facts = json.loads(text)
    assert facts["arguments"]["structured_seed"] == 0
    assert facts["data"]["prompts"] == fingerprint(p.text for p in prompts)
    assert str(tmp_path) not in text
    assert str(sources) not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --maths, --code or --structured"),
        (["--structured", "5"], "structured: 5 different prompts are there, 600 are wanted"),
        (["--code", "no_such_package"], "no installed package of that name"),
        (["--code", "no-such-folder/x"], "no such folder"),
        (["--structured", "5", "--count", "2", "--parts", "3"], "--parts 3"),
        (["--structured", "5", "--out", "prompts.txt"], ".jsonl"),
    ],
)
def test_bad_input_is_told(recipe: Recipe, tmp_path: Path, arguments: list[Any], said: str) -> None:
    result = recipe("policy-prompts", "--out", tmp_path / "p.jsonl", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "p.jsonl").exists()


def test_a_package_is_found_by_name_without_importing_it() -> None:
    assert (code_folder("bpkit") / "policy").is_dir()
