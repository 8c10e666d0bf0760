"""Replay: the live loop and the same policies, over a trace instead of models.

The output of a prompt is one fixed sequence, so what each draft would have been and how much of it would have stood is
a table. The loop runs over a target and a drafter that look everything up, and a cost model says what each step takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.registry import PolicyLike
from bpkit.traces.records import PromptTrace
from bpkit.types import CostModel, DecoderSpec, Work


@dataclass(frozen=True)
class Replayed:
    """What a policy did with one prompt.

    Attributes:
        index: of the prompt in its trace.
        tokens: that the steps yielded; the one that prefill decides is not among them.
        position, block_size, draft_length, verify_length, num_accepted: of each step, int32 [steps].
        work: of each step, for pricing under any cost model.
        begin_seconds: measured decision time of `begin`.
        step_seconds: measured decision time of each step, float64 [steps]; `observe` counts with the step after it.
        fallbacks: policy faults that were mended.
    """

    index: int
    tokens: int
    position: NDArray[np.int32]
    block_size: NDArray[np.int32]
    draft_length: NDArray[np.int32]
    verify_length: NDArray[np.int32]
    num_accepted: NDArray[np.int32]
    work: tuple[Work, ...]
    begin_seconds: float
    step_seconds: NDArray[np.float64]
    fallbacks: int

    @property
    def steps(self) -> int:
        return len(self.work)

    def seconds(self, cost: CostModel) -> float:
        """Modelled time of the steps, decision time left out."""
        raise NotImplementedError


class Replayer:
    """Replays prompts of one trace under one policy.

    A policy with memory keeps it from prompt to prompt, as in a decoder: make one Replayer for each order of prompts.

    Args:
        spec: of the decoder that the trace stands for (`Trace.spec`).
        policy: an instance, or what `bpkit.resolve_policy` takes.
        cost: what steps cost; also handed to the policy's `bind`, and the clock that it may learn from.
        strict: raise on policy faults instead of mending them.

    Raises:
        PolicyError: the policy wants what the trace does not hold; the message says how to add it.
    """

    def __init__(self, spec: DecoderSpec, policy: PolicyLike, cost: CostModel, *, strict: bool = False) -> None:
        raise NotImplementedError

    def run(self, prompt: PromptTrace) -> Replayed:
        """Replay one prompt. Raises TraceError if the policy asks for a block size that was not traced."""
        raise NotImplementedError
