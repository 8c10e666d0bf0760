"""EXP3: block sizes as a game against an adversary, with choices at random by exponential weights."""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State
from bpkit.types import Context, CostModel, DecoderSpec, Step
from bpkit_bandit.arm import Sum, configured, row_seconds
from bpkit_bandit.bandit import Arms, Discount

if TYPE_CHECKING:
    from torch import Tensor


class Exp3Config(PolicyConfig):
    """Options of `exp3`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "learning_rate": (1.0, 3.0, 10.0, 30.0),
        "discount": (1.0, 0.999, 0.99),
    }

    block_sizes: Arms = (1, 2, 4, 6, 8, 12, 16)
    reward: Literal["time", "tokens"] = Field(
        default="time", description="time: tokens per second; tokens: a step's tokens, as BanditSpec counts"
    )
    learning_rate: float = Field(default=1.0, gt=0, description="factor of the textbook learning rate")
    discount: Discount = 1.0


class Exp3Memory(PolicyMemory):
    """What outlives a request.

    Attributes:
        losses: estimated sum of losses by block size.
        rounds: steps learned from, discounted. tokens, seconds: sums over them.
    """

    schema_version: Literal[1] = 1
    losses: dict[int, Sum]
    rounds: Sum = 0.0
    tokens: Sum = 0.0
    seconds: Sum = 0.0


class Exp3(RememberingPolicy[Exp3Memory]):
    """Draws block size b with probability p_b, proportional to exp(-eta L_b); L_b is its estimated sum of losses.

        eta = learning_rate * sqrt(ln K / (K t))          K arms, t steps so far, at least 1
        L_b <- L_b + loss / p_b                           only for the b that was drawn

    EXP3 with the learning rate that needs no horizon (Bubeck & Cesa-Bianchi 2012), after EXP3Spec of BanditSpec
    (2505.15141). A step of T tokens and S seconds, with B the largest size and R the tokens per second of all steps so
    far, has loss = 1/2 - (T - R S) / B, kept within [0, 1]: the size with the least loss is the one with the most
    tokens per second, as a ratio of sums. With `reward=tokens` it is 1 - T / B, as in the paper.

    B is far above what two sizes usually differ by, hence `learning_rate`. One draw serves all rows of a batch, and is
    one step: its loss is the mean over the rows, its tokens and seconds are those of all.
    """

    Config = Exp3Config
    Memory = Exp3Memory
    wants = frozenset()
    in_order = True
    config: Exp3Config

    def fresh_memory(self) -> Exp3Memory:
        return Exp3Memory(losses=dict.fromkeys(self.config.block_sizes, 0.0))

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.usable = tuple(size for size in self.config.block_sizes if size <= decoder.max_block_size)

    def probabilities(self) -> list[float]:
        """p of every usable size."""
        arms, losses = len(self.usable), [self.memory.losses[size] for size in self.usable]
        eta = self.config.learning_rate * math.sqrt(math.log(arms) / (arms * max(1.0, self.memory.rounds)))
        least = min(losses)  # shifted, so that the largest weight is 1 and nothing overflows
        weights = [math.exp(-eta * (loss - least)) for loss in losses]
        total = sum(weights)
        return [weight / total for weight in weights]

    def begin(self, context: Context) -> State:
        import torch  # here, so that options can be listed without it

        return {"chance": torch.ones(context.batch_size, dtype=torch.float64)}

    def select(self, state: State, context: Context) -> Tensor:
        import torch

        chances = self.probabilities()
        generator = context.generator
        drawn = float(torch.rand(1, generator=generator, device=generator.device, dtype=torch.float64))
        arm = min(bisect(list(accumulate(chances)), drawn), len(chances) - 1)  # rounding may leave the sum below 1
        # Kept with the request: others may have taught the policy something before this step ends.
        state["chance"] = context.position.new_full((context.batch_size,), chances[arm], dtype=torch.float64)
        return context.full(self.usable[arm])

    def observe(self, state: State, step: Step) -> None:
        sizes, tokens = step.block_size.tolist(), step.acceptance_length.tolist()
        seconds, alike = row_seconds(step), Counter(zip(sizes, tokens, state["chance"].tolist(), strict=True))
        if self.config.reward == "time" and not seconds:
            return
        memory, kept = self.memory, self.config.discount
        if kept < 1:
            memory.losses = {size: loss * kept for size, loss in memory.losses.items()}
        memory.rounds = memory.rounds * kept + 1
        memory.tokens = memory.tokens * kept + sum(tokens)
        memory.seconds = memory.seconds * kept + seconds * len(sizes)
        for (size, count, chance), rows in alike.items():
            if size in memory.losses:  # the runtime may have used another size than was asked for
                memory.losses[size] += self.loss(count, seconds) * rows / (chance * len(sizes))

    def loss(self, tokens: float, seconds: float) -> float:
        """Of one row in one step, 0 .. 1."""
        largest = self.usable[-1]
        if self.config.reward == "tokens":
            return 1 - min(tokens / largest, 1.0)
        rate = self.memory.tokens / self.memory.seconds
        return min(max(0.5 - (tokens - rate * seconds) / largest, 0.0), 1.0)

    def fitted(self, memory: Exp3Memory) -> Exp3Memory:
        """Arms that it lacks start with its least loss: as good as the best known one, so that they are tried."""
        least = min(memory.losses.values(), default=0.0)
        memory.losses = configured(memory.losses, self.config.block_sizes, lambda: least, "block sizes")
        return memory
