"""What a bench times: plain decoding, the policies, and decoders of other libraries.

All are timed alike: wall clock from token ids in to the finished output, preparations of `generate` included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpkit.decode.clock import WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.result import Generation
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.judge.sources import Counts, counts_of_steps
from bpkit.prompts import Prompt
from bpkit.types import DraftWork, Feature

LOOP, TRANSFORMERS = "bpkit loop", "transformers generate"
"""The two ways of plain decoding; the faster one is `plain`."""
TRANSFORMERS_DFLASH = "transformers-dflash"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished call.

    Attributes:
        tokens: the output.
        seconds: wall clock of the call.
        steps: target passes after prefill.
        target_seconds, drafter_seconds, policy_seconds: of `seconds`; None where they cannot be told apart.
        near_ties: output positions whose top-2 gap was below tolerance. Of a step that yields several tokens only
            the first position is known: the tie is there or a little later.
        sources: steps and their tokens by source, where there are several.
    """

    tokens: tuple[int, ...]
    seconds: float
    steps: int
    target_seconds: float | None
    drafter_seconds: float | None
    policy_seconds: float | None
    fallbacks: int = 0
    near_ties: tuple[int, ...] = ()
    sources: Counts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one decoder did with one prompt, by its id, in one repeat."""

    decoder: str
    prompt: str
    domain: str
    repeat: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt ready to run: token ids int64 [1, length], and the number that tells its noise from others'."""

    prompt: Prompt
    ids: Tensor
    stream_id: int


class TimedDecoder(Protocol):
    """Something that decodes."""

    name: str

    def run(self, ids: Tensor, stream_id: int) -> Outcome:
        """Decode the prompt `ids`, int64 [1, length]; `stream_id` is its own number."""
        ...


class PolicyDecoder:
    """A SpeculativeDecoder under one policy, with options of `generate`, `temperature` among them."""

    def __init__(self, name: str, decoder: SpeculativeDecoder, options: dict[str, Any], seed: int) -> None:
        self.name, self.decoder = name, decoder
        self.options = {**options, "seed": seed}

    def run(self, ids: Tensor, stream_id: int) -> Outcome:
        now = WallClock(self.decoder.target.device, wait=True).now
        started = now()
        result = self.decoder.run(ids, stream_id=stream_id, **self.options).finish()
        seconds = now() - started - result.observer_seconds
        parts, clock = result.seconds, self.decoder.clock
        known = clock.tells_parts if isinstance(clock, WallClock) else True
        return Outcome(
            tokens=tuple(result.tokens[0].tolist()),
            seconds=seconds,
            steps=len(result.steps),
            target_seconds=parts.verify if known else None,
            drafter_seconds=parts.draft if known else None,
            policy_seconds=parts.policy,
            fallbacks=result.fallbacks,
            near_ties=near_ties_of(result),
            sources=counts_of_steps(self.decoder.spec, result.steps),
        )


def near_ties_of(result: Generation) -> tuple[int, ...]:
    """Output positions of near ties, as in `Outcome`."""
    first = (0,) * sum(result.prefill.near_ties)
    return first + tuple(int(step.position) for step in result.steps for _ in range(sum(step.near_ties)))


@dataclass
class GenerateDecoder:
    """transformers' own `generate`, plain or with keyword arguments that choose an assistant."""

    name: str
    target: PreTrainedModel
    options: Mapping[str, Any]
    seed: int
    drafter: nn.Module | None = None
    assistant: Mapping[str, Any] = field(default_factory=dict)

    def run(self, ids: Tensor, stream_id: int) -> Outcome:
        now, mask = WallClock(self.target.device, wait=True).now, torch.ones_like(ids)
        options = {**generate_options(self.options), **self.assistant}
        if options["do_sample"]:
            torch.manual_seed(self.seed + stream_id)
        with seconds_of_calls(self.target) as target, seconds_of_calls(self.drafter) as drafter:
            started = now()
            output = self.target.generate(input_ids=ids, attention_mask=mask, **options)
            seconds = now() - started
        on_cpu = self.target.device.type == "cpu"  # a GPU works on after a call: its time says nothing
        return Outcome(
            tokens=tuple(output[0, ids.shape[1] :].tolist()),
            seconds=seconds,
            steps=len(target) - 1,
            target_seconds=sum(target) if on_cpu else None,
            drafter_seconds=sum(drafter) if on_cpu else None,
            policy_seconds=0.0 if on_cpu else None,
        )


def generate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Ours as transformers' `generate` takes them: a temperature of 0 is no sampling."""
    rest = {name: value for name, value in options.items() if name != "temperature"}
    temperature = float(options["temperature"])
    return {**rest, "do_sample": True, "temperature": temperature} if temperature > 0 else {**rest, "do_sample": False}


@contextmanager
def seconds_of_calls(module: nn.Module | None) -> Iterator[list[float]]:
    """Wall-clock seconds of each forward call of `module`, none if it is None."""
    started: list[float] = []
    spent: list[float] = []
    if module is None:
        yield spent
        return
    before = module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
    after = module.register_forward_hook(lambda *_: spent.append(time.perf_counter() - started.pop()))
    try:
        yield spent
    finally:
        before.remove()
        after.remove()


class NoDrafter:
    """Plain decoding in the loop must not pay for hidden states that a real drafter would ask for."""

    name, kind, work = "none", "none", DraftWork("nothing", "none")
    trained_block_size = max_block_size = 1
    feature_layers: tuple[int, ...] = ()
    provides: frozenset[Feature] = frozenset()

    def begin(self, text: RunningText) -> NoDrafter:
        return self

    def advance(self, features: Sequence[Tensor] | None) -> None:
        """Nothing to remember, of any row."""

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing to forget."""

    def join(self, other: NoDrafter) -> None:
        """Nothing to take in."""

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        raise NotImplementedError("block size 1 never asks for a draft")


def plain_loop(decoder: SpeculativeDecoder) -> SpeculativeDecoder:
    """Plain decoding of the same target in the loop."""
    shared: dict[str, Any] = {"tokenizer": decoder.tokenizer, "rule": decoder.rule, "capture": decoder.capture}
    return SpeculativeDecoder(decoder.target, NoDrafter(), "fixed:1", **shared)


def check_peers(peers: Sequence[str]) -> None:
    """Raise ValueError for an unknown peer."""
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"there is nothing to compare against called {peer!r}; known: {', '.join(PEERS)}")


def _transformers_dflash(decoder: SpeculativeDecoder, options: dict[str, Any], seed: int) -> TimedDecoder:
    if not isinstance(decoder.drafter, BlockDiffusionDrafter):
        raise ValueError(
            f"{TRANSFORMERS_DFLASH} runs block-diffusion drafters only; {decoder.drafter.name!r} is "
            f"{decoder.drafter.kind}: name a DFlash drafter with --drafter, or leave --against out"
        )
    model = decoder.drafter.model
    assistant = {"assistant_model": model, "speculation_type": "dflash"}
    return GenerateDecoder(TRANSFORMERS_DFLASH, decoder.target, options, seed, model, assistant)


PEERS: dict[str, Callable[[SpeculativeDecoder, dict[str, Any], int], TimedDecoder]] = {
    TRANSFORMERS_DFLASH: _transformers_dflash
}
"""Decoders of other libraries."""
