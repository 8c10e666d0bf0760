"""True rollouts of an autoregressive drafter from every position of an output, many at once.

A smaller block is the beginning of a larger one, so that one rollout from each position serves every block size.
Rollouts stand side by side in one sequence: each sees the decided tokens up to its own anchor, which are read once for
all, and then its own tokens. They are told apart by position ids and the attention mask, so that keys and values of
the shared prefix are never copied. Drafted tokens feed the next step: nothing is teacher-forced.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bpkit.decode.pretrained import hidden_states_at
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.trace.collect.drafts import Drafts, Finished
from bpkit.trace.collect.pieces import fitting, pieces
from bpkit.trace.collect.stepwise import trace_step_by_step

ROLLOUTS_AT_ONCE = 128
"""Rollouts see each other's tokens as masked keys, so that more is cheaper only while those are few. Large vocabularies
have fewer: the logits of all are held at once, and may take an eighth of `VOCABULARY_BYTES`."""

PROBED = 8
"""Positions that are read both ways, to see whether a model honours mask and position ids."""


@torch.no_grad()
def trace_rollouts(drafter: AutoregressiveDrafter, finished: Finished) -> Drafts:
    """Draft from every position with every block size; equal to the live drafter's drafts up to rounding.

    A model whose prefix cannot be shared (a sliding window, linear attention, positions that it derives from the
    cache) is drafted with step by step instead.
    """
    drafts, rollouts = Drafts(finished), Rollouts(drafter, finished)
    if not rollouts.begin():
        return trace_step_by_step(drafter, finished)
    for rows in pieces(finished.rows, min(ROLLOUTS_AT_ONCE, fitting(4 * finished.vocab_size, share=8))):
        rollouts.roll_out(rows, drafts)
    return drafts


class Rollouts:
    """The drafter's keys and values of the decided tokens, and of the rollouts that are under way."""

    def __init__(self, drafter: AutoregressiveDrafter, finished: Finished) -> None:
        self.drafter, self.finished = drafter, finished
        self.cache = DynamicCache(config=drafter.model.config.get_text_config())

    def begin(self) -> bool:
        """Read the prompt. False if rollouts that share a prefix are not what each would be alone.

        Layers that keep something else than all keys and values are told by their cache; the rest is tried out.
        """
        longest, positions = self.finished.ids.shape[1] + self.finished.width, self.drafter.positions
        if positions is not None and longest > positions:  # the last drafts are shorter, or none
            return False
        if not all(type(layer) is DynamicLayer for layer in self.cache.layers):
            return False
        prompt = self.finished.ids[:, : self.finished.prompt_length]
        try:
            self._forward(prompt, torch.arange(prompt.shape[1], device=prompt.device), logits_to_keep=1)
            return self._honoured()
        except (RuntimeError, ValueError, TypeError, IndexError):  # a model that takes no such mask or position ids
            return False

    def _honoured(self) -> bool:
        """Whether a few anchors, read side by side as rollouts are, give the logits that plain reading gives."""
        count = min(PROBED, self.finished.rows)
        anchors = self._anchors(torch.arange(count, device=self.finished.ids.device))
        tokens = self.finished.ids[:, anchors]
        wanted = self._forward(tokens, anchors).logits.float()
        # The same once more: each token sees what lies before it, and itself, but not its double.
        found = self._forward(tokens, anchors, self._mask(anchors - 1, 1)).logits.float()
        self.cache.crop(-2 * count)
        # Half the digits: rounding stays far below, a wrong position or a wrong key far above.
        tolerance = torch.finfo(self.drafter.model.dtype).eps ** 0.5
        return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())

    def roll_out(self, rows: slice, drafts: Drafts) -> None:
        """Draft from `rows`, which follow on those before; their anchors stay in the cache."""
        finished, count = self.finished, rows.stop - rows.start
        anchors = self._anchors(torch.arange(rows.start, rows.stop, device=finished.ids.device))
        for step in range(finished.width):
            if step == 0:  # anchors are decided tokens: all rows read them at once, as a text
                output = self._forward(finished.ids[:, anchors], anchors)
            else:
                drafted = drafts.tokens[None, rows, -1, step - 1].to(anchors.device)
                output = self._forward(drafted, anchors + step, self._mask(anchors, step))
            longer = slice(bisect_right(finished.block_sizes, step + 1), None)  # those that draft another token
            hidden = output.hidden_states[self.drafter.last_index][0] if finished.keep_hidden else None
            drafts.draw((rows, longer, slice(step, step + 1)), self.drafter.score, output.logits[0], hidden)
        self.cache.crop(-(finished.width - 1) * count)

    def _anchors(self, rows: Tensor) -> Tensor:
        """Absolute positions of the rows' anchors, int64 [rows]."""
        return self.finished.prompt_length + rows

    def _mask(self, last_seen: Tensor, steps: int) -> Tensor:
        """What rollouts see: decided tokens up to `last_seen`, int64 [rows], and their own of each step.

        Returns:
            what to add to the attention scores, [1, 1, rows, decided tokens in the cache + steps * rows]. Numbers
            rather than booleans: every implementation of attention takes them.
        """
        rows, dtype = len(last_seen), self.drafter.model.dtype
        decided = self.cache.get_seq_length() - (steps - 1) * rows
        before = torch.arange(decided, device=last_seen.device) <= last_seen[:, None]
        own = torch.eye(rows, dtype=torch.bool, device=last_seen.device).repeat(1, steps)
        seen = torch.cat([before, own], dim=1)[None, None]
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def _forward(self, tokens: Tensor, places: Tensor, mask: Tensor | None = None, logits_to_keep: int = 0) -> Any:
        """Read tokens, int64 [1, count], at absolute positions, int64 [count]."""
        return self.drafter.model(
            input_ids=self.drafter.own(tokens),
            position_ids=places[None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            output_hidden_states=hidden_states_at([self.drafter.last_index] if self.finished.keep_hidden else []),
        )
