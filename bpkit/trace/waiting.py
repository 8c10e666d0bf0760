"""Positions that a drafter must catch up with before it drafts: the part of a step's cost that depends on history.

While block size 1 is chosen the drafter is not called and decided positions wait. The next draft reads them first.
"""

from __future__ import annotations

from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION


def waiting_at_first(kind: str, prompt_length: int) -> int:
    """Positions that the first draft reads: the prompt, and an autoregressive drafter also the anchor."""
    return {BLOCK_DIFFUSION: prompt_length, AUTOREGRESSIVE: prompt_length + 1}.get(kind, 0)


def waiting_after_draft(kind: str, draft_length: int, num_accepted: int) -> int:
    """Positions that wait after a step that drafted.

    A block-diffusion drafter needs the target's features of every position that the step decided. An autoregressive
    one has read all its drafted tokens but the last, so it lacks the anchor, and that last one if it stands.
    """
    if kind == BLOCK_DIFFUSION:
        return num_accepted + 1
    if kind == AUTOREGRESSIVE:
        return 2 if num_accepted == draft_length else 1
    return 0


def waiting_after_no_draft(kind: str, waiting: int) -> int:
    """Positions that wait after a step at block size 1."""
    return waiting + 1 if kind in (BLOCK_DIFFUSION, AUTOREGRESSIVE) else 0
