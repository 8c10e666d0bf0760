"""Prompts that are traced together: each has the trace that it has alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.products import quick_products, use_products
from bpkit.draft.ngram import NgramDrafter
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer, tracer
from bpkit.trace.collect.job import describe, run_job
from bpkit.trace.collect.workers import tasks_of
from bpkit.trace.store.joined import open_trace
from bpkit.types import Feature
from tests.test_trace_job import PROMPTS, SIZES, assert_same
from tests.tiny_architectures import REPEATING, repeating_causal_lm

if TYPE_CHECKING:
    from tests.conftest import ShippedPair

FEATURES = frozenset({Feature.LAST_HIDDEN, Feature.TARGET_FEATURES, Feature.ANCHOR_ENTROPY, Feature.DRAFT_HIDDEN})
CLOSE = 1e-4
"""What rounding makes of hidden states and logits in passes of other widths."""
DRAFTERS: dict[str, Callable[[TinyPair], Any]] = {
    "block-diffusion": lambda pair: pair.block_diffusion(),
    "autoregressive": lambda pair: pair.autoregressive(),
    "early-exit": lambda pair: pair.early_exit(),
    "agreeable": lambda pair: pair.agreeable(),
    "n-gram": lambda pair: NgramDrafter(),
}
SAMPLINGS = {
    "greedy": ({"temperature": 0.0}, None),
    "sampled": ({"temperature": 1.0, "top_p": 0.95}, 5),
    "penalised": ({"temperature": 0.0, "repetition_penalty": 1.3}, None),
}


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [(kind, sampling) for kind in DRAFTERS for sampling in SAMPLINGS if kind != "agreeable" or sampling == "sampled"],
)
def test_prompts_together_have_the_traces_that_they_have_alone(
    pair: TinyPair, kind: str, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tracer, "TOGETHER", 150
    )  # outputs are traced in groups of two or three, and read in smaller ones
    monkeypatch.setattr(tracer, "READ_AT_ONCE", 80)  # and read one or two together
    decoder = SpeculativeDecoder(pair.target, DRAFTERS[kind](pair), "fixed:4", tokenizer=pair.tokenizer)
    features = FEATURES - (FEATURES if kind == "n-gram" else frozenset())
    new_tokens = 6 if kind == "agreeable" else 24  # it is asked block by block
    options = TraceOptions(SIZES, new_tokens, *SAMPLINGS[sampling], features)
    prompts = [(3 * i, prompt) for i, prompt in enumerate(PROMPTS)]
    alone = list(Tracer(decoder, options).traces(prompts))
    together = sorted(Tracer(decoder, options, batch_size=4).traces(prompts), key=lambda trace: trace.index)
    assert [trace.index for trace in together] == [0, 3, 6, 9, 12, 15]
    assert_same(together, alone, close=CLOSE)
    assert sum(trace.drafts.rows for trace in alone) > 2 * new_tokens


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_prompts_of_the_shipped_pair_together_have_the_traces_that_they_have_alone(
    shipped: ShippedPair, sampling: str
) -> None:
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:4", tokenizer=shipped.tokenizer)
    options = TraceOptions((2, 5, 16), 16, *SAMPLINGS[sampling])
    texts = ["Question: A pen costs $2. How much do 7 pens cost?\nAnswer:", '{"id": 1, "name": "Ada"}\n', "def f(x):"]
    prompts = list(enumerate(Prompt(str(i), "x", text) for i, text in enumerate(texts)))
    alone = list(Tracer(decoder, options).traces(prompts))
    together = sorted(Tracer(decoder, options, batch_size=3).traces(prompts), key=lambda trace: trace.index)
    assert sum(len(trace.near_ties) for trace in alone) == 0
    assert_same(together, alone, close=CLOSE)


@pytest.mark.parametrize("architecture", REPEATING)
def test_outputs_of_other_architectures_are_read_together_or_one_by_one(architecture: str) -> None:
    """Whether the rows of a target may share passes, as those with windows may, or not."""
    model = repeating_causal_lm(architecture)
    decoder = SpeculativeDecoder(model, "ngram", "fixed:4")
    options = TraceOptions((2, 4), 12, features=frozenset({Feature.LAST_HIDDEN}))
    asked = [torch.tensor([ids]) for ids in ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9])]

    def traces(batch_size: int) -> list[Any]:
        traced = Tracer(decoder, options, batch_size=batch_size)
        outputs = []
        generations = decoder.generate(asked, batch_size=batch_size, max_new_tokens=12, temperature=0.0)
        for index, generation in enumerate(generations):
            outputs.append(traced._output(index, Prompt(str(index), "x", ""), generation))
        return traced.retraced(outputs) if batch_size > 1 else [t for o in outputs for t in traced.retraced([o])]

    assert_same(traces(3), traces(1), close=CLOSE)


def test_a_job_goes_on_where_a_batch_was_stopped(pair: TinyPair, tmp_path: Path) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions(SIZES, 8)
    manifest = describe(decoder, PROMPTS, options)
    run_job(tmp_path / "whole", manifest, PROMPTS, Tracer(decoder, options))

    class StopsEarly(Tracer):
        def traces(self, prompts: Any) -> Any:
            for done, trace in enumerate(super().traces(prompts)):
                if done == 3:
                    raise KeyboardInterrupt
                yield trace

    with pytest.raises(KeyboardInterrupt):
        run_job(tmp_path / "parts", manifest, PROMPTS, StopsEarly(decoder, options, batch_size=2))
    run_job(tmp_path / "parts", manifest, PROMPTS, Tracer(decoder, options, batch_size=2))
    assert_same(open_trace(tmp_path / "parts"), open_trace(tmp_path / "whole"), close=CLOSE)


def test_a_prompt_that_cannot_be_decoded_is_named(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    prompts = [*PROMPTS[:2], replace(PROMPTS[2], id="empty", text="")]
    with pytest.raises(ValueError, match=r"prompt 'empty': "):
        list(Tracer(decoder, TraceOptions(SIZES, 4), batch_size=2).traces(list(enumerate(prompts))))


def test_tasks_leave_no_worker_without_prompts() -> None:
    tasks = tasks_of(list(enumerate(PROMPTS)), 8, 4)
    assert [[index for index, _ in task] for task in tasks] == [[0, 1], [2, 3], [4, 5]]
    assert tasks_of([], 8, 4) == []


@pytest.mark.parametrize("pack", [False, True])
def test_quick_products_are_those_of_the_layers_and_leave_nothing_behind(pack: bool) -> None:
    torch.manual_seed(0)
    plain, biased = nn.Linear(24, 40, bias=False), nn.Linear(40, 8)
    model = nn.Sequential(plain, nn.SiLU(), biased)
    model.register_module("again", plain)
    values = torch.randn(3, 5, 24)
    with torch.inference_mode():
        wanted = nn.functional.linear(nn.functional.silu(plain(values)), biased.weight, biased.bias)
        with quick_products(model, biased, pack=pack), quick_products(model):
            assert "forward" in vars(plain)
            torch.testing.assert_close(model[:3](values), wanted)
    assert not any("forward" in vars(layer) for layer in model.modules())
    with quick_products(model, pack=pack):
        model[:3](values).sum().backward()  # those who need gradients are served by torch
    assert plain.weight.grad is not None


def test_decoding_with_other_products_gives_the_same_text_and_leaves_transformers_alone(pair: TinyPair) -> None:
    prompt, options = torch.tensor([[5, 6, 7, 8, 5, 6, 7]]), {"max_new_tokens": 24, "temperature": 0.0}
    text = SpeculativeDecoder(pair.target, NgramDrafter(), "fixed:4").generate(prompt, **options).tokens
    target = copy.deepcopy(pair.target)
    decoder = SpeculativeDecoder(target, NgramDrafter(), "fixed:4", products="onednn")
    linear = next(layer for layer in target.modules() if isinstance(layer, nn.Linear))
    values = torch.randn(3, linear.in_features)
    assert torch.equal(linear(values), nn.functional.linear(values, linear.weight, linear.bias))
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)
        assert torch.equal(linear(values), torch.ops.mkldnn._linear_pointwise(values, packed, None, "none", [], ""))
    assert decoder.with_policy("fixed:2").products == "onednn"
    for policy in ("fixed:1", "fixed:2", "fixed:4"):
        assert torch.equal(decoder.with_policy(policy).generate(prompt, **options).tokens, text)


def test_products_that_serve_no_layer_are_refused(pair: TinyPair) -> None:
    with pytest.raises(ValueError, match="'onednn' are for linear layers in float32 on an x86 CPU"):
        use_products("onednn", copy.deepcopy(pair.target).to(torch.bfloat16))
    use_products("auto", copy.deepcopy(pair.target).to(torch.bfloat16))  # stays as it is
    with pytest.raises(ValueError, match="not 'mkl'"):
        use_products("mkl", pair.target)  # type: ignore[arg-type]


def test_quick_products_end_with_an_error() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(KeyError), quick_products(layer):
        raise KeyError
    assert "forward" not in vars(layer)
