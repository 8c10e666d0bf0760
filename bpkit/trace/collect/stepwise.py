"""Drafts of drafters that are known by their protocol alone: asked one by one, as the live loop would ask."""

from __future__ import annotations

import torch

from bpkit.decode.drafter import Drafter, DrafterSession, Proposal
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
from bpkit.draft.ngram import NgramDrafter
from bpkit.trace.collect.drafts import Drafts, Finished


@torch.no_grad()
def trace_step_by_step(drafter: Drafter, finished: Finished) -> Drafts:
    """Draft from every position with every block size, through the drafter's own sessions."""
    drafts = Drafts(finished)
    if type(drafter) is NgramDrafter:
        _look_up(drafter, finished, drafts)
        return drafts
    for row in range(finished.rows):
        for column, block_size in enumerate(finished.block_sizes):
            session, _ = _session_at(drafter, finished, row)
            proposal = session.draft([block_size], _draw(finished, row), None)
            _put(drafts, row, column, proposal)
    return drafts


def _session_at(drafter: Drafter, finished: Finished, row: int) -> tuple[DrafterSession, RunningText]:
    """A fresh session that knows what is decided before the draft of a row, handed over as the loop does."""
    first, features = finished.prompt_length, finished.features
    text = RunningText(finished.ids[:, :first])
    session = drafter.begin(text)
    _append(text, finished, 1)
    session.advance(None if features is None else features[:, :first])
    if row > 0:
        _append(text, finished, row)
        session.advance(None if features is None else features[:, first : first + row])
    return session, text


def _append(text: RunningText, finished: Finished, count: int) -> None:
    (length,) = text.length
    ids = finished.ids[:, length : length + count]
    text.append(ids, ids.cpu())


def _look_up(drafter: NgramDrafter, finished: Finished, drafts: Drafts) -> None:
    """n-grams: a draft leaves the session as it was and begins with all smaller ones, so that one session serves."""
    session, text = _session_at(drafter, finished, 0)
    for row in range(finished.rows):
        if row > 0:
            _append(text, finished, 1)
            session.advance(None)
        tokens = session.draft([finished.width + 1], _draw(finished, row), None).tokens[0]
        for column, block_size in enumerate(finished.block_sizes):
            length = min(len(tokens), block_size - 1)
            drafts.tokens[row, column, :length] = tokens[:length]


def _put(drafts: Drafts, row: int, column: int, proposal: Proposal) -> None:
    """Enter one proposal, measured by its own scores."""
    tokens, scores, hidden = proposal.tokens[0], proposal.scores, proposal.hidden
    where = slice(row, row + 1), slice(column, column + 1), slice(0, len(tokens))
    if scores is None or len(tokens) == 0:
        drafts.tokens[where] = tokens
    else:
        drafts.put(
            where, lambda piece: (scores[0, piece].float(), tokens[piece]), None if hidden is None else hidden[0]
        )


def _draw(finished: Finished, row: int) -> Draw:
    """What the drafter draws with at a row; its first token stands for output position `row + 1`."""
    return Draw(finished.processors, finished.noise, row + 1, finished.before(row))
