"""A policy that notes what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, Draft, Feature


class NotingConfig(PolicyConfig):
    block_size: int = Field(default=16, ge=2, description="the largest")
    ragged: bool = Field(default=False, description="choose other sizes for each row and position")
    verify: bool = Field(default=True, description="verify some tokens, other ones for each row and position")


class Noting(Policy):
    """Reads all that there is. What it decides depends on the row and its position alone.

    Attributes:
        notes: features of a row by the length of its prompt, its output position and the feature's name.
    """

    Config = NotingConfig
    config: NotingConfig
    wants = frozenset()
    wants_optional: ClassVar[frozenset[Feature]] = frozenset(Feature) - {Feature.PREFILL_LOGITS}

    def __init__(self, config: PolicyConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.notes: dict[tuple[int, int, str], Tensor] = {}

    def begin(self, context: Context) -> State:
        self._note(context, context.features)
        return {}

    def select(self, state: State, context: Context) -> Tensor:
        self._note(context, context.features)
        if not self.config.ragged:
            return context.full(self.config.block_size)
        return 1 + (context.context_length + context.position) % self.config.block_size

    def truncate(self, state: State, draft: Draft) -> Tensor:
        self._note(draft.context, draft.features, draft.draft_length.tolist())
        if not self.config.verify:
            return draft.full(0)
        return (draft.context.context_length + 3 * draft.context.position) % (draft.draft_length + 1)

    def _note(self, context: Context, features: Mapping[Feature, Tensor], lengths: list[int] | None = None) -> None:
        prompts, positions = context.context_length - context.position, context.position.tolist()
        for row, (prompt, position) in enumerate(zip(prompts.tolist(), positions, strict=True)):
            for name, values in features.items():
                self.notes[prompt, position, str(name)] = (
                    values[row, : lengths and lengths[row]].clone() if lengths else values[row].clone()
                )
