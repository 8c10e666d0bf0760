"""Who is told how far a long measurement has come."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far a measurement has come."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` runs begins."""
        ...

    def tick(self) -> None:
        """A run is done."""
        ...


class NoProgress:
    """Tells nobody."""

    def start(self, phase: str, total: int) -> None: ...

    def tick(self) -> None: ...
