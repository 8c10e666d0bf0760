"""Keys and values of many rows in slots that are allocated once: writing and rolling back move nothing.

A slot has room for `capacity` tokens of one row, and one more column for padding that has no place elsewhere. What a
row holds are its first tokens; everything behind them is left over from padding, from rejected tokens or from rows of
before, and no mask shows it to a query that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

STEP = 256
"""Columns by which slots become longer."""
DUMMY: Any = getattr(cache_utils, "DummyLayer", None)
"""The class of layers that keep nothing. transformers before 5.20 leaves such layers out of a cache."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Where the tokens of a pass are written, and what of the slots its queries are given.

    Attributes:
        rows: that run, the first slots.
        start: column of the first token of every row, or None where they differ.
        places: columns of all tokens, int64 [rows, width]; not needed where all rows start alike.
        row_indices: int64 [rows, 1], beside `places`.
        lengths: the fewest and the most tokens that a row held before.
        end: columns that are read.
    """

    rows: int
    start: int | None
    places: Tensor | None
    row_indices: Tensor | None
    lengths: tuple[int, int]
    end: int

    def first(self, window: int | None) -> int:
        """The first column that any query sees."""
        return 0 if window is None else max(0, self.lengths[0] - window + 1)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each [slots, heads, capacity + 1, dim], allocated by the first pass.

    Args:
        window: tokens that a query sees, itself included; None for all.
    """

    is_croppable = True
    reading: Reading

    def __init__(self, slots: int, capacity: int, window: int | None) -> None:
        super().__init__()
        self.slots, self.capacity, self.window = slots, capacity, window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, because what no mask shows still takes part, times 0.
        self.keys, self.values = (
            like.new_zeros((self.slots, like.shape[1], self.capacity + 1, like.shape[3]))
            for like in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, width, dim]; returns the columns that are seen, [rows, heads, columns, dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        reading, first = self.reading, self.reading.first(self.window)
        seen = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            assert kept is not None
            _write(kept, new, reading)
            seen.append(kept[: reading.rows, :, first : reading.end])
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.reading.first(self.window)
        return self.reading.end - first, first

    def get_seq_length(self) -> int:
        return self.reading.lengths[1]

    def get_max_length(self) -> int:
        return self.capacity

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` columns of some slots to others."""
        for kept in (self.keys, self.values):
            if kept is not None and length:
                at = _sent([*sources, *targets], kept.device).view(2, -1)
                kept[at[1], :, :length] = kept[at[0], :, :length]

    def shift(self, places: Tensor) -> None:
        """Copy single columns: rows, from which column, and to which, int64 [3, count], on the host."""
        for kept in (self.keys, self.values):
            if kept is not None:
                rows, sources, targets = places.to(kept.device, non_blocking=True)
                columns = kept.transpose(1, 2)
                columns[rows, targets] = columns[rows, sources]

    def grow(self, slots: int, capacity: int, rows: int, length: int) -> None:
        """Make room, and keep the first `length` columns of the first `rows` slots."""
        old, self.slots, self.capacity = (self.keys, self.values), slots, capacity
        if old[0] is None or old[1] is None:
            return
        self.lazy_initialization(*old)
        for kept, before in zip((self.keys, self.values), old, strict=True):
            kept[:rows, :, :length] = before[:rows, :, :length]

    def take(self, other: SlotLayer, rows: int, count: int, length: int) -> None:
        """Copy the first `length` columns of another's first `count` slots behind one's own `rows`."""
        if other.keys is None or other.values is None:
            return
        if not self.is_initialized:
            self.lazy_initialization(other.keys, other.values)
        for kept, more in ((self.keys, other.keys), (self.values, other.values)):
            kept[rows : rows + count, :, :length] = more[:count, :, :length]


def _write(kept: Tensor, new: Tensor, reading: Reading) -> None:
    if reading.start is not None:
        kept[: reading.rows, :, reading.start : reading.start + new.shape[2]] = new
    else:
        assert reading.places is not None
        assert reading.row_indices is not None
        places, rows = reading.places.to(kept.device), reading.row_indices.to(kept.device)
        kept.transpose(1, 2)[rows, places] = new.transpose(1, 2)


def _sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device, int64, without waiting for what the device still has to do."""
    return torch.tensor(numbers).to(device, non_blocking=True)


class SlotCache(Cache):
    """The cache of a model with slots, as its passes take it.

    Args:
        config: of the model's text part; says which layers have a window, and which keep nothing.
        slots: rows that may run together. capacity: tokens of each.

    Attributes:
        held: tokens of each running row, which are the first slots.
    """

    def __init__(self, config: PreTrainedConfig, *, rows: int, slots: int, capacity: int) -> None:
        self.config, self.slots, self.capacity = config, slots, capacity
        self.held = [0] * rows
        layers = [
            DUMMY() if kind == "dummy" else SlotLayer(slots, capacity, options.get("sliding_window"))
            for kind, options in zip(*get_layer_types_and_kwargs(config), strict=True)
        ]
        super().__init__(layers=layers)
        self.slot_layers = [layer for layer in layers if isinstance(layer, SlotLayer)]

    @property
    def room(self) -> tuple[int, int]:
        """Slots and their capacity; while it is the same, so are the addresses of what was written."""
        return self.slots, self.capacity

    @property
    def written(self) -> bool:
        """Whether a pass has written to it."""
        return all(layer.is_initialized for layer in self.slot_layers)

    def place(self, width: int, counts: Sequence[int], device: torch.device) -> Reading:
        """Say where the next pass writes, of which `counts` tokens of each row count. Reads nothing from the device.

        Raises:
            ValueError: a row has more tokens than its slot has room for.
        """
        self.refuse_overflow(counts)
        fewest, most = min(self.held), max(self.held)
        end = min(most + width, self.capacity + 1)
        if fewest == most and most + width <= self.capacity:
            return Reading(len(self.held), most, None, None, (fewest, most), end)
        return self.reading(_sent(self.held, device), width, end, (fewest, most))

    def reading(self, held: Tensor, width: int, end: int, lengths: tuple[int, int] = (0, 0)) -> Reading:
        """Of rows that hold so many tokens, int64 [rows], on the device. Without `lengths` any counts may be in it."""
        places = (held[:, None] + torch.arange(width, device=held.device)).clamp_(max=self.capacity)
        rows = torch.arange(len(held), device=held.device)[:, None]
        return Reading(len(held), None, places, rows, lengths, end)

    def refuse_overflow(self, counts: Sequence[int]) -> None:
        """Raise ValueError if a row that reads so many tokens has more than its slot has room for."""
        longest = max(held + count for held, count in zip(self.held, counts, strict=True))
        if longest > self.capacity:
            raise ValueError(f"a row comes to {longest} tokens and its slot has room for {self.capacity}")

    def begin(self, reading: Reading) -> None:
        """The next pass is this one."""
        for layer in self.slot_layers:
            layer.reading = reading

    def hold(self, starts: Sequence[int], columns: Sequence[Sequence[int]]) -> None:
        """Of what rows hold from `starts` on, keep these columns alone, counted from there, one behind the other."""
        moved = [
            (row, start + column, start + place)
            for row, (start, own) in enumerate(zip(starts, columns, strict=True))
            for place, column in enumerate(own)
            if column != place
        ]
        if moved:
            for layer in self.slot_layers:
                layer.shift(torch.tensor(moved).T)
        self.held = [start + len(own) for start, own in zip(starts, columns, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order; slots of rows that change place are copied."""
        moved = [(source, target) for target, source in enumerate(rows) if source != target]
        if moved:
            sources, targets = zip(*moved, strict=True)
            for layer in self.slot_layers:
                layer.move(sources, targets, max(self.held[source] for source in sources))
        self.held = [self.held[row] for row in rows]

    def join(self, other: SlotCache) -> None:
        """Take in another's rows after one's own."""
        rows, count = len(self.held), len(other.held)
        slots, capacity = max(self.slots, rows + count), self.capacity
        if other.capacity > capacity:
            capacity += -(-(other.capacity - capacity) // STEP) * STEP
        if (slots, capacity) != (self.slots, self.capacity):
            self.slots, self.capacity = slots, capacity
            for layer in self.slot_layers:
                layer.grow(slots, capacity, rows, max(self.held, default=0))
        for layer, more in zip(self.slot_layers, other.slot_layers, strict=True):
            layer.take(more, rows, count, max(other.held, default=0))
        self.held = [*self.held, *other.held]

    def row(self, row: int) -> DynamicCache:
        """What is held of one row."""
        made = DynamicCache(config=self.config)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SlotLayer) and layer.keys is not None and layer.values is not None:
                held = self.held[row]
                made.update(layer.keys[row : row + 1, :, :held], layer.values[row : row + 1, :, :held], i)
        return made
