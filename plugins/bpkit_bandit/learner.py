"""What `bandit` and `ucb` share: the arms, what a step teaches, and the memory. How to pick is theirs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.types import CostModel, DecoderSpec, Step
from bpkit_bandit import memory
from bpkit_bandit.arm import Arm


class BanditConfig(PolicyConfig):
    """Options of `bandit`; those of `ucb` begin with the same."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"discount": (1.0, 0.999, 0.99)}

    block_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 2, 4, 6, 8, 12, 16),
        min_length=1,
        description="arms: a list, or text such as 1+4+8; 1 (no draft) is always among them",
    )
    min_pulls: int = Field(default=2, ge=1, description="steps with each block size before any comparison")
    discount: float = Field(
        default=1.0, gt=0, le=1, description="weight of the past after each step; 1 forgets nothing"
    )
    memory: str | None = Field(default=None, description="JSON file to learn from and to save to")
    save_every: int = Field(default=200, ge=1, description="steps between two saves of `memory` in a long request")

    @field_validator("block_sizes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Take the command-line forms `8`, `1+4+8` and `1;4;8`; a comma there separates options."""
        if isinstance(value, str):
            return [part for part in value.replace(";", "+").split("+") if part.strip()]
        return [value] if isinstance(value, int) else value

    @field_validator("block_sizes")
    @classmethod
    def _with_no_draft(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({1, *value}))


class Learner(Policy):
    """Counts tokens and seconds per block size. What it learns lives on `self`, across requests.

    The file of option `memory` is read in `bind`. It is written at the end of a request, every `save_every` steps
    within one, and by `save`. Of two processes with one file, the last to save wins.

    Attributes:
        arms: by block size; all that were configured.
        usable: the block sizes that the decoder can draft.
    """

    Config = BanditConfig
    wants = frozenset()
    config: BanditConfig

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.arms = {size: Arm() for size in self.config.block_sizes}
        self.usable = self.config.block_sizes
        self.learned_with: dict[str, str] = {}
        self._unsaved_steps = 0

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.usable = tuple(size for size in self.config.block_sizes if size <= decoder.max_block_size)
        self.learned_with = {"target": decoder.target, "drafter": decoder.drafter}
        path = Path(self.config.memory).expanduser() if self.config.memory else None
        if path is not None and path.exists():
            try:
                self.load_state_dict(memory.read(path))
            except PolicyError as error:
                raise PolicyError(f"{path}: {error}; delete the file or set option 'memory' to another") from None

    def end(self, state: State) -> None:
        if self.config.memory and self._unsaved_steps:
            self.save()

    def observe(self, state: State, step: Step) -> None:
        # The rows of a batch went through one forward pass: each pays an equal part of it. That is right for rows
        # of one size, which is what both policies select.
        seconds = step.seconds.total / len(step.block_size)
        if not 0 < seconds < math.inf:  # a clock that stands still teaches nothing
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

    def save(self, path: str | Path | None = None) -> None:
        """Write the memory to `path`, by default to the file of option `memory`."""
        if not (path or self.config.memory):
            raise PolicyError("nowhere to save to: set option 'memory' or give a path")
        memory.write(Path(path or self.config.memory or "").expanduser(), self.state_dict())
        if path is None:
            self._unsaved_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return memory.Memory(learned_with=self.learned_with, arms=self.arms).model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a memory. Arms that it lacks start untried. Raises PolicyError if it does not fit."""
        loaded = memory.parse(state)
        if unknown := sorted(loaded.arms.keys() - self.arms.keys()):
            raise PolicyError(f"the memory knows block sizes {unknown}, which option 'block_sizes' does not list")
        if self.learned_with and loaded.learned_with and self.learned_with != loaded.learned_with:
            raise PolicyError(f"the memory was learned with {loaded.learned_with}, this is {self.learned_with}")
        self.arms = {size: loaded.arms.get(size, Arm()) for size in self.arms}
