"""A target and a drafter that look everything up in a trace, in the places of the models that the loop expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bpkit.decode.reread import Rereading
from bpkit.decode.sampling import Draw, Processors
from bpkit.decode.target import TargetOutput
from bpkit.decode.text import RunningText
from bpkit.decode.verify import Verdict
from bpkit.draft.base import GoOn, Proposal
from bpkit.trace.records import PromptTrace
from bpkit.trace.store.manifest import TraceError
from bpkit.types import OF_PREFILL, Draft, DraftWork, Feature


@dataclass(frozen=True)
class Lookup:
    """A PromptTrace as tensors with a batch axis, made once and shared by all policies that replay it."""

    trace: PromptTrace

    @cached_property
    def prompt(self) -> Tensor:
        """int64 [1, prompt length]"""
        return torch.tensor(self.trace.prompt_tokens).long()[None]

    @cached_property
    def output(self) -> Tensor:
        """int64 [1, output length]"""
        return torch.tensor(self.trace.output_tokens).long()[None]

    @cached_property
    def drafted(self) -> Tensor:
        """Drafted tokens, int64 [rows, sizes, width]."""
        return torch.from_numpy(self.trace.drafts.tokens).long()

    @cached_property
    def draft_length(self) -> list[list[int]]:
        lengths: list[list[int]] = self.trace.drafts.draft_length.tolist()
        return lengths

    @cached_property
    def num_accepted(self) -> list[list[int]]:
        counts: list[list[int]] = self.trace.drafts.num_accepted.tolist()
        return counts

    @cached_property
    def columns(self) -> dict[int, int]:
        """Block size -> place in the tables."""
        return {size: place for place, size in enumerate(self.trace.drafts.block_sizes.tolist())}

    @cached_property
    def features(self) -> Mapping[Feature, Tensor]:
        """Draft features, float32 [rows, sizes, width, ...]."""
        return {name: torch.from_numpy(values) for name, values in self.trace.drafts.features.items()}

    @cached_property
    def hidden(self) -> Mapping[Feature, Tensor]:
        """Features of the target, float32 [1, ...]."""
        return {name: torch.tensor(values)[None] for name, values in self.trace.features.items()}

    def column(self, block_size: int) -> int:
        """Place of a block size. Raises TraceError if it was not traced."""
        try:
            return self.columns[block_size]
        except KeyError:
            sizes = "+".join(map(str, self.columns))
            raise TraceError(
                f"block size {block_size} was asked for, but the trace has 1+{sizes}: trace with `--block-sizes "
                f"2-{max(self.columns)}` so that there are no gaps, or restrict the policy's sizes"
            ) from None


class TracedTarget:
    """A `TargetSession` without a model. It has no logits; `TracedRule` knows what they would have decided."""

    positions: int | None = None
    cache = None

    def __init__(self, lookup: Lookup, text: RunningText, wants: frozenset[Feature], *, stateful: bool = False) -> None:
        self.text = text
        self.rereading = Rereading() if stateful else None
        self.nothing = torch.zeros(1, 1, 1)
        self.at_first = {name: lookup.hidden[name][:, None] for name in wants & OF_PREFILL & lookup.hidden.keys()}
        self.by_position = {name: lookup.hidden[name] for name in (wants - OF_PREFILL) & lookup.hidden.keys()}

    @property
    def reread(self) -> int:
        return 0 if self.rereading is None else self.rereading.reread

    def prefill(self, **inputs: Any) -> TargetOutput:
        first = {name: value[:, :1] for name, value in self.by_position.items()}
        return TargetOutput(self.nothing, None, None, {**first, **self.at_first})

    def verify(self, drafted: Tensor) -> TargetOutput:
        width, (first,) = drafted.shape[1] + 1, self.text.position
        if self.rereading is not None:
            self.rereading.verify(width)
        known = {name: value[:, first : first + width] for name, value in self.by_position.items()}
        return TargetOutput(self.nothing, None, None, known)

    def rollback(self, count: Sequence[int]) -> None:
        if self.rereading is not None:
            self.rereading.reject(count[0])

    def embed(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError("a trace knows its features and embeds nothing")


class TracedDrafter:
    """A `DrafterSession` without a model, that reads what a real one with such `work` would read."""

    def __init__(self, lookup: Lookup, text: RunningText, work: DraftWork, wants: frozenset[Feature]) -> None:
        self.lookup, self.text, self.work = lookup, text, work
        self.wanted = [name for name in lookup.features if name in wants]
        self.waiting: int | None = None
        """Positions that the next draft reads; None until prefill has decided the first token."""
        self.length: int | None = None
        """Tokens of the draft since the last advance."""

    def advance(self, features: Tensor | None) -> None:
        if self.waiting is None:
            self.waiting = self.work.first(self.text.prompt_length[0])
        elif self.length is None:
            self.waiting = self.work.after_no_draft(self.waiting)
        else:
            self.waiting = self.work.after_draft(self.length, self.text.newest.shape[1] - 1)
        self.length = None

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        row, column = self.text.position[0] - 1, self.lookup.column(block_size[0])
        self.length = self.lookup.draft_length[row][column]
        if go_on is not None and self.work.may_end_early:
            for length in range(1, self.length):
                if not go_on(self._proposal(row, column, length).after(length - 1)):
                    self.length = length
                    break
        return self._proposal(row, column, self.length)

    def _proposal(self, row: int, column: int, length: int) -> Proposal:
        tokens = self.lookup.drafted[row, column, :length][None]
        features = {name: self.lookup.features[name][row, column, :length][None] for name in self.wanted}
        return Proposal(tokens, None, None, self.waiting or 0, {Feature.DRAFT_TOKENS: tokens, **features})


class TracedRule:
    """A `VerifyRule` that knows which drafted tokens stand."""

    def __init__(self, lookup: Lookup, text: RunningText) -> None:
        self.lookup, self.text = lookup, text
        self.no_tie = torch.zeros(1, 1, dtype=torch.bool)
        self.unused = Draw(Processors(LogitsProcessorList()), None, 0, text.ids)

    def draw(self) -> Draw:
        return self.unused

    def verify(self, logits: Tensor, draft: Draft, width: int) -> Verdict:
        (position,), accepted = self.text.position, 0
        if width > 0:
            column = self.lookup.column(int(draft.block_size))
            accepted = min(self.lookup.num_accepted[position - 1][column], width)
        tokens = self.lookup.output[:, position : position + accepted + 1]
        return Verdict(tokens, torch.tensor([accepted]), self.no_tie)


class TracedStop:
    """A `StopRule` that ends where the output did."""

    def __init__(self, trace: PromptTrace, text: RunningText) -> None:
        self.text = text
        self.max_length = trace.prompt_length + trace.max_new_tokens
        self.end = trace.prompt_length + trace.output_length

    def cut(self, row: int, tokens: Sequence[int]) -> tuple[int, bool]:
        return len(tokens), self.text.length[row] + len(tokens) == self.end
