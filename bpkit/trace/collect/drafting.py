"""Every draft that could have been made while an output was decided: what a tracer is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.base import Drafter
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.trace.collect.reader import Drafted, DraftReader


@dataclass(frozen=True)
class Finished:
    """A finished output and what its drafts are traced with.

    Attributes:
        ids: prompt and output, int64 [1, length].
        prompt_length: tokens of the prompt.
        features: target features of every position but the last, [1, length - 1, layers * hidden], or None if the
            drafter has no `feature_layers`.
        reader: draws the drafted tokens.
        block_sizes: ascending, from 2.
        keep_hidden: also return the drafter's hidden states.
    """

    ids: Tensor
    prompt_length: int
    features: Tensor | None
    reader: DraftReader
    block_sizes: tuple[int, ...]
    keep_hidden: bool = False

    @property
    def rows(self) -> int:
        """Positions at which a draft may begin: output positions 1 .. output length - 1."""
        return self.ids.shape[1] - self.prompt_length - 1

    @property
    def width(self) -> int:
        """The longest draft."""
        return max(self.block_sizes) - 1

    def before(self, row: int) -> Tensor:
        """Tokens decided before the draft of a row, anchor included: int64 [1, prompt_length + row + 1]."""
        return self.ids[:, : self.prompt_length + row + 1]


class Drafts:
    """The table that a tracer fills in; positions that nobody drafted stay -1 and NaN.

    Attributes:
        draft_length: int64 [rows, sizes].
        tokens: int64 [rows, sizes, width].
        probability, entropy, match_probability: float32 [rows, sizes, width].
        hidden: float32 [rows, sizes, width, drafter hidden], made when the first is put.
    """

    def __init__(self, finished: Finished) -> None:
        shape = (finished.rows, len(finished.block_sizes), finished.width)
        self.draft_length = torch.zeros(shape[:2], dtype=torch.long)
        self.tokens = torch.full(shape, -1)
        self.probability = torch.full(shape, float("nan"))
        self.entropy = self.probability.clone()
        self.match_probability = self.probability.clone()
        self.hidden: Tensor | None = None
        self.has_distribution = False

    def put(self, rows: slice | Tensor, column: int, drafted: Drafted, hidden: Tensor | None = None) -> None:
        """Enter drafts of one block size: `drafted` holds the tokens of `rows`, one draft after the other.

        Args:
            rows: the drafts' rows. hidden: [rows * length, drafter hidden], or None.
        """
        count = len(self.draft_length[rows])
        length = len(drafted.tokens) // max(count, 1)
        self.draft_length[rows, column] = length
        self.tokens[rows, column, :length] = drafted.tokens.view(count, length).cpu()
        self.probability[rows, column, :length] = drafted.probability.view(count, length).float().cpu()
        self.entropy[rows, column, :length] = drafted.entropy.view(count, length).float().cpu()
        if drafted.match_probability is not None:
            self.match_probability[rows, column, :length] = drafted.match_probability.view(count, length).cpu()
        self.has_distribution = True
        if hidden is not None:
            if self.hidden is None:
                self.hidden = self.tokens.new_full((*self.tokens.shape, hidden.shape[-1]), 0, dtype=torch.float32)
                self.hidden.fill_(float("nan"))
            self.hidden[rows, column, :length] = hidden.view(count, length, -1).float().cpu()

    def put_tokens(self, row: int, column: int, tokens: Tensor) -> None:
        """Enter one draft of a drafter that has no distribution: int64 [length]."""
        self.draft_length[row, column] = len(tokens)
        self.tokens[row, column, : len(tokens)] = tokens.cpu()


def trace_drafts(drafter: Drafter, finished: Finished) -> Drafts:
    """All drafts of a finished output, in batches where the kind of drafter allows it.

    A subclass may draft in its own way, so that only the very classes are taken at their word.
    """
    if type(drafter) is BlockDiffusionDrafter and not _windowed(drafter):
        from bpkit.trace.collect.block_diffusion import trace_blocks

        return trace_blocks(drafter, finished)
    if type(drafter) is AutoregressiveDrafter:
        from bpkit.trace.collect.autoregressive import trace_rollouts

        return trace_rollouts(drafter, finished)
    from bpkit.trace.collect.stepwise import trace_step_by_step

    return trace_step_by_step(drafter, finished)


def _windowed(drafter: BlockDiffusionDrafter) -> bool:
    """Whether attention depends on places in the cache, which blocks side by side do not keep."""
    layers = drafter.model.layers
    return bool(drafter.model.config.is_causal) or any(layer.self_attn.sliding_window is not None for layer in layers)
