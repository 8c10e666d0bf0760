"""Tracing with a large vocabulary holds a few positions of it at a time, however long the output is."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from bpkit import SpeculativeDecoder
from bpkit.decode.drafter import Drafter
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer, pieces
from bpkit.trace.collect.pieces import Positions, positions_at_once
from bpkit.trace.collect.target_pass import target_pass
from bpkit.trace.collect.tracer import Output
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature
from tests.tiny_architectures import REPEATING, disturbed, repeating_causal_lm, tiny_dflash

VOCABULARY = 151_936
FEATURES = frozenset({Feature.ANCHOR_LOG_PROBABILITY, Feature.ANCHOR_ENTROPY, Feature.DRAFT_HIDDEN})


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the arrays with a vocabulary's width that are alive, after every operation of torch."""

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width = width
        self.alive: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        fresh = [t for t in made if isinstance(t, Tensor) and t.dim() and t.shape[-1] == self.width]
        if fresh:
            self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(t) for t in fresh]
            storages = [t.untyped_storage() for ref in self.alive if (t := ref()) is not None]
            self.peak = max(self.peak, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        return result


@pytest.fixture(scope="module")
def large() -> PreTrainedModel:
    return repeating_causal_lm("llama", vocab_size=VOCABULARY, layers=1)


@torch.inference_mode()
def traced(target: PreTrainedModel, drafter: Drafter, count: int, **options: Any) -> PromptTrace:
    """The trace of `count` tokens drawn at random, as if they were an output."""
    decoder = SpeculativeDecoder(target, drafter, "fixed:2")
    tracer = Tracer(decoder, TraceOptions(block_sizes=(2, 4), max_new_tokens=count, features=FEATURES, **options))
    tokens = torch.randint(0, 90, (1, 4 + count), generator=torch.Generator().manual_seed(2))
    run = decoder.run(tokens[:, :4], max_new_tokens=count, **options["sampling"], seed=options["seed"])
    output = Output(0, Prompt("a", "tiny", ""), tokens[:, :4], tokens[:, 4:], run.request.sampler.processors)
    (trace,) = tracer.retraced([output])
    return trace


@pytest.mark.parametrize("drafter", ["block-diffusion", "autoregressive"])
def test_no_more_of_a_large_vocabulary_is_held_than_is_allowed(
    large: PreTrainedModel, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_dflash(large) if drafter == "block-diffusion" else AutoregressiveDrafter(disturbed(large), large)
    allowed = 48 * 2**20
    peaks = []
    for limit in (allowed, 2**40):
        monkeypatch.setattr(pieces, "VOCABULARY_BYTES", limit)
        with Watched(VOCABULARY) as watched:
            traced(large, made, 14, sampling={"temperature": 1.0}, seed=3)
        peaks.append(watched.peak)
    assert peaks[0] <= allowed
    assert peaks[1] > 2 * allowed, "what a limit prevents would have fitted: the check shows nothing"


@pytest.mark.parametrize("drafter", ["block-diffusion", "autoregressive", "agreeable"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "repetition_penalty": 1.3}], ids=str
)
def test_a_trace_in_pieces_is_the_trace_in_one(
    pair: TinyPair, drafter: str, sampling: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Drafter = getattr(pair, drafter.replace("-", "_"))()
    seed = None if sampling["temperature"] == 0 else 3
    whole = traced(pair.target, made, 21, sampling=sampling, seed=seed)
    monkeypatch.setattr(pieces, "VOCABULARY_BYTES", 3 * 128 * len(pair.tokenizer))
    assert positions_at_once(len(pair.tokenizer)) == 3
    parts = traced(pair.target, made, 21, sampling=sampling, seed=seed)
    for name in ("prefill_top_tokens", "near_ties"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    for name in ("draft_length", "num_accepted", "tokens"):
        assert np.array_equal(getattr(whole.drafts, name), getattr(parts.drafts, name))
    assert whole.features.keys() == parts.features.keys() >= {Feature.ANCHOR_ENTROPY}
    assert whole.drafts.features.keys() == parts.drafts.features.keys()
    close = [(whole.features[name], parts.features[name]) for name in whole.features]
    close += [(whole.drafts.features[name], parts.drafts.features[name]) for name in whole.drafts.features]
    if seed is not None:
        assert whole.drafts.match_probability is not None
        assert parts.drafts.match_probability is not None
        close.append((whole.drafts.match_probability, parts.drafts.match_probability))
    for one, other in close:  # a product of few rows may round otherwise than one of many
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", [*REPEATING, "granite"])
def test_logits_in_pieces_are_those_of_the_model(architecture: str) -> None:
    """Also where the model caps them after its head, or does there what only it knows."""
    options: dict[str, Any] = {"logits_scaling": 3.0} if architecture == "granite" else {}
    model = repeating_causal_lm(architecture, **options)
    prompt, tokens = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[9, 2, 6, 5, 3, 5, 8]])
    with torch.inference_mode():
        seen = target_pass(model, (0,), prompt, tokens)
        logits = torch.cat([seen.logits(slice(0, 4)), seen.logits(slice(4, 7))])
        wanted = model(torch.cat([prompt, tokens], dim=1)[:, :-1], use_cache=False).logits[0, -7:]
    assert (logits - wanted).abs().max() < 1e-5
    assert wanted.abs().max() > 0.5


def test_positions_are_made_once_in_rising_order_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def make(piece: slice) -> Tensor:
        asked.extend(range(piece.start, piece.stop))
        return torch.arange(piece.start, piece.stop)[:, None].expand(-1, 8).float()

    monkeypatch.setattr(pieces, "VOCABULARY_BYTES", 2 * 128 * 8)  # two at once, eight kept
    rows = Positions(11, 8, make)
    for first in range(9):
        assert rows[torch.tensor([first + 2, first, first + 1])][:, 0].tolist() == [first + 2, first, first + 1]
    assert asked == list(range(11))
    assert rows[torch.tensor([3])][0, 0] == 3
    assert len(asked) == 11
    assert rows[torch.tensor([0])][0, 0] == 0
    assert asked[11:] == [0, 1]
    with pytest.raises(IndexError, match="positions 4 to 11 were asked for, of 11"):
        rows[torch.tensor([11, 4])]
