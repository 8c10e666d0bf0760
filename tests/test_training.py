"""The recipes run end to end on small things, resume, and mask what they say."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bpkit import SpeculativeDecoder
from bpkit.assets import prompts
from bpkit.draft.dflash_model import block_attention_mask
from bpkit.draft.own_layers import leave_out_embeddings, load_own_layers, own_weights
from bpkit.learn.training.answers import DrafterRun, target_answers
from bpkit.learn.training.assistant import DistillationLoss, first_layers, train_assistant
from bpkit.learn.training.drafter import position_weights, train_drafter
from bpkit.learn.training.model import ModelRun, learning_rate_factor
from bpkit.learn.training.provenance import write_provenance
from bpkit.testing import TinyPair
from bpkit.types import AUTOREGRESSIVE
from recipes.pair import structured
from recipes.pair.corpus import maths_documents, training_documents, training_prompts
from recipes.pair.target import train_target

QUICK: dict[str, Any] = {"max_steps": 3, "max_minutes": 2.0, "accelerator": "cpu", "batch_size": 4}
ANSWERS = DrafterRun(layers=1, sequences=76, new_tokens=12, **QUICK)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small target and two drafters for it, each trained for three steps on a little text."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda: {"stdlib": Path(json.__file__).parent})
        patch.setattr("recipes.pair.target.training_documents", a_little_text)
        train_all(folder)
    return folder


def a_little_text(maths: Path | None, **options: Any) -> dict[str, list[str]]:
    return training_documents(maths, **{**options, "structured_count": 60})


def train_all(folder: Path) -> None:
    maths = folder / "maths.jsonl"
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a}+{b}={a + b}"} for a in range(20) for b in range(20)]
    maths.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train_target(
        folder / "target",
        maths=maths,
        run=ModelRun(**QUICK),
        layers=4,
        hidden_size=64,
        vocab_size=320,
        length=64,
    )
    train_drafter(
        str(folder / "target"),
        folder / "drafter",
        prompts=training_prompts(maths, per_domain=40, seed=0),
        run=ANSWERS,
        block_size=8,
    )
    train_assistant(
        str(folder / "target"),
        folder / "assistant",
        prompts=training_prompts(maths, per_domain=40, seed=0),
        run=ANSWERS,
    )


@pytest.mark.slow
def test_an_autoregressive_drafter_is_cut_from_the_target_and_decodes_without_loss(trained: Path) -> None:
    decoder = SpeculativeDecoder.from_pretrained(trained / "target", str(trained / "assistant"), strict=True)
    assert decoder.drafter.kind == AUTOREGRESSIVE
    assert decoder.drafter.model.config.num_hidden_layers == 1  # type: ignore[attr-defined]
    texts = {decoder.with_policy(f"fixed:{b}").generate("1 + 1", max_new_tokens=20).text for b in (1, 3, 8)}
    assert len(texts) == 1
    weights = load_file(trained / "assistant" / "model.safetensors")
    assert not any("embed" in name or "lm_head" in name for name in weights)
    assistant = decoder.drafter.model  # type: ignore[attr-defined]
    assert assistant.get_input_embeddings().weight is decoder.target.get_input_embeddings().weight
    assert assistant.get_output_embeddings().weight is decoder.target.get_output_embeddings().weight


@pytest.mark.slow
def test_distillation_begins_at_the_target_and_learns_its_distributions(trained: Path) -> None:
    target = AutoModelForCausalLM.from_pretrained(trained / "target", dtype=torch.float32)
    drafter = first_layers(target, 2)
    kept = target.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in drafter.state_dict().items())
    loss = DistillationLoss(drafter, target)
    torch.manual_seed(0)
    batch = torch.randint(3, 300, (4, 16)), torch.tensor([2, 2, 2, 2]), torch.tensor([16, 16, 9, 12])
    before = float(loss(*batch).detach())
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()
    assert 0 <= float(loss(*batch).detach()) < before
    assert float(DistillationLoss(target, target)(*batch)) == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
def test_padding_does_not_count_in_distillation(trained: Path) -> None:
    target = AutoModelForCausalLM.from_pretrained(trained / "target", dtype=torch.float32)
    loss = DistillationLoss(first_layers(target, 1), target)
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, 9:] = 5
    lengths = torch.tensor([2, 2]), torch.tensor([9, 9])
    assert float(loss(ids, *lengths)) == pytest.approx(float(loss(other, *lengths)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [0, 4, 9])
def test_a_drafter_has_fewer_layers_than_its_target(trained: Path, layers: int) -> None:
    target = AutoModelForCausalLM.from_pretrained(trained / "target")
    with pytest.raises(ValueError, match=f"its 4 layers .* with {layers} layers cannot be cut"):
        first_layers(target, layers)


@pytest.mark.slow
def test_trained_pair_decodes_without_loss(trained: Path) -> None:
    decoder = SpeculativeDecoder.from_pretrained(trained / "target", str(trained / "drafter"), strict=True)
    assert decoder.spec.trained_block_size == 8
    texts = {decoder.with_policy(f"fixed:{b}").generate("1 + 1", max_new_tokens=20).text for b in (1, 3, 8, 16)}
    assert len(texts) == 1


@pytest.mark.slow
def test_checkpoints_are_written_in_bfloat16(trained: Path) -> None:
    for name in ("target", "drafter", "assistant"):
        weights = load_file(trained / name / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_provenance_says_what_made_an_artifact_and_keeps_no_path(trained: Path) -> None:
    for name, key in (("target", "maths"), ("drafter", "prompts"), ("assistant", "prompts")):
        text = (trained / name / "provenance.json").read_text(encoding="utf-8")
        facts = json.loads(text)
        assert len(facts["data"][key]) == 64
        assert facts["arguments"]["max_steps"] == 3
        assert str(trained) not in text


def test_a_failed_write_leaves_the_old_provenance_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_provenance(tmp_path, "recipe", {"max_minutes": float("inf"), "file": tmp_path / "x"}, {"data": "d"})
    before = (tmp_path / "provenance.json").read_bytes()
    assert json.loads(before)["arguments"] == {"max_minutes": "inf", "file": "x"}

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_provenance(tmp_path, "recipe", {"seed": 2}, {})
    assert (tmp_path / "provenance.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]


@pytest.mark.slow
def test_outputs_are_reused_and_hold_prompt_and_answer(trained: Path) -> None:
    data = load_file(trained / "drafter" / "outputs.safetensors")
    assert len(data["ids"]) == 76
    assert bool((data["length"] > data["prompt_length"]).all())
    assert bool((data["length"] <= data["prompt_length"] + 12).all())


@pytest.mark.slow
def test_a_drafter_goes_on_from_an_earlier_one_on_the_answers_of_another_run(trained: Path, tmp_path: Path) -> None:
    again = replace(ANSWERS, answers=trained / "drafter" / "outputs.safetensors", max_steps=1, rate=0.0)
    target = str(trained / "target")
    train_drafter(
        target, tmp_path / "drafter", prompts=[], run=replace(again, start_from=trained / "drafter"), block_size=8
    )
    train_assistant(
        target, tmp_path / "assistant", prompts=[], run=replace(again, start_from=trained / "assistant", layers=3)
    )
    for name in ("drafter", "assistant"):  # at a rate of zero, nothing changes
        before, after = (load_file(folder / name / "model.safetensors") for folder in (trained, tmp_path))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        data = json.loads((tmp_path / name / "provenance.json").read_text())["data"]
        assert list(data) == ["answers"]


def test_without_a_mask_token_it_is_said_how_to_name_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(mask_token_id=None)
    monkeypatch.setattr("bpkit.learn.training.drafter.load_target", lambda path, run: (tokenizer, None))
    with pytest.raises(ValueError, match=r"tokenizer of some/model has no mask token: .* --mask-token"):
        train_drafter("some/model", tmp_path, prompts=[], run=ANSWERS)


@pytest.mark.slow
def test_a_drafter_with_an_embedding_of_its_own_keeps_it(trained: Path, tmp_path: Path) -> None:
    decoder = SpeculativeDecoder.from_pretrained(trained / "target", str(trained / "assistant"))
    whole = copy.deepcopy(decoder.drafter.model)  # type: ignore[attr-defined]
    whole.config.target_embeddings = False
    whole.get_input_embeddings().weight.data.mul_(2)
    whole.save_pretrained(tmp_path / "whole")
    again = replace(ANSWERS, answers=trained / "drafter" / "outputs.safetensors", max_steps=1, rate=0.0)
    run = replace(again, start_from=tmp_path / "whole")
    train_assistant(str(trained / "target"), tmp_path / "again", prompts=[], run=run)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)


def test_a_drafter_of_another_target_is_refused(pair: TinyPair, tmp_path: Path) -> None:
    model = first_layers(pair.target, 1)
    leave_out_embeddings(model)
    model.save_pretrained(tmp_path, state_dict=own_weights(model))
    assert load_own_layers(str(tmp_path), pair.target).get_input_embeddings() is pair.target.get_input_embeddings()
    other = copy.deepcopy(pair.target)
    other.resize_token_embeddings(other.config.vocab_size + 8)
    with pytest.raises(ValueError, match="shares the embedding of its target"):
        load_own_layers(str(tmp_path), other)


@pytest.mark.slow
def test_what_it_started_from_may_keep_a_share_of_the_result(trained: Path, tmp_path: Path) -> None:
    again = replace(ANSWERS, answers=trained / "drafter" / "outputs.safetensors", start_from=trained / "drafter")
    results = {0.0: "end", 0.5: "mean", 1.0: "start"}
    for share, name in results.items():
        run = replace(again, keep_start=share)
        train_drafter(str(trained / "target"), tmp_path / name, prompts=[], run=run, block_size=8)
    end, mean, start = (load_file(tmp_path / name / "model.safetensors") for name in results.values())
    before = load_file(trained / "drafter" / "model.safetensors")
    assert all(torch.equal(before[key], start[key]) for key in before)
    assert not torch.equal(before["fc.weight"], end["fc.weight"])
    assert all(torch.allclose((before[key] + end[key]) / 2, mean[key], atol=0.01) for key in before)


def test_answers_of_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    save_file({"ids": torch.zeros(80, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold more than 64 answers"):
        target_answers(None, None, [], tmp_path, DrafterRun(answers=tmp_path / "other.safetensors"))


@pytest.mark.slow
def test_a_finished_run_resumes_from_its_checkpoint_and_ends_at_once(trained: Path) -> None:
    before = load_file(trained / "drafter" / "model.safetensors")
    train_drafter(
        str(trained / "target"),
        trained / "drafter",
        prompts=["unused: the outputs are there"],
        run=ANSWERS,
        block_size=8,
    )
    after = load_file(trained / "drafter" / "model.safetensors")
    # One more step at a learning rate of zero changes nothing.
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_block_mask_equals_the_definition() -> None:
    anchors, block_size, context = torch.tensor([[2, 5], [1, 3]]), 3, 6
    mask = block_attention_mask(anchors, block_size, context)
    for row, query, key in itertools.product(range(2), range(6), range(12)):
        if key < context:
            expected = key < int(anchors[row, query // block_size])
        else:
            expected = query // block_size == (key - context) // block_size
        assert bool(mask[row, 0, query, key]) == expected


def test_position_weights_follow_the_paper() -> None:
    weights = position_weights(16, torch.device("cpu"))
    assert weights[0] == 1
    assert weights[7] == pytest.approx(torch.exp(torch.tensor(-1.0)).item())  # gamma is 7 at block size 16
    assert len(weights) == 15


def test_learning_rate_warms_up_holds_and_decays_to_zero() -> None:
    factors = [learning_rate_factor(i / 100) for i in range(101)]
    assert factors[0] < 0.1
    assert max(factors) == factors[20] == 1.0
    assert factors[-1] == 0.0
    assert all(a >= b for a, b in itertools.pairwise(factors[50:]))


def test_a_bad_line_of_maths_is_named(tmp_path: Path) -> None:
    path = tmp_path / "maths.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": "q"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"maths.jsonl, line 2.*'answer'"):
        list(maths_documents(path))


def test_structured_text_is_the_same_for_the_same_seed_and_differs_between_seeds() -> None:
    first, again, other = (list(structured.documents(24, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("domain", "held_out"), [("structured", False), ("formats", True)])
def test_shipped_structured_prompts_are_what_the_generator_makes(domain: str, held_out: bool) -> None:
    shipped = [p["prompt"] for p in prompts(domain)]
    assert shipped == list(structured.openings(len(shipped), held_out=held_out))


def test_no_record_of_a_shipped_structured_prompt_is_in_the_training_text() -> None:
    training = "\n".join(text for seed in (0, 1) for text in structured.documents(6000, seed=seed))
    for prompt in prompts("structured", "formats"):
        assert prompt["prompt"][:120] not in training, prompt["id"]


def test_held_out_formats_differ_from_those_of_training() -> None:
    for seen, unseen in zip(
        structured.documents(12, seed=5), structured.documents(12, seed=5, held_out=True), strict=True
    ):
        assert seen != unseen


def test_there_are_a_hundred_or_more_distinct_prompts_in_each_domain() -> None:
    for domain in ("maths", "code", "structured", "formats"):
        texts = [p["prompt"] for p in prompts(domain)]
        assert len(set(texts)) == len(texts) >= 100
