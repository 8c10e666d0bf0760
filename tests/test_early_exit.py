"""Early exit: what it shares with its target, what it refuses, and how it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bpkit import SpeculativeDecoder
from bpkit.assets import prompts
from bpkit.decode.parts import new_layer, reads_alike, with_layers
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.draft.early_exit import EarlyExitDrafter, save_exit
from bpkit.testing import TinyPair, tiny_pair
from bpkit.testing.models import EXIT_LAYER
from tests.tiny_architectures import tiny_causal_lm


def test_a_folder_holds_one_layer_and_what_target_it_is_for(pair: TinyPair, tiny_folder: Path) -> None:
    weights = load_file(tiny_folder / "exit" / "model.safetensors")
    assert set(weights) == set(pair.target.model.layers[0].state_dict())
    drafter = resolve_drafter(str(tiny_folder / "exit"), pair.target)
    assert isinstance(drafter, EarlyExitDrafter)
    assert drafter.layer == EXIT_LAYER
    shared = drafter.model.model.layers[0].mlp.up_proj.weight
    assert shared is pair.target.model.layers[0].mlp.up_proj.weight
    assert drafter.model.get_output_embeddings() is pair.target.get_output_embeddings()


def test_all_layers_but_those_between_give_the_target_itself(pair: TinyPair) -> None:
    drafter = EarlyExitDrafter(new_layer(pair.target, -1), pair.target, layer=3)  # the target has 4
    made = SpeculativeDecoder(pair.target, drafter, "fixed:5").generate(pair.ids("x = "), max_new_tokens=21)
    assert [int(step.num_accepted) for step in made.steps[:-1]] == [4] * (len(made.steps) - 1)


def test_a_target_is_what_it_was_beside_its_part(pair: TinyPair) -> None:
    ids = pair.ids("def f(a, b)")
    before = pair.target(ids, output_hidden_states=True)
    pair.early_exit()
    after = pair.target(ids, output_hidden_states=True)
    assert len(after.hidden_states) == len(before.hidden_states) == 5
    assert after.logits.equal(before.logits)
    assert pair.target.config.num_hidden_layers == 4
    assert pair.target.model.layers[-1].self_attn.layer_idx == 3


def test_another_target_is_refused(pair: TinyPair, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tiny_folder / "exit"
    with pytest.raises(ValueError, match="for another target of this shape"):
        EarlyExitDrafter.load(str(folder), tiny_pair(seed=1).target)
    with pytest.raises(ValueError, match="whose num_hidden_layers is 4, and this one's is 3"):
        EarlyExitDrafter.load(str(folder), pair.assistant)
    with pytest.raises(ValueError, match="holds no early exit"):
        EarlyExitDrafter.load(str(tiny_folder / "assistant"), pair.target)
    with pytest.raises(ValueError, match="this target has 4, of which 1 to 3 may be below it"):
        EarlyExitDrafter(new_layer(pair.target, -1), pair.target, layer=4)
    save_exit(torch.nn.Linear(2, 2), pair.target, 2, tmp_path)
    with pytest.raises(ValueError, match="are not those of a layer of this target"):
        EarlyExitDrafter.load(str(tmp_path), pair.target)
    bfloat16 = tiny_pair().target.to(torch.bfloat16)  # the same weights
    assert EarlyExitDrafter.load(str(folder), bfloat16).layer == EXIT_LAYER


def test_a_decoder_without_a_list_of_layers_is_refused(pair: TinyPair) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="no decoder of text that keeps its layers in a list `layers`"):
        EarlyExitDrafter(torch.nn.Identity(), gpt2, layer=1)


def test_a_part_that_reads_otherwise_is_told(pair: TinyPair) -> None:
    layers = pair.target.model.layers
    assert reads_alike(pair.target, with_layers(pair.target, layers[:3], range(3)), 2)
    assert not reads_alike(pair.target, with_layers(pair.target, [layers[1], layers[0], layers[2]], range(3)), 2)


@pytest.mark.slow
def test_training_makes_an_exit_that_agrees_more(pair: TinyPair, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from bpkit.learn.training.answers import DrafterRun
    from bpkit.learn.training.early_exit import ExitLoss, train_exit

    quick: dict[str, Any] = {"max_minutes": 2.0, "accelerator": "cpu", "batch_size": 4}
    run = DrafterRun(sequences=76, new_tokens=12, max_steps=40, **quick)
    target = str(tiny_folder / "target")
    train_exit(target, tmp_path / "exit", prompts=["x = ", "def f(a):", "1, 2, 3"], run=run, layer=2)
    config = json.loads((tmp_path / "exit" / "config.json").read_text(encoding="utf-8"))
    assert config["layer"] == 2
    assert (tmp_path / "exit" / "provenance.json").is_file()
    answers = load_file(tmp_path / "exit" / "outputs.safetensors")
    batch = answers["ids"][:64].long(), answers["prompt_length"][:64], answers["length"][:64]
    before = ExitLoss(new_layer(pair.target, -1), pair.target, 2)
    after = ExitLoss(EarlyExitDrafter.load(str(tmp_path / "exit"), pair.target).exit, pair.target, 2)
    with torch.no_grad():
        assert float(after(*batch)) < 0.8 * float(before(*batch))
    assert float(after.agreement(*batch)) > float(before.agreement(*batch))
    again = DrafterRun(
        answers=tmp_path / "exit" / "outputs.safetensors", start_from=tmp_path / "exit", rate=0.0, max_steps=2, **quick
    )
    train_exit(target, tmp_path / "again", prompts=[], run=again)
    kept = load_file(tmp_path / "exit" / "model.safetensors")
    assert all(value.equal(kept[name]) for name, value in load_file(tmp_path / "again" / "model.safetensors").items())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox", "granite"])
def test_targets_of_many_kinds_are_shared(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    target = tiny_causal_lm(model_type)
    drafter, accepted = made_for(target), 0
    monkeypatch.setattr(drafter, "begin", None)  # it must not come to that
    texts = [torch.arange(3, 3 + length)[None] for length in (3, 9, 14)]
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 0}):
        wanted: dict[str, Any] = {"max_new_tokens": 9, "seed": 3, "eos_token_id": None, **options}
        plain = SpeculativeDecoder(target, "ngram", "fixed:1").generate(texts, batch_size=1, **wanted)
        made = SpeculativeDecoder(target, drafter, "fixed:4", strict=True).generate(texts, batch_size=2, **wanted)
        assert [one.tokens.tolist() for one in made] == [one.tokens.tolist() for one in plain]
        accepted += sum(int(step.num_accepted) for one in made for step in one.steps)
    assert accepted > 4


def test_hybrids_are_refused() -> None:
    for model_type in ("bamba", "mamba"):
        with pytest.raises(ValueError, match="cannot be"):
            made_for(tiny_causal_lm(model_type))


def made_for(target: PreTrainedModel) -> EarlyExitDrafter:
    return EarlyExitDrafter(new_layer(target, -1), target, layer=2)


def test_the_first_layers_read_a_prompt_once(pair: TinyPair) -> None:
    read: list[int] = []
    hook = pair.target.model.layers[0].register_forward_hook(lambda layer, given, made: read.append(made.shape[1]))
    drafter, ids = pair.early_exit(), pair.ids("The quick brown fox jumps over the lazy dog")
    decoders = [SpeculativeDecoder(pair.target, drafter, "fixed:4", capture=mode) for mode in ("off", "on")]
    totals = []
    for decoder in decoders:
        read.clear()
        made = decoder.generate(ids, max_new_tokens=16, temperature=0, eos_token_id=None)
        totals.append(sum(read))
        if decoder is decoders[0]:
            # The last token of a draft is read by the target alone.
            drafted = sum(int(step.draft_length) for step in made.steps)
            verified = sum(int(step.verify_length) + 1 for step in made.steps)
            assert totals == [ids.shape[1] + drafted + verified]
            texts = made.tokens
        else:
            assert made.tokens.equal(texts)
    hook.remove()
    assert totals[1] >= totals[0] + ids.shape[1], "where passes are captured it reads by itself"


def test_the_shipped_exit_drafts_for_the_shipped_target() -> None:
    decoder = SpeculativeDecoder.from_pretrained(drafter="early-exit", policy="fixed:4")
    assert decoder.spec.drafter == "shipped exit"
    text = prompts("structured", limit=1)[0]["prompt"]
    made = decoder.generate(text, max_new_tokens=24, temperature=0)
    assert made.acceptance_length > 1.5
    assert made.text == decoder.with_policy("fixed:1").generate(text, max_new_tokens=24, temperature=0).text
