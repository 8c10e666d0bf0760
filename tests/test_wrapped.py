"""Targets that are wrapped, and where targets are put when they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpkit import SpeculativeDecoder
from bpkit.decode import decoder as decoder_module
from bpkit.decode.pretrained import inside
from bpkit.testing import TinyPair, tiny_pair

PROMPT = "def f(a, b):\n    return "


class Tuner(nn.Module):
    """As a tuner of PEFT: it holds the model whose layers it changed, and passes everything on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Adapted(nn.Module):
    """As `PeftModelForCausalLM`: `generate` and attributes are those of the model inside, passes run through it."""

    def __init__(self, model: PreTrainedModel, *, is_prompt_learning: bool = False) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        self.active_peft_config = SimpleNamespace(is_prompt_learning=is_prompt_learning, peft_type="PROMPT_TUNING")
        self.passes = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def generate(self, *args: Any, **options: Any) -> Any:
        return self.base_model.generate(*args, **options)

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        self.passes += 1
        return self.base_model(input_ids=input_ids, **inputs)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": torch.compile,
    "an adapter": Adapted,
    "data parallelism": nn.DataParallel,
    "a compiled adapter": lambda model: torch.compile(Adapted(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_target_is_served_and_passes_run_through_the_wrapper(pair: TinyPair, name: str) -> None:
    wrapper = WRAPPERS[name](pair.target)
    ids = pair.ids(PROMPT)
    wanted = pair.target.generate(ids, max_new_tokens=20, do_sample=False)
    decoder = SpeculativeDecoder(wrapper, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer, strict=True)
    passes: list[int] = []
    handle = wrapper.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with torch.compiler.set_stance("force_eager"):
            made = decoder.generate(ids, temperature=0, max_new_tokens=20)
            assert made.sequences.equal(wanted)
            assert len(passes) == len(made.steps) + 1
            for model in (wrapper, pair.target):
                if hasattr(model, "generate"):
                    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
                    assert model.generate(input_ids=ids, custom_generate=decoder, **options).equal(wanted)
            assert decoder.generate(ids, drafter="ngram", temperature=0, max_new_tokens=20).sequences.equal(wanted)
    finally:
        handle.remove()
    assert inside(wrapper) is pair.target


def test_another_model_inside_is_refused(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(torch.compile(pair.target), "ngram")
    with pytest.raises(ValueError, match="made for another target"):
        Adapted(tiny_pair(seed=1).target).generate(pair.ids(PROMPT), custom_generate=decoder, max_new_tokens=4)


def test_virtual_tokens_before_every_pass_are_refused(pair: TinyPair) -> None:
    tuned: Any = Adapted(pair.target, is_prompt_learning=True)
    with pytest.raises(ValueError, match=r"adapter \(PROMPT_TUNING\) puts virtual tokens .* such as LoRA"):
        SpeculativeDecoder(tuned, "ngram")


def test_what_holds_no_model_of_transformers_is_refused() -> None:
    other: Any = nn.DataParallel(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"the target is a DataParallel, in which there is no model of transformers"):
        SpeculativeDecoder(other, "ngram")


# Where a loaded target goes.


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, pair: TinyPair) -> tuple[list[dict[str, Any]], list[Any]]:
    """Options that targets are loaded with, and where they are moved; the target is the tiny one."""
    options: list[dict[str, Any]] = []
    moves: list[Any] = []

    def load(path: str, **given: Any) -> PreTrainedModel:
        options.append(given)
        return pair.target

    def to(*given: Any, **more: Any) -> PreTrainedModel:
        moves.append(given or more)
        return pair.target

    monkeypatch.setattr(decoder_module, "load_causal_lm", load)
    monkeypatch.setattr(pair.target, "to", to)
    return options, moves


def test_a_device_map_is_passed_on_and_nothing_is_moved(loaded: Any, tiny_folder: Path) -> None:
    options, moves = loaded
    SpeculativeDecoder.from_pretrained(tiny_folder / "target", "ngram", device_map={"": "cpu"})
    assert options[0]["device_map"] == {"": "cpu"}
    assert moves == []
    SpeculativeDecoder.from_pretrained(tiny_folder / "target", "ngram", device="cpu")
    assert "device_map" not in options[1]
    assert moves == [("cpu",)]


def test_a_quantised_target_is_not_moved(
    loaded: Any, tiny_folder: Path, pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.target, "is_quantized", True, raising=False)
    SpeculativeDecoder.from_pretrained(tiny_folder / "target", "ngram")
    assert loaded[1] == []


def test_device_and_device_map_together_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto': give one of them"):
        SpeculativeDecoder.from_pretrained(tiny_folder / "target", "ngram", device="cpu", device_map="auto")


def test_ids_go_to_where_the_embeddings_read_them(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PreTrainedModel] = []

    def input_device(model: PreTrainedModel) -> torch.device:
        seen.append(model)
        return torch.device("cpu")

    monkeypatch.setattr(decoder_module, "input_device", input_device)
    SpeculativeDecoder(pair.target, "ngram", tokenizer=pair.tokenizer).generate(PROMPT, max_new_tokens=2)
    assert seen[0] is pair.target


def test_ids_on_another_device_are_refused(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, "ngram")
    with pytest.raises(ValueError, match="input_ids are on meta, the target reads them on cpu"):
        decoder(
            pair.target,
            pair.ids(PROMPT).to("meta"),
            *(None, None),
            pair.target.generation_config,
            use_cache=True,
        )
