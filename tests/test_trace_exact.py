"""A trace equals the brute-force way: the live decoder with `fixed(b)` from every position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.records import PromptTrace
from bpkit.types import Context, Draft, Feature, Step

if TYPE_CHECKING:
    from tests.conftest import ShippedPair

CLOSE = 1e-5


class Jump(Policy):
    """No drafts until output position `position`, then one of `block_size`; notes what it saw of it."""

    wants = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})

    def __init__(self, position: int, block_size: int) -> None:
        super().__init__()
        self.position, self.block_size = position, block_size
        self.seen: dict[Feature, Tensor] = {}

    def select(self, state: Any, context: Context) -> Tensor:
        return context.full(self.block_size if int(context.position) == self.position else 1)

    def truncate(self, state: Any, draft: Draft) -> Tensor:
        self.seen = dict(draft.features)
        return draft.draft_length


def live_step(decoder: SpeculativeDecoder, prompt: Tensor, jump: Jump, **options: Any) -> Step:
    """The step that drafted."""
    run = decoder.with_policy(jump).run(prompt, **options)
    for record in run:
        if isinstance(record, Step) and record.position == jump.position:
            return record
    raise AssertionError(f"no step at position {jump.position}")


def check(trace: PromptTrace, decoder: SpeculativeDecoder, prompt: Tensor, **options: Any) -> int:
    """Compare every position and block size; returns how many drafted tokens were accepted in all."""
    drafts, accepted = trace.drafts, 0
    for row in range(drafts.rows):
        for column, block_size in enumerate(drafts.block_sizes.tolist()):
            jump = Jump(row + 1, block_size)
            step = live_step(decoder, prompt, jump, stream_id=trace.index, **options)
            length = int(step.draft_length)
            assert drafts.draft_length[row, column] == length
            assert drafts.num_accepted[row, column] == int(step.num_accepted)
            assert drafts.tokens[row, column, :length].tolist() == jump.seen[Feature.DRAFT_TOKENS][0].tolist()
            for name in (Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY):
                close = CLOSE * (name == Feature.DRAFT_ENTROPY)  # an entropy may be large: relative there
                np.testing.assert_allclose(
                    drafts.features[name][row, column, :length], jump.seen[name][0], atol=CLOSE, rtol=close
                )
                assert np.isnan(drafts.features[name][row, column, length:]).all()
            hidden = drafts.features[Feature.DRAFT_HIDDEN][row, column, :length]
            np.testing.assert_allclose(hidden, jump.seen[Feature.DRAFT_HIDDEN][0], atol=1e-3)
            accepted += int(step.num_accepted)
    return accepted


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 0.95},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_draft_of_a_tiny_pair_is_what_the_live_decoder_drafts(pair: TinyPair, setting: str) -> None:
    sampling = SETTINGS[setting]
    seed = None if sampling["temperature"] == 0 else 11
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions((2, 3, 5, 9), 14, sampling, seed, frozenset({Feature.DRAFT_HIDDEN}))
    trace = Tracer(decoder, options).trace(3, Prompt("a", "tiny", "f(x) = 2 * x"))
    assert trace.output_length > 8
    check(trace, decoder, pair.ids("f(x) = 2 * x"), max_new_tokens=14, seed=seed, **sampling)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("greedy", "Question: A pen costs $2. How much do 7 pens cost?\nAnswer:"),
        ("sampled", '{"id": 1, "name": "Ada"}\n'),
    ],
)
def test_every_draft_of_the_shipped_pair_is_what_the_live_decoder_drafts(
    shipped: ShippedPair, setting: str, text: str
) -> None:
    sampling = SETTINGS[setting]
    seed = None if sampling["temperature"] == 0 else 11
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:6", tokenizer=shipped.tokenizer)
    options = TraceOptions((2, 4, 7, 16, 20), 12, sampling, seed, frozenset({Feature.DRAFT_HIDDEN}))
    trace = Tracer(decoder, options).trace(1, Prompt("a", "x", text))
    prompt = shipped.tokenizer(text, return_tensors="pt")["input_ids"]
    accepted = check(trace, decoder, prompt, max_new_tokens=12, seed=seed, **sampling)
    assert accepted > 0
    assert len(trace.near_ties) == 0
    assert torch.equal(torch.from_numpy(trace.prompt_tokens).long()[None], prompt)
