"""Drafts of drafters that are known by their protocol alone: asked one by one, as the live loop would ask."""

from __future__ import annotations

import torch
from torch import Tensor

from bpkit.decode.drafter import Drafter, DrafterSession, Offer, Proposal, offers_of, proposed
from bpkit.decode.sampling import Draw, Sampler, Samplers
from bpkit.decode.sources import work_of_drafter
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.autoregressive import LevelWiseSession
from bpkit.trace.collect.drafts import Drafts, Finished


@torch.no_grad()
def trace_step_by_step(drafter: Drafter, finished: Finished) -> Drafts:
    """Draft from every position with every block size, through the drafter's own sessions.

    Of stores, and of trees that grow level by level, smaller drafts are the beginnings of larger ones. Then the largest
    serves all sizes, and one session all positions.
    """
    drafts = Drafts(finished)
    session, text = _session_at(drafter, finished, 0)
    looked_up = work_of_drafter(drafter).free and offers_of(session, finished.width) is not None
    if looked_up or isinstance(session, LevelWiseSession):
        _go_along(session, text, drafts, looked_up=looked_up)
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


def _go_along(session: DrafterSession, text: RunningText, drafts: Drafts, *, looked_up: bool) -> None:
    """Draft the largest block at each position, token after token of the output.

    Args:
        session, text: before the draft of row 0.
        looked_up: whether the session makes offers, of which chains are the beginnings.
    """
    finished = drafts.finished
    if looked_up:
        drafts.match_length = torch.zeros(finished.rows, dtype=torch.long)
        drafts.match_share = torch.zeros(finished.rows, dtype=torch.float64)
    for row in range(finished.rows):
        if row > 0:
            _append(text, finished, 1)
            read = finished.prompt_length + row
            session.advance(_features(finished, read - 1, read))
        (offered,) = offers_of(session, finished.width) or [Offer([])]
        if drafts.match_length is not None and drafts.match_share is not None:
            drafts.match_length[row], drafts.match_share[row] = offered.match, offered.share
        if finished.trees:
            proposal = session.draft([finished.width + 1], _draw(finished, text), None)
        else:
            proposal = proposed(offered)
        for column in range(len(finished.block_sizes)):
            _put(drafts, row, column, proposal)


def _put(drafts: Drafts, row: int, column: int, proposal: Proposal) -> None:
    """Enter one proposal, or the beginning of a larger one, measured by its own scores."""
    scores, hidden = proposal.scores, proposal.hidden
    count = min(proposal.counts[0], drafts.finished.block_sizes[column] - 1)
    tokens = proposal.tokens[0, :count]
    where = slice(row, row + 1), slice(column, column + 1), slice(0, count)
    if drafts.parents is not None and drafts.chances is not None:
        tree = proposal.as_tree()
        assert tree.parents is not None
        assert tree.chances is not None
        drafts.parents[where], drafts.chances[where] = tree.parents[0, :count], tree.chances[0, :count]
    if scores is None or count == 0:
        drafts.tokens[where] = tokens
    else:
        of_tokens = proposal.of_tokens(scores)[0, :count].float()
        states = None if hidden is None else proposal.of_tokens(hidden)[0, :count]
        drafts.put(where, lambda piece: (of_tokens[piece], tokens[piece]), states)


def _draw(finished: Finished, text: RunningText) -> Draw:
    """What the drafter draws with after the text."""
    return Draw(Samplers([Sampler(text.rows[0], finished.processors, finished.noise)]))
