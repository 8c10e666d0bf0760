"""What every policy is checked with: the tiny pair, its drafters, prompts, a made-up cost model, plain decoding.

All is made once in a process, and nothing of it depends on a policy.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from bpkit.decode.clock import CostClock, WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import Drafter
from bpkit.decode.sources import Sources
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.testing.models import TRAINED_BLOCK_SIZE, tiny_pair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable
from bpkit.trace.cost.table import RowsTable
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature

LARGEST = 2 * TRAINED_BLOCK_SIZE
"""`max_block_size` of every decoder here: twice the trained block size, so that sizes above it are met."""
DFLASH, ASSISTANT, AGREEABLE, NGRAM = "block-diffusion", "autoregressive", "agreeable", "n-gram"
SOURCES = f"{DFLASH} + {NGRAM}"
"""Two sources of drafts in one decoder."""
USUAL = (DFLASH, ASSISTANT, AGREEABLE)
"""Drafters that a policy is checked with, if they give what it wants. The n-gram drafter is for edge cases, and the two
sources are for a check of their own, or for all of them if a policy serves nothing else."""
TOGETHER = 3
"""Requests that run at a time, where several do."""
PROMPTS = ("x = 1", "def f(a, b):", "id,name\n1,Ada\n", "The sum is", "aaaa")


def _tables(times: float) -> dict[str, Any]:
    """Seconds of a step by phase, `times` those of one row."""
    sizes, widths = range(2, LARGEST + 1), range(1, LARGEST + 2)
    return {
        "draft": {size: times * (0.004 + 0.0002 * size) for size in sizes},
        "catch_up": {1: 0.0, 2: times * 0.0001, 64: times * 0.005},
        "features": {size: times * 0.0001 * size for size in sizes},
        "verify": {
            width: {64: times * (0.010 + 0.0006 * width), 640: times * (0.012 + 0.0007 * width)} for width in widths
        },
        "rest": 0.001,
    }


_STORE = CostTable(
    draft={LARGEST: 0.0002}, verify={1: 1.0}, rows={TOGETHER: RowsTable(draft={LARGEST: 0.0003}, verify={1: 1.0})}
)
COST = CostTable(name="made up for checks", **_tables(1), rows={TOGETHER: RowsTable(**_tables(1.5))}).with_sources(
    [_STORE]
)
"""Seconds that steps are said to take, so that a policy that learns from time decides the same on every machine."""


@dataclass(frozen=True)
class Case:
    """One generation to try, with options of `SpeculativeDecoder.generate`; 0 temperature is greedy."""

    prompt: str
    temperature: float = 0.0
    seed: int = 0
    stream_id: int = 0
    max_new_tokens: int = 12
    eos_token_id: int | None = None

    def options(self) -> dict[str, Any]:
        """Of `SpeculativeDecoder.generate`."""
        return {name: value for name, value in asdict(self).items() if name != "prompt" and value is not None}

    def as_prompt(self) -> dict[str, Any]:
        """As one of many prompts of `SpeculativeDecoder.generate`."""
        return {"prompt": self.prompt, **self.options()}

    @property
    def short(self) -> str:
        """In few words.

        >>> Case("one two three four five six seven eight nine ten").short
        "'one two three four five six seven eight...' at temperature 0"
        """
        text = self.prompt if len(self.prompt) <= 40 else f"{self.prompt[:39]}..."
        return f"{text!r} at temperature {self.temperature:g}"

    def __str__(self) -> str:
        ends = "" if self.eos_token_id is None else f", ended by token {self.eos_token_id}"
        tokens = "token" if self.max_new_tokens == 1 else "tokens"
        return f"prompt {self.short}, at most {self.max_new_tokens} new {tokens}{ends}"


class Plain(NamedTuple):
    """What plain decoding gives: tokens, and the places where the two best were too close to call."""

    tokens: tuple[int, ...]
    near_ties: frozenset[int]


_pair = functools.cache(tiny_pair)


@functools.cache
def drafters() -> dict[str, Drafter]:
    """All drafters, by name."""
    pair = _pair()
    return {
        DFLASH: pair.block_diffusion(),
        ASSISTANT: AutoregressiveDrafter(pair.assistant, pair.target, block_size=TRAINED_BLOCK_SIZE),
        AGREEABLE: pair.agreeable(),
        NGRAM: NgramDrafter(block_size=TRAINED_BLOCK_SIZE),
        SOURCES: Sources([pair.block_diffusion(), NgramDrafter(block_size=TRAINED_BLOCK_SIZE)]),
    }


def decoder(drafter: str, policy: Policy | str) -> SpeculativeDecoder:
    """The tiny pair under a policy, which is bound. Steps cost what `COST` says. Raises PolicyError."""
    pair, drafts = _pair(), drafters()[drafter]
    return SpeculativeDecoder(
        pair.target,
        drafts,
        policy,
        tokenizer=pair.tokenizer,
        clock=CostClock(COST),
        strict=True,
        max_block_size=LARGEST,
    )


@functools.cache
def plain(case: Case) -> Plain:
    """Plain decoding: `fixed:1`, which drafts nothing."""
    return plainly(decoder(DFLASH, "fixed:1"), case)


def plainly(decoder: SpeculativeDecoder, case: Case) -> Plain:
    """What a decoder under `fixed:1` gives: every step is one token."""
    made = decoder.generate(case.prompt, **case.options())
    ties = [sum(made.prefill.near_ties), *(sum(step.near_ties) for step in made.steps)]
    return Plain(tuple(made.tokens[0].tolist()), frozenset(place for place, count in enumerate(ties) if count))


@functools.cache
def traces(drafter: str, features: frozenset[Feature]) -> list[PromptTrace]:
    """Traces of a few prompts with every block size, sampled; the agreeable drafter has those of the assistant."""
    if drafter == AGREEABLE:
        return traces(ASSISTANT, features)
    sizes, known = tuple(range(2, LARGEST + 1)), features & frozenset(Feature)
    options = TraceOptions(sizes, 24, sampling={"temperature": 1.0}, seed=1, features=known)
    tracer = Tracer(decoder(drafter, "fixed:1"), options)
    return [tracer.trace(i, Prompt(f"check-{i}", "check", text)) for i, text in enumerate(PROMPTS)]


@functools.cache
def step_seconds(drafter: str) -> float:
    """What a step takes by the wall, decisions of `fixed` included: the median of a generation."""
    pair = _pair()
    clock = WallClock(pair.target.device)
    timed = SpeculativeDecoder(pair.target, drafters()[drafter], "fixed", tokenizer=pair.tokenizer, clock=clock)
    made = timed.generate(PROMPTS[0], max_new_tokens=24, temperature=1.0, seed=0)
    return median(step.seconds.total for step in made.steps)
