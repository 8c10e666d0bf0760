"""Some of the prompts of a trace, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from bpkit.trace.records import PromptTrace


class Subset(Sequence[PromptTrace]):
    """Prompts of `whole` at some places; memory stays as flat as there."""

    def __init__(self, whole: Sequence[PromptTrace], places: Sequence[int]) -> None:
        self.whole, self.places = whole, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[PromptTrace]:
        return (self.whole[place] for place in self.places)

    @overload
    def __getitem__(self, place: int) -> PromptTrace: ...
    @overload
    def __getitem__(self, place: slice) -> list[PromptTrace]: ...
    def __getitem__(self, place: int | slice) -> PromptTrace | list[PromptTrace]:
        if isinstance(place, slice):
            return [self.whole[p] for p in self.places[place]]
        return self.whole[self.places[place]]
