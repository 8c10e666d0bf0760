"""A bandit over sources of drafts: `source_bandit` picks source and block size by Thompson sampling."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyError, PolicyMemory, RememberingPolicy, State
from bpkit.types import Context, CostModel, DecoderSpec, Feature, Plan, Step
from bpkit_bandit.arm import Arm, drawn, row_seconds
from bpkit_bandit.bandit import Arms, Discount

NO_DRAFT = "no draft"


class SourceBanditConfig(PolicyConfig):
    """Options of `source_bandit`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"discount": (1.0, 0.999, 0.99)}

    block_sizes: Arms = (1, 2, 4, 6, 8, 12, 16)
    min_pulls: int = Field(default=2, ge=1, description="steps with each arm before any comparison")
    discount: Discount = 1.0


class SourceBanditMemory(PolicyMemory):
    """What outlives a request.

    Attributes:
        learned_with: names of target and sources; speeds of others would mislead.
        arms: `no draft`, and of each source and block size, as `1:4`; those that were pulled.
    """

    schema_version: Literal[1] = 1
    learned_with: tuple[str, ...] = ()
    arms: dict[str, Arm] = {}


class SourceBandit(RememberingPolicy[SourceBanditMemory]):
    """Draws tokens per second of every (source, block size) and of no draft, and picks the one with the highest draw.

    The estimates are those of `bandit`. A free source with nothing to offer is left out of that choice.

    One draw serves all rows of a batch, so that rows which have the same sources take the same arm; where a store has
    something for some rows only, arms are mixed in a step, and each row is charged an equal part of its time.
    """

    Config = SourceBanditConfig
    Memory = SourceBanditMemory
    wants = frozenset({Feature.SOURCE_OFFER})
    config: SourceBanditConfig
    _bound_to: tuple[str, ...] = ()

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.choices = {NO_DRAFT: (0, 1)} | {
            f"{place}:{size}": (place, size)
            for place, source in enumerate(decoder.sources)
            for size in self.config.block_sizes
            if 1 < size <= source.max_block_size
        }
        self._bound_to = (decoder.target, *(source.drafter for source in decoder.sources))
        self.memory = self.fitted(self.memory)

    def select(self, state: State, context: Context) -> Plan:
        arms = {name: self.memory.arms.get(name) or Arm() for name in self.choices}
        draws = drawn(arms, list(arms), self.config.min_pulls, context)
        ranked = sorted(draws, key=draws.__getitem__, reverse=True)
        picked = [self._first_on_offer(ranked, offer) for offer in context[Feature.SOURCE_OFFER].tolist()]
        source, size = (context.position.new_tensor(column) for column in zip(*picked, strict=True))
        return Plan(size, source)

    def _first_on_offer(self, ranked: list[str], offer: list[int]) -> tuple[int, int]:
        """Source and block size of the best arm of one row."""
        choices = (self.choices[name] for name in ranked)
        return next((source, size) for source, size in choices if size == 1 or offer[source])

    def observe(self, state: State, step: Step) -> None:
        seconds = row_seconds(step)
        if not seconds:
            return
        arms = self.memory.arms
        if self.config.discount < 1:
            for arm in arms.values():
                arm.forget(self.config.discount)
        rows = zip(step.source.tolist(), step.block_size.tolist(), step.acceptance_length.tolist(), strict=True)
        for (source, size, tokens), count in Counter(rows).items():
            name = NO_DRAFT if size == 1 else f"{source}:{size}"
            if name in self.choices:  # the runtime may have used another size than was asked for
                arms.setdefault(name, Arm()).add(tokens, seconds, count)
        self.memory.learned_with = self._bound_to

    def fitted(self, memory: SourceBanditMemory) -> SourceBanditMemory:
        """Arms that it lacks start untried."""
        if self._bound_to and memory.learned_with not in ((), self._bound_to):
            known, here = (" + ".join(names) for names in (memory.learned_with, self._bound_to))
            raise PolicyError(f"the memory was learned with target and sources {known}, this is {here}")
        if self._bound_to and (unknown := sorted(memory.arms.keys() - self.choices.keys())):
            raise PolicyError(f"the memory knows arms {unknown}, which no source and option 'block_sizes' give here")
        return memory
