"""What `bandit` and `ucb` share: the arms, what a step teaches, and the memory. How to pick is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyError, PolicyMemory, RememberingPolicy, State
from bpkit.sizes import BlockSizesWithNoDraft
from bpkit.types import CostModel, DecoderSpec, Step
from bpkit_bandit.arm import Arm, configured, row_seconds

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
        for block_size, tokens in zip(step.block_size.tolist(), step.acceptance_length.tolist(), strict=True):
            if block_size in self.arms:  # the runtime may have used another size than was asked for
                self.arms[block_size].add(tokens, seconds)
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
