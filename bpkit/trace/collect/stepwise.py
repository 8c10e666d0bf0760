"""Drafts of drafters that are known by their protocol alone: asked one by one, as the live loop would ask."""

from __future__ import annotations

import torch
from torch import Tensor

from bpkit.decode.drafter import Drafter, DrafterSession, Proposal, offers_of
from bpkit.decode.sampling import Draw, Sampler, Samplers
from bpkit.decode.sources import work_of_drafter
from bpkit.decode.text import RowText, RunningText
from bpkit.trace.collect.drafts import Drafts, Finished


@torch.no_grad()
def trace_step_by_step(drafter: Drafter, finished: Finished) -> Drafts:
    """Draft from every position with every block size, through the drafter's own sessions."""
    drafts = Drafts(finished)
    if work_of_drafter(drafter).free and _look_up(drafter, finished, drafts):
        return drafts
    for row in range(finished.rows):
        for column, block_size in enumerate(finished.block_sizes):
            session, text = _session_at(drafter, finished, row)
            proposal = session.draft([block_size], _draw(finished, text), None)
            _put(drafts, row, column, proposal)
    return drafts


def _session_at(drafter: Drafter, finished: Finished, row: int) -> tuple[DrafterSession, RunningText]:
    """A fresh session that knows what is decided before the draft of a row, handed over as the loop does."""
    first = finished.prompt_length
    text = RunningText([RowText(finished.ids[:, :first], finished.ids.shape[1] + finished.width)])
    session = drafter.begin(text)
    _append(text, finished, 1)
    session.advance(_features(finished, 0, first))
    if row > 0:
        _append(text, finished, row)
        session.advance(_features(finished, first, first + row))
    return session, text


def _append(text: RunningText, finished: Finished, count: int) -> None:
    (length,) = text.length
    ids = finished.ids[:, length : length + count]
    text.append(ids, ids[:, -1:], ids.tolist())


def _features(finished: Finished, first: int, end: int) -> list[Tensor] | None:
    return None if finished.features is None else [finished.features[0, first:end]]


def _look_up(drafter: Drafter, finished: Finished, drafts: Drafts) -> bool:
    """Stores: looking leaves the session as it was, and a draft is the beginning of the offer, so that one serves.

    Returns:
        Whether the drafter makes offers.
    """
    session, text = _session_at(drafter, finished, 0)
    if offers_of(session, finished.width) is None:
        return False
    drafts.match_length = torch.zeros(finished.rows, dtype=torch.long)
    drafts.match_share = torch.zeros(finished.rows, dtype=torch.float64)
    for row in range(finished.rows):
        if row > 0:
            _append(text, finished, 1)
            session.advance(None)
        offers = offers_of(session, finished.width)
        assert offers is not None
        (offered,) = offers
        drafts.match_length[row], drafts.match_share[row] = offered.match, offered.share
        tokens = torch.tensor(offered.tokens, dtype=torch.long)
        for column, block_size in enumerate(finished.block_sizes):
            length = min(len(tokens), block_size - 1)
            drafts.tokens[row, column, :length] = tokens[:length]
    return True


def _put(drafts: Drafts, row: int, column: int, proposal: Proposal) -> None:
    """Enter one proposal, measured by its own scores."""
    (count,), scores, hidden = proposal.counts, proposal.scores, proposal.hidden
    tokens = proposal.tokens[0, :count]
    where = slice(row, row + 1), slice(column, column + 1), slice(0, count)
    if scores is None or count == 0:
        drafts.tokens[where] = tokens
    else:
        states = None if hidden is None else hidden[0, :count]
        drafts.put(where, lambda piece: (scores[0, piece].float(), tokens[piece]), states)


def _draw(finished: Finished, text: RunningText) -> Draw:
    """What the drafter draws with after the text."""
    return Draw(Samplers([Sampler(text.rows[0], finished.processors, finished.noise)]))
