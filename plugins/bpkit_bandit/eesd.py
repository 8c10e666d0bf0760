"""EESD's control of the draft length: after every token, Thompson sampling says whether to draft one more."""

from __future__ import annotations

import math
import random
import sys
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSizes
from bpkit.types import Context, CostModel, DecoderSpec, Step

if TYPE_CHECKING:
    from torch import Tensor

SURE = 1 - 1e-12
"""Chances are taken to be at most that, for their logarithm to divide by."""
Count = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EesdConfig(PolicyConfig):
    """Options of `eesd`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "accepted": (1.0, 4.0),
        "rejected": (1.0, 2.0),
        "counts": ("drafted", "tested"),
        "no_draft": (False, True),
        "across_requests": (False, True),
    }

    accepted: float = Field(default=1.0, gt=0, description="accepted tokens to begin with (alpha of the Beta prior)")
    rejected: float = Field(default=1.0, gt=0, description="rejected tokens to begin with (beta of the Beta prior)")
    counts: Literal["drafted", "tested"] = Field(
        default="drafted",
        description="rejected tokens: all that were verified and not accepted, or only the first of a step",
    )
    no_draft: bool = Field(default=False, description="let the first draw forgo the draft; else one token is drafted")
    block_sizes: BlockSizes = Field(
        default=tuple(range(1, 17)), description="a drawn size that is not among these becomes the next smaller one"
    )
    across_requests: bool = Field(default=False, description="begin a request with the counts of those before it")


class EesdMemory(PolicyMemory):
    """The counts of accepted and rejected tokens: the parameters of the Beta distribution."""

    bounds = (sys.float_info.min, math.inf)  # neither is ever 0

    accepted: Count
    rejected: Count


class Eesd(RememberingPolicy[EesdMemory]):
    """Before each further token: theta ~ Beta(alpha, beta), and with probability theta the token is drafted.

    After a step with n verified and m accepted tokens, alpha <- alpha + m and beta <- beta + n - m. This is the
    Beta-Bernoulli variant (Beta-TS) of the Thompson sampling control of EESD (Liu et al. 2024, 2406.03853).

    The draws look at no token, so `select` draws the whole length before the draft. Tokens after the first rejected one
    were never tested, yet count as rejected in n - m; `counts=tested` takes the first one only, as the likelihood of a
    run of Bernoulli trials says. Every row has counts and draws of its own.
    """

    Config = EesdConfig
    Memory = EesdMemory
    wants = frozenset()
    config: EesdConfig

    def fresh_memory(self) -> EesdMemory:
        return EesdMemory(accepted=self.config.accepted, rejected=self.config.rejected)

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        import torch  # here, so that options can be listed without it

        self.smallest = 1 if self.config.no_draft else 2
        sizes = [b for b in self.config.block_sizes if self.smallest <= b <= decoder.max_block_size]
        self.sizes = sizes or [min(self.smallest, decoder.max_block_size)]
        drawn = range(max(self.sizes[-1], self.smallest) + 1)
        below = [[size for size in self.sizes if size <= most] for most in drawn]
        self.listed = torch.tensor([known[-1] if known else self.sizes[0] for known in below])
        """By the size that was drawn, that or the next smaller one that is listed."""

    def begin(self, context: Context) -> State:
        return self.memory.rows(context)

    def select(self, state: State, context: Context) -> Tensor:
        import torch

        generator, rows = context.generator, context.batch_size
        if rows == 1:
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
            draws = random.Random(seed)  # has a Beta distribution, in a microsecond
            return self.listed[[self.draw(float(state["accepted"]), float(state["rejected"]), draws)]]
        # Each theta serves one token: that is drafted with the mean of its distribution, so that lengths are geometric.
        mean = state["accepted"] / (state["accepted"] + state["rejected"])
        drawn = torch.rand(rows, generator=generator, device=generator.device, dtype=torch.float64)
        further = (drawn.log() / mean.clamp(max=SURE).log()).clamp(max=len(self.listed))
        return self.listed[(self.smallest + further.long()).clamp(max=len(self.listed) - 1)]

    def draw(self, alpha: float, beta: float, draws: random.Random) -> int:
        """A block size, listed or not."""
        size = self.smallest
        while size < self.sizes[-1] and draws.random() < draws.betavariate(alpha, beta):
            size += 1
        return size

    def observe(self, state: State, step: Step) -> None:
        rejected = step.verify_length - step.num_accepted
        if self.config.counts == "tested":
            rejected = rejected.clamp(max=1)
        state["accepted"] = state["accepted"] + step.num_accepted
        state["rejected"] = state["rejected"] + rejected

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            self.memory = self.memory.after(state)
