"""A target session whose rows share every pass, whatever each of them holds and reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from bpkit.decode.attention import NAME
from bpkit.decode.capture import WIDTHS, Graphs, Input, counts_of
from bpkit.decode.inputs import ModelInputs
from bpkit.decode.masks import added, causal, of_trees
from bpkit.decode.slots import Reading, SlotCache
from bpkit.decode.target import LiveTarget, TargetOutput, of_prefill
from bpkit.decode.text import to_device
from bpkit.decode.trees import Level, Tree

KINDS = {"full_attention", "sliding_attention"}
"""Kinds of attention layers whose masks are made here."""
BOOLEAN, ADDED = {"sdpa", NAME}, {"eager"}
"""Ways of computing attention, by the masks that they take."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass, all of it prepared: where it writes and what the model is called with.

    Attributes:
        tokens: int64 [rows, width].
        inputs: what the model takes beside tokens and cache: masks, positions.
    """

    tokens: Tensor
    reading: Reading
    inputs: Mapping[str, Any]


class SlotTarget(LiveTarget):
    """Rows in the slots of one cache.

    A pass reads as many columns of every row as its widest row has tokens; masks and positions are made from what each
    row holds. Where all rows hold alike the model makes its own masks, as for a single row.

    Args:
        rows: that run at first. slots: that may run together.
        capacity: tokens that any of these rows may come to.
        wanted: of `LiveTarget`.
    """

    shares_passes = True
    stateful = False
    graphs: Graphs | None = None
    """Passes that are captured, where some are."""

    def __init__(self, model: PreTrainedModel, *, rows: int, capacity: int, slots: int, **wanted: Any) -> None:
        super().__init__(model, **wanted)
        config = model.config.get_text_config(decoder=True)
        self.slot_cache = SlotCache(config, rows=rows, slots=max(slots, rows), capacity=capacity)
        self.windows = windows(model)
        self.adds_masks = config._attn_implementation in ADDED
        self.inputs: list[ModelInputs | None] = [None] * rows
        """What passes after prefill take beside tokens, of each row."""

    @property
    def held(self) -> list[int]:
        return self.slot_cache.held

    @property
    def reread(self) -> int:
        return 0

    def prefill(self, tokens: Tensor, counts: Sequence[int], *, last: bool, **inputs: Any) -> TargetOutput:
        if last:
            tokens = tokens[:, : counts[0]]
            few = tokens.shape[1] <= WIDTHS[-1] and not inputs
            if few and self.graphs is not None and self.graphs.lent_to(self):
                return of_prefill(self.verify(tokens, counts))  # an assistant reads on
        return of_prefill(self._read(tokens, counts, logits_to_keep=1, **inputs))

    def verify(self, tokens: Tensor, counts: Sequence[int]) -> TargetOutput:
        replayed = None if self.graphs is None else self._replay(self.graphs, tokens, counts)
        return self._read(tokens, counts, logits_to_keep=0) if replayed is None else replayed

    def verify_trees(self, tokens: Tensor, tree: Tree | Level) -> TargetOutput:
        """Score anchors and nodes of drafted trees, int64 [rows, columns], all of which are kept until `accept`.

        Of a `Level` the newest nodes alone, which see those that were read before them. Such passes are not captured:
        the shape of a tree is as good as never the same.
        """
        cache, device = self.slot_cache, tokens.device
        before = [held - columns for held, columns in zip(cache.held, tree.first, strict=True)]
        reading, held = cache.place(tokens.shape[1], tree.counts, device), to_device(before, device)[:, None]
        # Nodes are at positions of the text, from the anchor's on: a window begins by these, not by columns.
        reading = replace(reading, lengths=(min(before), reading.lengths[1]))
        inputs: dict[str, Any] = {
            name: value.gather(-1, tree.queries.expand(*value.shape[:-1], -1))
            for name, value in self._following(tree.deepest + 1, before).items()
        }
        if self.counts_positions and "position_ids" not in inputs:
            positions = held + tree.queries
            inputs["position_ids"] = positions if self.positions is None else positions.clamp(max=self.positions - 1)
        inputs["attention_mask"] = self._by_kind(
            reading, lambda first, window: of_trees(held, tree, first, reading.end, window)
        )
        output = self._run(Pass(tokens, reading, inputs), 0)
        cache.held = [held + count for held, count in zip(cache.held, tree.counts, strict=True)]
        return self._output(output, device)

    def accept(self, counts: Sequence[int], columns: Sequence[Sequence[int]]) -> None:
        """Of the last tokens that were read, so many of each row, keep these, ascending, and drop the others."""
        cache = self.slot_cache
        cache.hold([held - count for held, count in zip(cache.held, counts, strict=True)], columns)

    def read_below(self, part: nn.Module, tokens: Tensor, counts: Sequence[int], held: Sequence[int]) -> Tensor:
        """Hidden states of tokens after the first layers, [rows, width, hidden]; keys and values are written, not held.

        Args:
            part: the model's decoder with its first layers alone, and no norm.
            tokens: int64 [rows, width]. counts: how many of them count. held: tokens of each row before them.
        """
        cache = self.slot_cache
        before, cache.held = cache.held, list(held)
        try:
            prepared = self._prepared(tokens, counts, {})
        finally:
            cache.held = before
        cache.begin(prepared.reading)
        hidden: Tensor = part(
            input_ids=prepared.tokens, past_key_values=cache, use_cache=True, **prepared.inputs
        ).last_hidden_state
        return hidden

    def rollback(self, counts: Sequence[int]) -> None:
        cache = self.slot_cache
        cache.held = [held - count for held, count in zip(cache.held, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        self.slot_cache.keep(rows)
        self.inputs = [self.inputs[row] for row in rows]

    def join(self, other: SlotTarget) -> None:
        self.slot_cache.join(other.slot_cache)
        self.inputs = [*self.inputs, *other.inputs]

    def cache(self, row: int) -> DynamicCache:
        return self.slot_cache.row(row)

    def _read(self, tokens: Tensor, counts: Sequence[int], *, logits_to_keep: int, **inputs: Any) -> TargetOutput:
        prepared = self._prepared(tokens, counts, inputs)
        output = self._run(prepared, logits_to_keep)
        cache = self.slot_cache
        cache.held = [held + count for held, count in zip(cache.held, counts, strict=True)]
        return self._output(output, tokens.device)

    def _replay(self, graphs: Graphs, tokens: Tensor, counts: Sequence[int]) -> TargetOutput | None:
        """The same out of a graph, or None where there is none for such a pass."""
        beside_tokens = any(row is not None and row.following for row in self.inputs)
        shape = None if beside_tokens else graphs.shape(self, tokens.shape[1])
        if shape is None:
            return None
        cache = self.slot_cache
        cache.refuse_overflow(counts)
        replayed = graphs.run(
            shape,
            tuple(self._wanted),
            [Input(tokens, (shape.rows, *shape.widths)), counts_of([cache.held], shape.rows, [0])],
            lambda tokens, held: self._outputs(tokens, cache.reading(held[0], tokens.shape[1], shape.end)),
            (tokens.shape[0], tokens.shape[1]),
            lambda: self._outputs(tokens, cache.place(tokens.shape[1], counts, tokens.device))[0],
        )
        if replayed is None:
            return None
        cache.held = [held + count for held, count in zip(cache.held, counts, strict=True)]
        logits, features, last_hidden = replayed
        assert logits is not None
        return TargetOutput(logits, features, last_hidden)

    def _outputs(self, tokens: Tensor, reading: Reading) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits, features and last hidden states of a pass that reads nothing beside tokens."""
        made = self._output(self._run(Pass(tokens, reading, self._inputs(reading, tokens, {})), 0), tokens.device)
        return made.logits, made.features, made.last_hidden

    def _run(self, prepared: Pass, logits_to_keep: int) -> Any:
        """The pass itself: everything that it needs has been made before."""
        self.slot_cache.begin(prepared.reading)
        return self._call(
            prepared.tokens,
            self.slot_cache,
            logits_to_keep=logits_to_keep,
            states=self._wanted,
            **prepared.inputs,
        )

    def _prepared(self, tokens: Tensor, counts: Sequence[int], inputs: dict[str, Any]) -> Pass:
        reading = self.slot_cache.place(tokens.shape[1], counts, tokens.device)
        inputs.update(self._following(tokens.shape[1]))
        return Pass(tokens, reading, self._inputs(reading, tokens, inputs))

    def _inputs(self, reading: Reading, tokens: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """With positions and masks."""
        if self.counts_positions and "position_ids" not in inputs:
            positions = reading.places
            if positions is None:
                positions = torch.arange(reading.end - tokens.shape[1], reading.end, device=tokens.device)[None]
            if self.positions is not None:
                positions = positions.clamp(max=self.positions - 1)  # of padding: the table ends there
            inputs["position_ids"] = positions
        if reading.places is not None:
            inputs["attention_mask"] = self._masks(reading.places, reading)
        return inputs

    def _following(self, width: int, after: Sequence[int] | None = None) -> dict[str, Tensor]:
        """What the rows' own inputs are at `width` tokens, by default at the next ones, [rows, width].

        Args:
            after: tokens of each row before them.

        Raises:
            ValueError: an input that some rows have and others lack.
        """
        given = [
            row.at(held, width) if row is not None and held else {}
            for row, held in zip(self.inputs, after or self.held, strict=True)
        ]
        for name in {name for row in given for name in row}:
            if not all(name in row for row in given):
                raise ValueError(f"{name}: rows with it and rows without cannot share a pass; decode them one by one")
        return {name: torch.cat([row[name] for row in given]) for name in given[0]}

    def _masks(self, places: Tensor, reading: Reading) -> Any:
        """The mask of all layers, or one by kind of layer where there are several kinds."""
        return self._by_kind(reading, lambda first, window: causal(places, first, reading.end, window))

    def _by_kind(self, reading: Reading, mask: Callable[[int, int | None], Tensor]) -> Any:
        """The same of any mask by its first key and its window."""
        made: dict[str, Tensor] = {}
        for kind, window in self.windows.items():
            reached = window is not None and reading.end > window
            seen = mask(reading.first(window), window if reached else None)
            made[kind] = added(seen, self.model.dtype) if self.adds_masks else seen
        return made if len(made) > 1 else next(iter(made.values()))


def windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Kinds of attention layers, as the model's masks are called, with their windows."""
    kinds, options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    return {kind: option.get("sliding_window") for kind, option in zip(kinds, options, strict=True) if kind != "dummy"}


def may_share_passes(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths may be read together: whether masks and attention are of the known kinds.

    Layers that compute attention by code of their own may hide keys by it, beyond lengths that anybody tries.
    """
    config = model.config.get_text_config(decoder=True)
    kinds, options = get_layer_types_and_kwargs(config)
    layers = {(kind, option.get("sliding_window")) for kind, option in zip(kinds, options, strict=True)}
    attention = {kind for kind, _ in layers} - {"dummy"}
    return (
        config is model.config
        and bool(attention)
        and attention <= KINDS
        and len(layers - {("dummy", None)}) == len(attention)  # one window for all layers of a kind
        and config._attn_implementation in BOOLEAN | ADDED
        and model._supports_attention_backend
    )
