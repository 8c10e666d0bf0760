"""What every policy is checked with: the tiny pair, its drafters, prompts, a made-up cost model, plain decoding."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from bpkit.decode.clock import CostClock, WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.base import Drafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.testing.models import TRAINED_BLOCK_SIZE, TinyPair, tiny_pair
from bpkit.testing.simulated_device import SimulatedDevice
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature

LARGEST = 2 * TRAINED_BLOCK_SIZE
"""`max_block_size` of every decoder here: twice the trained block size, so that sizes above it are met."""
DFLASH, ASSISTANT, AGREEABLE, NGRAM = "block-diffusion", "autoregressive", "agreeable", "n-gram"
USUAL = (DFLASH, ASSISTANT, AGREEABLE)
"""Drafters that a policy is checked with, if they give what it wants. The n-gram drafter is for edge cases."""
PROMPTS = ("x = 1", "def f(a, b):", "id,name\n1,Ada\n", "The sum is", "aaaa")

COST = CostTable(
    name="made up for checks",
    draft={size: 0.004 + 0.0002 * size for size in range(2, LARGEST + 1)},
    catch_up={1: 0.0, 2: 0.0001, 64: 0.005},
    features={size: 0.0001 * size for size in range(2, LARGEST + 1)},
    verify={width: {64: 0.010 + 0.0006 * width, 640: 0.012 + 0.0007 * width} for width in range(1, LARGEST + 2)},
    rest=0.001,
)
"""Seconds that steps are said to take, so that a policy that learns from time decides the same on every machine."""


@dataclass(frozen=True)
class Case:
    """One generation to try. `eos` ends the output; 0 temperature is greedy."""

    prompt: str
    temperature: float = 0.0
    seed: int = 0
    stream_id: int = 0
    max_new_tokens: int = 12
    eos: int | None = None

    def options(self) -> dict[str, Any]:
        """Of `SpeculativeDecoder.generate`."""
        names = ("max_new_tokens", "temperature", "seed", "stream_id")
        given = {name: getattr(self, name) for name in names}
        return given if self.eos is None else {**given, "eos_token_id": self.eos}

    @property
    def short(self) -> str:
        """In few words.

        >>> Case("one two three four five six seven eight nine ten").short
        "'one two three four five six seven eight...' at temperature 0"
        """
        text = self.prompt if len(self.prompt) <= 40 else f"{self.prompt[:39]}..."
        return f"{text!r} at temperature {self.temperature:g}"

    def __str__(self) -> str:
        ends = "" if self.eos is None else f", ended by token {self.eos}"
        tokens = "token" if self.max_new_tokens == 1 else "tokens"
        return f"prompt {self.short}, at most {self.max_new_tokens} new {tokens}{ends}"


@dataclass(frozen=True)
class Plain:
    """What plain decoding gives: tokens, and the places where the two best were too close to call."""

    tokens: tuple[int, ...]
    near_ties: frozenset[int]


class TinySetup:
    """Shared by all policies that are checked in a process; nothing on it depends on a policy."""

    def __init__(self) -> None:
        self.pair: TinyPair = tiny_pair()
        self.drafters: Mapping[str, Drafter] = {
            DFLASH: self.pair.block_diffusion(),
            ASSISTANT: AutoregressiveDrafter(self.pair.assistant, self.pair.target, block_size=TRAINED_BLOCK_SIZE),
            AGREEABLE: self.pair.agreeable(),
            NGRAM: NgramDrafter(block_size=TRAINED_BLOCK_SIZE),
        }
        self.device = SimulatedDevice()
        self._on_device: dict[str, SpeculativeDecoder] = {}
        self._plain: dict[Case, Plain] = {}
        self._traces: dict[tuple[str, frozenset[Feature]], list[PromptTrace]] = {}
        self._step_seconds: dict[str, float] = {}

    def decoder(self, drafter: str, policy: Policy | str) -> SpeculativeDecoder:
        """The tiny pair under a policy, which is bound. Steps cost what `COST` says. Raises PolicyError."""
        return SpeculativeDecoder(
            self.pair.target,
            self.drafters[drafter],
            policy,
            tokenizer=self.pair.tokenizer,
            clock=CostClock(COST),
            strict=True,
            max_block_size=LARGEST,
        )

    def on_device(self, drafter: str, policy: Policy) -> SpeculativeDecoder:
        """The same on the simulated device, inside a `with` block of it."""
        if drafter not in self._on_device:
            self._on_device[drafter] = self.device.decoder(self.decoder(drafter, "fixed:1"))
        return self._on_device[drafter].with_policy(policy)

    def plain(self, case: Case) -> Plain:
        """Plain decoding: `fixed:1`, which drafts nothing."""
        if case not in self._plain:
            self._plain[case] = plainly(self.decoder(DFLASH, "fixed:1"), case)
        return self._plain[case]

    def traces(self, drafter: str, features: frozenset[Feature]) -> list[PromptTrace]:
        """Traces of a few prompts with every block size, sampled; the agreeable drafter has those of the assistant."""
        drafter = ASSISTANT if drafter == AGREEABLE else drafter
        features &= frozenset(Feature)
        key = (drafter, features)
        if key not in self._traces:
            options = TraceOptions(
                tuple(range(2, LARGEST + 1)), 24, sampling={"temperature": 1.0}, seed=1, features=features
            )
            tracer = Tracer(self.decoder(drafter, "fixed:1"), options)
            prompts = [Prompt(f"check-{i}", "check", text) for i, text in enumerate(PROMPTS)]
            self._traces[key] = [tracer.trace(i, prompt) for i, prompt in enumerate(prompts)]
        return self._traces[key]

    def step_seconds(self, drafter: str) -> float:
        """What a step takes by the wall, decisions of `fixed` included: the median of a generation."""
        if drafter not in self._step_seconds:
            pair, clock = self.pair, WallClock(self.pair.target.device)
            decoder = SpeculativeDecoder(
                pair.target, self.drafters[drafter], "fixed", tokenizer=pair.tokenizer, clock=clock
            )
            made = decoder.generate(PROMPTS[0], max_new_tokens=24, temperature=1.0, seed=0)
            self._step_seconds[drafter] = median(step.seconds.total for step in made.steps)
        return self._step_seconds[drafter]


def plainly(decoder: SpeculativeDecoder, case: Case) -> Plain:
    """What a decoder under `fixed:1` gives: every step is one token."""
    made = decoder.generate(case.prompt, **case.options())
    ties = [sum(made.prefill.near_ties), *(sum(step.near_ties) for step in made.steps)]
    near = frozenset(place for place, count in enumerate(ties) if count)
    return Plain(tuple(made.tokens[0].tolist()), near)


@functools.cache
def tiny_setup() -> TinySetup:
    """The one of this process."""
    return TinySetup()
