"""Who is told how far work that takes long has come, such as the bar of the command line."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far work has come."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` ticks begins."""
        ...

    def tick(self) -> None:
        """One is done."""
        ...


class NoProgress:
    """Tells nobody."""

    def start(self, phase: str, total: int) -> None: ...

    def tick(self) -> None: ...
