"""Arrays of positions x vocabulary, a few positions at a time.

One such array of 2,048 positions and 152,000 tokens takes 1.2 GB in float32 and twice that in float64, and what is kept
of a position is a few numbers. So positions are worked off in pieces, as many at a time as `VOCABULARY_BYTES` allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bpkit.decode.noise import GumbelNoise

VOCABULARY_BYTES = 256 * 2**20
"""What all arrays of positions x vocabulary may take together, however long the output is."""
_OF_A_PIECE = 128
"""Bytes for each position and token at the widest moment, `match_probability`, with its sums in float64."""
_MOST = 128
"""More positions at a time are not faster."""


_KEPT = 32 * 2**20 - 2**13
"""Bytes of the largest block that glibc may be taught to keep, its own head included."""


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, which pieces of positions x vocabulary allocate again and again.

    Else it hands pages back after each piece and the system clears them for the next, which took a tenth of the time of
    drafting. A large block that was mapped by itself and freed raises both limits (mallopt(3), `M_MMAP_THRESHOLD`);
    other allocators take no notice.
    """
    torch.empty(_KEPT, dtype=torch.uint8)


def fitting(bytes_of_a_position: int, *, share: int = 1) -> int:
    """How many positions fit into one of `share` parts of `VOCABULARY_BYTES`; at least 1."""
    return max(1, VOCABULARY_BYTES // share // bytes_of_a_position)


def positions_at_once(vocab_size: int) -> int:
    """Positions in a piece.

    >>> positions_at_once(4096), positions_at_once(151_936)
    (128, 13)
    """
    return min(_MOST, fitting(_OF_A_PIECE * vocab_size))


def pieces(count: int, at_once: int) -> Iterator[slice]:
    """Slices that cover `count` positions in order."""
    for first in range(0, count, at_once):
        yield slice(first, min(first + at_once, count))


class Positions:
    """float32 rows [vocab] of positions 0 .. count - 1, which `make` makes of a slice of them when they are asked for.

    The latest are kept, so that asking in rising order makes each once.
    """

    def __init__(self, count: int, vocab_size: int, make: Callable[[slice], Tensor]) -> None:
        self.count, self.make = count, make
        self.at_once = positions_at_once(vocab_size)
        self.kept = max(self.at_once, fitting(4 * vocab_size, share=8))
        self._first, self._rows = 0, torch.empty(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows of positions int64 [rows]: [rows, vocab]. Raises IndexError for a position that is not there."""
        first, last = int(index.min()), int(index.max())
        if not 0 <= first <= last < self.count:
            raise IndexError(f"positions {first} to {last} were asked for, of {self.count}")
        self._hold(first, last + 1)
        return self._rows[index - self._first]

    def _hold(self, first: int, end: int) -> None:
        """Have rows first .. end - 1 among those that are kept."""
        held = self._first + len(self._rows)
        if not self._first <= first <= held:
            self._first, self._rows, held = first, self._rows[:0], first
        if end <= held:
            return
        end = min(self.count, held + self.at_once * -(-(end - held) // self.at_once))  # whole pieces
        made = [self.make(slice(held + p.start, held + p.stop)) for p in pieces(end - held, self.at_once)]
        begin = max(self._first, min(first, end - self.kept))
        rows = self._rows[begin - self._first :]
        self._rows = torch.cat([rows, *made]) if len(rows) else torch.cat(made)
        self._first = begin


class HeldNoise(GumbelNoise):
    """Noise of output positions 0 .. count - 1, in any order, of which a few are held at a time.

    Raises:
        IndexError: a position that is not there.
    """

    def __init__(self, seed: int, stream: int, count: int, width: int, device: torch.device) -> None:
        super().__init__(seed, stream, width, device)
        self.held = Positions(count, width, lambda piece: self._compute(piece.start, piece.stop - piece.start))

    def at(self, start: int, count: int) -> Tensor:
        return self.held[torch.arange(start, start + count, device=self.device)]
