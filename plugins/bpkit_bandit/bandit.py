"""Bandits over block sizes: `bandit` picks by Thompson sampling, `ucb` by upper confidence bounds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyError, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSizesWithNoDraft
from bpkit.types import Context, CostModel, DecoderSpec, Step
from bpkit_bandit.arm import Arm, configured, likeliest, row_seconds, upper_bound

if TYPE_CHECKING:
    from torch import Tensor

Discount = Annotated[float, Field(gt=0, le=1, description="weight of the past after each step; 1 forgets nothing")]
Arms = Annotated[
    BlockSizesWithNoDraft,
    Field(description="arms: a list, or text such as 1+4+8; 1 (no draft) is always among them"),
]


class BanditConfig(PolicyConfig):
    """Options of `bandit`; those of `ucb` begin with the same."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"discount": (1.0, 0.999, 0.99)}

    block_sizes: Arms = (1, 2, 4, 6, 8, 12, 16)
    min_pulls: int = Field(default=2, ge=1, description="steps with each block size before any comparison")
    discount: Discount = 1.0
    memory: str | None = Field(default=None, description="JSON file to learn from and to save to")
    save_every: int = Field(default=200, ge=1, description="steps between two saves of `memory` in a long request")


class UCBConfig(BanditConfig):
    """Options of `ucb`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {**BanditConfig.grid, "exploration": (0.1, 0.3, 1.0, 2.0)}

    exploration: float = Field(default=1.0, ge=0, description="factor of the bonus for what is little known; 0: greedy")


class BanditMemory(PolicyMemory):
    """What a bandit keeps across requests and processes.

    Attributes:
        learned_with: names of target and drafter; speeds of another pair would mislead.
        arms: by block size; all that are configured.
    """

    schema_version: Literal[1] = 1
    learned_with: dict[str, str] = {}
    arms: dict[int, Arm]


class Learner(RememberingPolicy[BanditMemory]):
    """Counts tokens and seconds per block size. What it learns lives in its memory, across requests.

    The file of option `memory` is read in `bind`. It is written at the end of a request, every `save_every` steps
    within one, and by `save`. Of two processes with one file, the last to save wins.

    Attributes:
        usable: the block sizes that the decoder can draft.
    """

    Config = BanditConfig
    Memory = BanditMemory
    wants = frozenset()
    config: BanditConfig
    _unsaved_steps = 0

    @property
    def arms(self) -> dict[int, Arm]:
        """By block size."""
        return self.memory.arms

    def fresh_memory(self) -> BanditMemory:
        return BanditMemory(arms={size: Arm() for size in self.config.block_sizes})

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.usable = tuple(size for size in self.config.block_sizes if size <= decoder.max_block_size)
        self.memory.learned_with = {"target": decoder.target, "drafter": decoder.drafter}
        if self.config.memory and Path(self.config.memory).expanduser().exists():
            self.load(self.config.memory)

    def observe(self, state: State, step: Step) -> None:
        seconds = row_seconds(step)
        if not seconds:
            return
        if self.config.discount < 1:
            for arm in self.arms.values():
                arm.forget(self.config.discount)
        alike = Counter(zip(step.block_size.tolist(), step.acceptance_length.tolist(), strict=True))
        for (block_size, tokens), rows in alike.items():
            if block_size in self.arms:  # the runtime may have used another size than was asked for
                self.arms[block_size].add(tokens, seconds, rows)
        self._unsaved_steps += 1
        if self.config.memory and self._unsaved_steps >= self.config.save_every:
            self.save()

    def end(self, state: State) -> None:
        if self.config.memory and self._unsaved_steps:
            self.save()

    def save(self, path: str | Path | None = None) -> None:
        """Write the memory to `path`, by default to the file of option `memory`."""
        if not (path or self.config.memory):
            raise PolicyError("nowhere to save to: set option 'memory' or give a path")
        super().save(path or self.config.memory or "")
        if path is None:
            self._unsaved_steps = 0

    def fitted(self, memory: BanditMemory) -> BanditMemory:
        """Arms that it lacks start untried."""
        known, loaded = self.memory.learned_with, memory.learned_with
        arms = configured(memory.arms, self.config.block_sizes, Arm, "block sizes")
        if known and loaded and known != loaded:
            raise PolicyError(f"the memory was learned with {loaded}, this is {known}")
        return BanditMemory(learned_with=known, arms=arms)


class Thompson(Learner):
    """Draws tokens per second of every arm from what is known of it, and picks the arm with the highest draw.

    A draw is normal around the arm's rate with its standard error. Arms with fewer than `min_pulls` steps come first,
    at random.

    One draw serves all rows of a batch. Only the time of the whole step is known: were sizes mixed, large blocks
    would be charged less than they cost, small ones more, and the bandit would settle on blocks that are too large.
    """

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(likeliest(self.arms, self.usable, self.config.min_pulls, context))


class UCB(Learner):
    """Picks the arm with the highest rate + `exploration` * spread * sqrt(2 ln n / n_arm); nothing is random.

    n is the steps counted for all arms. UCB1 (Auer et al. 2002) is for rewards in [0, 1]; tokens per second have
    no such scale, so the arm's own spread gives it, as in UCB-V and UCB1-tuned. All rows of a batch get the same block
    size. Arms with fewer than `min_pulls` steps come first, smallest first. BanditSpec (2505.15141) brought UCB to
    speculative decoding; how its program differs, docs/policies/bandits.md says.
    """

    Config = UCBConfig
    config: UCBConfig

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(upper_bound(self.arms, self.usable, self.config.min_pulls, self.config.exploration))
