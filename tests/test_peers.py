"""The comparison with other libraries: its processes, its protocol, its figures, and the command from end to end."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from bpkit.assets import shipped
from bpkit.draft.own_layers import leave_out_embeddings, load_own_layers, own_weights
from bpkit.installation.machine import available_cores
from bpkit.judge.loops import ends_in_loop
from bpkit.judge.wall_clock.threads import candidate_counts
from bpkit.progress import NoProgress
from bpkit.prompts import Prompt
from bpkit.trace.cost.presets import PRESETS
from recipes.peers import worker
from recipes.peers.command import costs, draft_models, shown, texts
from recipes.peers.contestants import GENERATE, GET_FLASHSPEC, LOOP, Contestant, line_up
from recipes.peers.figures import PeerFigures, PeerRun
from recipes.peers.measure import Progressed, Saved, Task, choose_threads, measure
from recipes.peers.models import encoded, whole_drafts
from recipes.peers.processes import Contest

IDS, NEW_TOKENS = tuple(range(5, 17)) * 2, 12
DRAFTS = {"dflash": "D", "assistant": "A"}


def drafts_in(folder: Path) -> dict[str, str]:
    return {"dflash": str(folder / "drafter"), "assistant": str(folder / "assistant")}


def told(library: str, folder: Path, specs: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a worker says on loading peers or policies, and then of one prompt by each."""
    peers, policies = ([], specs) if library == "bpkit" else (specs, [])
    found, _ = line_up(peers, policies, drafts_in(folder), {"dflash": next(iter(PRESETS))}, sys.executable)
    contestants = {one.name: dict(one.settings) for one in found if one.library == library}
    lines: list[dict[str, Any]] = [{"library": library, "target": str(folder / "target"), "contestants": contestants}]
    shared: dict[str, Any] = {"ids": IDS, "max_new_tokens": NEW_TOKENS, "threads": 1, "stream": 0}
    for trial in (True, False):
        lines += [{"contestant": name, **shared, "trial": trial} for name in contestants]
    out = io.StringIO()
    worker.serve(map(json.dumps, lines), out)
    ready, *replies = map(json.loads, out.getvalue().splitlines())
    return ready, replies


@pytest.fixture(scope="module")
def plain_tokens(tiny_folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "target", dtype=torch.float32).eval()
    tokens: list[int] = model.generate(torch.tensor([IDS]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    return tokens[len(IDS) :]


@pytest.mark.parametrize(
    ("library", "specs"),
    [
        ("transformers", ["transformers-assisted:3", "transformers-lookup:4", "transformers-dflash:4"]),
        ("bpkit", ["fixed:4@dflash", "fixed:3@assistant", "bandit@ngram", "goodput@dflash"]),
    ],
)
def test_every_way_of_a_library_gives_the_text_and_its_steps(
    library: str, specs: list[str], tiny_folder: Path, plain_tokens: list[int]
) -> None:
    ready, replies = told(library, tiny_folder, specs)
    assert ready["failed"] == {}
    assert ready["versions"]["torch"] == torch.__version__
    assert [reply["tokens"] for reply in replies] == [plain_tokens] * (2 * (len(specs) + 1))
    for reply in replies:
        assert reply["seconds"] > 0
        assert len(plain_tokens) - 4 <= reply["step_tokens"] <= len(plain_tokens)
        assert reply["steps"] <= reply["step_tokens"]
    plain, with_drafts = replies[0], replies[1 : len(specs) + 1]
    assert plain["steps"] == plain["step_tokens"] == len(plain_tokens) - 1
    assert min(reply["steps"] for reply in with_drafts) < plain["steps"]


def test_what_cannot_be_loaded_or_decoded_says_why(tiny_folder: Path) -> None:
    ready, replies = told("flashspec", tiny_folder, ["flashspec"])
    assert ready["failed"]["flashspec"] == "ModuleNotFoundError: No module named 'flashspec'"
    assert "KeyError" in replies[0]["error"]
    ready, _ = told("transformers", tiny_folder, ["transformers-assisted", "transformers-lookup"])
    assert ready["failed"] == {}
    ready, _ = told("transformers", tiny_folder.parent, ["transformers-lookup"])
    assert ready["failed"].keys() == {GENERATE, "transformers-lookup"}


def test_a_process_that_ends_is_left_out_with_its_last_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no torch here' >&2\nexit 3\n", encoding="utf-8")
    python.chmod(0o755)
    with ExitStack() as resources:
        running = Contest(resources)
        running.load("", [Contestant("a", "flashspec", {}, "one", str(python))])
        running.load("", [Contestant("b", "flashspec", {}, "two", str(tmp_path / "nowhere"))])
    assert running.names == []
    assert running.left_out["a"] == "its process ended (exit code 3): no torch here"
    assert running.left_out["b"].endswith("nowhere: No such file or directory")


def test_peers_and_policies_as_they_are_typed() -> None:
    found, left_out = line_up(
        ["transformers-lookup", "transformers-lookup:4", "transformers-assisted:assistant_confidence_threshold=0.5"],
        ["fixed:3", "goodput@ngram"],
        DRAFTS,
        {"ngram": "costs.json"},
        None,
    )
    settings = {one.name: one.settings for one in found}
    assert left_out == {}
    assert list(settings) == [
        GENERATE,
        LOOP,
        "transformers-lookup",
        "transformers-lookup:4",
        "transformers-assisted:assistant_confidence_threshold=0.5",
        *(f"fixed:3@{kind}" for kind in ("dflash", "assistant", "ngram")),
        "goodput@ngram",
    ]
    assert settings["transformers-lookup"]["options"] == {"prompt_lookup_num_tokens": 10}
    assert settings["transformers-lookup:4"]["options"] == {"prompt_lookup_num_tokens": 4}
    assert settings["transformers-assisted:assistant_confidence_threshold=0.5"]["draft"] == "A"
    assert settings["goodput@ngram"] == {
        "policy": "goodput",
        "drafter": "ngram",
        "cost": "costs.json",
        "products": "torch",
    }
    assert settings["fixed:3@dflash"] == {"policy": "fixed:3", "drafter": "D", "cost": None, "products": "torch"}


def test_what_is_missing_is_left_out_and_what_is_wrong_refused() -> None:
    _, left_out = line_up(["flashspec", "transformers-dflash"], [], {"assistant": "A"}, {}, None)
    assert left_out["flashspec"] == GET_FLASHSPEC
    assert "--dflash" in left_out["transformers-dflash"]
    for peers, policies, said in (
        (["transformers-lokup"], [], "Did you mean 'transformers-lookup'"),
        (["flashspec-model:width=3"], [], "it takes gamma"),
        ([], ["fixd:3"], "fixd"),
        ([], ["fixed:3@dflash"], "give --dflash"),
        (["transformers-lookup"] * 2, [], "more than once"),
    ):
        with pytest.raises(ValueError, match=said):
            line_up(peers, policies, {}, {}, "python")


class Spoken:
    """A contest in which every text is the prompt's first ids, and `asked` says who was asked what."""

    def __init__(self, names: list[str], *, failing: tuple[str, str] = ("", "")) -> None:
        self.all, self.failing = names, failing
        self.left_out: dict[str, str] = {}
        self.versions = {"one": {"torch": "2"}}
        self.asked: list[tuple[str, str]] = []

    @property
    def names(self) -> list[str]:
        return [name for name in self.all if name not in self.left_out]

    def ask(self, name: str, *, ids: tuple[int, ...], trial: bool, **asked: Any) -> dict[str, Any] | None:
        prompt = "pq"[asked["stream"]]
        if not trial:
            self.asked.append((prompt, name))
        if (name, prompt) == self.failing and not trial:
            self.left_out[name] = "it broke"
            return None
        tokens = list(ids[: asked["max_new_tokens"]])
        return {"tokens": tokens, "seconds": 1.0 / asked["threads"], "steps": 4, "step_tokens": 8, "near_ties": []}


NAMES = [GENERATE, LOOP, "transformers-lookup", "fixed:3@ngram"]
TASKS = [Task("p", "code", IDS, 0), Task("q", "chat", IDS, 1)]


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Spoken, dict[str, Any]]]:
    """Measure with a contest that is spoken only."""

    def run(file: Path | None = None, **more: Any) -> tuple[Spoken, dict[str, Any]]:
        running = Spoken(NAMES, **more)
        monkeypatch.setattr("recipes.peers.measure.contest", lambda *_: nullcontext(running))
        return running, measure("", [], TASKS, max_new_tokens=NEW_TOKENS, saved=Saved(file, "question"), threads=2)

    return run


def test_all_decode_each_prompt_and_another_begins(spoken: Callable[..., tuple[Spoken, dict[str, Any]]]) -> None:
    running, report = spoken()
    prompts = [prompt for prompt, _ in running.asked]
    assert prompts == sorted(prompts) or prompts == sorted(prompts, reverse=True)
    assert [name for _, name in running.asked] == [*NAMES, *NAMES[1:], NAMES[0]]
    entries = report["overall"]["contestants"]
    assert {entry["tokens_per_second"] for entry in entries.values()} == {2 * NEW_TOKENS}
    assert report["machine"]["threads"] == dict.fromkeys(NAMES, 2)
    assert report["left_out"] == {}


def test_an_interrupted_run_goes_on_where_it_was(
    spoken: Callable[..., tuple[Spoken, dict[str, Any]]], tmp_path: Path
) -> None:
    file = tmp_path / "partial"
    _, whole = spoken(file)
    saved = json.loads(file.read_text(encoding="utf-8"))
    del saved["replies"]["q"]
    file.write_text(json.dumps(saved), encoding="utf-8")
    running, again = spoken(file)
    assert {prompt for prompt, _ in running.asked} == {"q"}
    assert again["overall"] == whole["overall"]


def test_who_breaks_on_the_way_is_left_out_but_plain_decoding_must_not(
    spoken: Callable[..., tuple[Spoken, dict[str, Any]]],
) -> None:
    _, report = spoken(failing=("transformers-lookup", "q"))
    assert report["left_out"] == {"transformers-lookup": "it broke"}
    assert list(report["overall"]["contestants"]) == [GENERATE, LOOP, "fixed:3@ngram"]
    with pytest.raises(RuntimeError, match="bpkit plain cannot decode with this target: it broke"):
        spoken(failing=(LOOP, "p"))


def test_the_best_number_of_threads_is_each_ones_own() -> None:
    running = Spoken(NAMES)
    best, tried = choose_threads(cast("Contest", running), TASKS, NEW_TOKENS, None, NoProgress())
    assert best == dict.fromkeys(NAMES, max(candidate_counts(available_cores())))
    assert all(set(rates) <= set(candidate_counts(available_cores())) for rates in tried.values())


def test_what_was_measured_is_read_again_for_the_same_question_only(tmp_path: Path) -> None:
    file = tmp_path / "peers.json.partial"
    saved = Saved(file, ["model", 64])
    assert saved.says() == "Nothing was written."
    done = Progressed({"a": 2}, {"a": {1: 3.5, 2: 4.0}}, {"p": {"a": {"tokens": [1]}}})
    saved.write(done)
    assert "goes on" in saved.says()
    assert Saved(file, ["model", 64]).read() == done
    assert Saved(file, ["model", 65]).read() == Progressed()
    saved.remove()
    assert saved.read() == Progressed()


def test_figures_are_ratios_of_sums_and_texts_are_compared() -> None:
    loop = [1, 2] * 40
    text = list(range(80))
    runs = {
        GENERATE: {"p": PeerRun(text, 4.0, 79, 79, []), "q": PeerRun(loop, 4.0, 79, 79, [])},
        LOOP: {"p": PeerRun(text, 8.0, 79, 79, [30]), "q": PeerRun(loop, 8.0, 79, 79, [])},
        "transformers-lookup": {"p": PeerRun(text, 5.0, 40, 80, []), "q": PeerRun(loop, 1.0, 10, 70, [])},
        "fixed:4@ngram": {"p": PeerRun([*text[:40], 7], 2.0, 40, 40, []), "q": PeerRun(loop, 1.0, 20, 80, [])},
    }
    report = PeerFigures(runs, {"p": "code", "q": "chat"}, seed=0).as_json()
    overall = report["overall"]
    assert (overall["prompts"], overall["loops"], list(report["domains"])) == (2, 1, ["code", "chat"])
    lookup, ours = overall["contestants"]["transformers-lookup"], overall["contestants"]["fixed:4@ngram"]
    assert lookup["tokens_per_second"] == pytest.approx(160 / 6)
    assert lookup["over_generate"] == pytest.approx((160 / 6) / 20)
    assert lookup["over_plain"] == pytest.approx((160 / 6) / 10)
    low, high = lookup["over_plain_interval"]
    assert low == pytest.approx(8 / 5)
    assert high == pytest.approx(8.0)
    assert lookup["acceptance_length"] == pytest.approx(150 / 50)
    assert (lookup["equal_texts"], lookup["different_prompts"], lookup["loops"]) == (2, [], 1)
    assert ours["equal_texts"] == 1
    assert ours["different_prompts"] == [{"id": "p", "first_difference": 40, "near_tie": True}]
    without = report["without_loops"]
    assert (without["prompts"], without["contestants"]["fixed:4@ngram"]["tokens"]) == (1, 41)
    head = report["headline"]
    assert (head["fastest_peer"], head["fastest_policy"]) == ("transformers-lookup", "fixed:4@ngram")
    assert head["policy_over_peer"] == pytest.approx((121 / 3) / (160 / 6))
    assert ends_in_loop(loop)


def test_a_drafter_without_embeddings_is_made_whole_for_others(tiny_folder: Path, tmp_path: Path) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(tiny_folder / "assistant", dtype=torch.float32)
    leave_out_embeddings(assistant)
    assistant.save_pretrained(tmp_path, state_dict=own_weights(assistant))
    target = str(tiny_folder / "target")
    given = [
        Contestant("bpkit", "bpkit", {"drafter": str(tmp_path)}, "bpkit"),
        Contestant("whole", "transformers", {"draft": str(tiny_folder / "assistant")}, "b"),
        Contestant("own layers", "transformers", {"draft": str(tmp_path)}, "a"),
    ]
    with whole_drafts(target, given) as made:
        assert made[:2] == given[:2]
        folder = made[2].settings["draft"]
        assert folder != str(tmp_path)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        expected = load_own_layers(str(tmp_path), AutoModelForCausalLM.from_pretrained(target))
        ids = torch.tensor([IDS])
        torch.testing.assert_close(model.eval()(ids).logits, expected.eval()(ids).logits)
    assert not Path(folder).exists()


def test_messages_are_made_with_the_chat_template_once(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "target")
    message = Prompt("a", "maths", "1 + 1", chat=True)
    (plain,) = encoded(str(tiny_folder / "target"), [replace(message, chat=False)])
    assert tokenizer.decode(plain.ids) == "1 + 1"
    with pytest.raises(ValueError, match="has no chat template"):
        encoded(str(tiny_folder / "target"), [message])
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>{% if add_generation_prompt %}:{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    (asked,) = encoded(str(tmp_path), [message])
    assert tokenizer.decode(asked.ids) == "<1 + 1>:"


def test_cost_files_are_read_before_anything_is_measured() -> None:
    preset = next(iter(PRESETS))
    assert costs([f"dflash={preset}", f"ngram={preset}"]) == {"dflash": preset, "ngram": preset}
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        costs(["dflash=nowhere.json"])
    with pytest.raises(ValueError, match="write a drafter and a file"):
        costs(["costs.json"])


def test_draft_models_are_the_targets_own_unless_others_are_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    none = dict.fromkeys(("dflash", "assistant"))
    own = {"dflash": str(shipped("drafter")), "assistant": str(shipped("assistant"))}
    assert draft_models(str(shipped("target")), none) == own
    assert draft_models(str(shipped("target")), {"assistant": "./mine"}) == {"assistant": "./mine"}
    assert draft_models(str(tiny_folder / "target"), none) == {}
    monkeypatch.setattr(
        "bpkit.assets.known.KnownModel._places_of_drafters", lambda self: iter([tmp_path / self.drafters])
    )
    assert draft_models("smollm2", none) == {}
    drafter = tmp_path / "bpkit_smollm2" / "drafter"
    drafter.mkdir(parents=True)
    assert draft_models("smollm2", none) == {"dflash": str(drafter)}
    assert shown(str(drafter)) == "smollm2 drafter"
    assert shown("/somewhere/else") == "else"
    monkeypatch.setenv("BPKIT_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="bpkit models fetch smollm2"):
        draft_models("smollm2", {"assistant": "smollm2"})  # it may draft for another


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"{domain}-{split}", "domain": domain, "split": split, "prompt": f"{domain}: 1, 2, 3, 1, 2,"}
        for domain in "ab"
        for split in ("test", "train")
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_prompts_of_one_split(prompts: Path) -> None:
    assert [prompt.id for prompt in texts(prompts=prompts, split="test")] == ["a-test", "b-test"]
    assert [prompt.id for prompt in texts(prompts=prompts, limit=1, domain=["b"])] == ["b-test"]
    with pytest.raises(ValueError, match="its splits: test, train"):
        texts(prompts=prompts, split="closed")
    chosen = texts(prompts=Path("instructions"), split="test", limit=2)
    assert {prompt.split for prompt in chosen} == {"test"}
    assert all(prompt.chat for prompt in chosen)


@pytest.mark.slow
def test_the_command_from_end_to_end(
    recipe: Callable[..., Result], tiny_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out, drafts = tmp_path / "peers.json", drafts_in(tiny_folder)
    result = recipe(
        *("bench-peers", "--target", tiny_folder / "target", "--prompts", prompts, "--split", "test"),
        *("--dflash", drafts["dflash"], "--assistant", drafts["assistant"], "--max-new-tokens", NEW_TOKENS),
        *("--peer", "transformers-lookup:4", "--peer", "flashspec", "-p", "fixed:3@assistant"),
        *("--json", out),
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["settings"]["prompts"] == ["a-test", "b-test"]
    assert report["left_out"] == {"flashspec": GET_FLASHSPEC}
    entries = report["overall"]["contestants"]
    assert list(entries) == [GENERATE, LOOP, "transformers-lookup:4", "fixed:3@assistant"]
    assert all(entry["equal_texts"] == 2 for entry in entries.values())
    assert entries[LOOP]["acceptance_length"] == entries[GENERATE]["acceptance_length"] == 1
    assert entries["fixed:3@assistant"]["acceptance_length"] > 1
    assert entries[LOOP]["over_plain"] == entries[GENERATE]["over_generate"] == 1
    assert len(report["measurements"]) == 2 * 4
    cores = report["machine"]["cores"]
    assert {name: 1 <= count <= cores for name, count in report["machine"]["threads"].items()} == dict.fromkeys(
        entries, True
    )
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    for part in ("fixed:3@assistant", "Left out: flashspec: ", "over"):
        assert part in result.stdout
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.skipif("BPKIT_FLASHSPEC_PYTHON" not in os.environ, reason="BPKIT_FLASHSPEC_PYTHON names no interpreter")
def test_flashspec_decodes_the_same(tiny_folder: Path, plain_tokens: list[int]) -> None:
    found, left_out = line_up(
        ["flashspec", "flashspec-model:3"], [], drafts_in(tiny_folder), {}, os.environ["BPKIT_FLASHSPEC_PYTHON"]
    )
    assert left_out == {}
    with ExitStack() as resources:
        running = Contest(resources)
        running.load(str(tiny_folder / "target"), found[2:])
        assert running.left_out == {}
        for name in running.names:
            reply = running.ask(name, ids=IDS, max_new_tokens=NEW_TOKENS, threads=1, stream=0, trial=False)
            assert reply is not None, running.left_out
            assert reply["tokens"] == plain_tokens
            assert 0 < reply["steps"] < reply["step_tokens"] == len(plain_tokens)
