"""Drafts of drafters that are known by their protocol alone: asked one by one, as the live loop would ask."""

from __future__ import annotations

import torch
from torch import Tensor

from bpkit.decode.noise import GumbelNoise
from bpkit.decode.sampling import Draw
from bpkit.draft.base import Drafter, DrafterSession, Proposal
from bpkit.draft.ngram import NgramDrafter
from bpkit.trace.collect.drafting import Drafts, Finished
from bpkit.trace.collect.pieces import Positions
from bpkit.trace.collect.reader import Drafted


@torch.no_grad()
def trace_step_by_step(drafter: Drafter, finished: Finished) -> Drafts:
    """Draft from every position with every block size, through the drafter's own sessions."""
    drafts = Drafts(finished)
    if type(drafter) is NgramDrafter:
        _look_up(drafter, finished, drafts)
        return drafts
    for row in range(finished.rows):
        for column, block_size in enumerate(finished.block_sizes):
            proposal = _session_at(drafter, finished, row).draft(block_size, _draw(finished, row), None)
            _put(drafts, finished, row, column, proposal)
    return drafts


def refuse_memory(drafter: Drafter) -> None:
    """Refuse a drafter whose drafts depend on earlier requests.

    Raises:
        ValueError: it says `remembers_requests`.
    """
    if getattr(drafter, "remembers_requests", False):
        raise ValueError(
            f"drafter {drafter.name} remembers earlier requests, so that what it drafts for a prompt depends on the "
            "prompts before it: a trace would hold for one order of prompts only. Switch its memory off to trace it, "
            "or measure it live, with `bpkit bench`, where the order of prompts is fixed"
        )


def _session_at(drafter: Drafter, finished: Finished, row: int) -> DrafterSession:
    """A fresh session that knows what is decided before the draft of a row, handed over as the loop does."""
    first = finished.prompt_length
    features, session = finished.features, drafter.begin()
    session.advance(finished.ids[:, : first + 1], None if features is None else features[:, :first])
    if row > 0:
        later = None if features is None else features[:, first : first + row]
        session.advance(finished.ids[:, first + 1 : first + row + 1], later)
    return session


def _look_up(drafter: NgramDrafter, finished: Finished, drafts: Drafts) -> None:
    """n-grams: a draft leaves the session as it was and begins with all smaller ones, so that one session serves."""
    if finished.rows == 0:
        return
    session = _session_at(drafter, finished, 0)
    for row in range(finished.rows):
        if row > 0:
            session.advance(finished.ids[:, finished.prompt_length + row, None], None)
        tokens = session.draft(finished.width + 1, _draw(finished, row), None).tokens[0]
        for column, block_size in enumerate(finished.block_sizes):
            drafts.put_tokens(row, column, tokens[: block_size - 1])


def _put(drafts: Drafts, finished: Finished, row: int, column: int, proposal: Proposal) -> None:
    """Enter one proposal, measured by its own scores."""
    tokens = proposal.tokens[0]
    if proposal.scores is None or len(tokens) == 0:
        drafts.put_tokens(row, column, tokens)
        return
    index = torch.arange(row + 1, row + 1 + len(tokens), device=tokens.device)
    reader, scores = finished.reader, proposal.scores[0]
    parts = [reader.measure(scores[p].float(), tokens[p], index[p]) for p in reader.pieces(len(tokens))]
    drafted = Drafted.joined(parts)
    hidden = proposal.hidden[0] if finished.keep_hidden and proposal.hidden is not None else None
    drafts.put(slice(row, row + 1), column, drafted, hidden)


def _draw(finished: Finished, row: int) -> Draw:
    """What the drafter draws with at a row; its first token stands for output position `row + 1`."""
    reader = finished.reader
    noise = None if reader.noise is None else GivenNoise(reader.noise, reader.vocab_size, finished.ids.device)
    return Draw(reader.processors, noise, row + 1, finished.before(row))


class GivenNoise(GumbelNoise):
    """Noise of positions 0, 1, ... that is there already, float32 [positions, vocab]."""

    def __init__(self, given: Tensor | Positions, vocab_size: int, device: torch.device) -> None:
        super().__init__(0, 0, vocab_size, device)
        self.given = given

    def at(self, start: int, count: int) -> Tensor:
        if start + count > len(self.given):
            raise IndexError(
                f"the noise ends at position {len(self.given)}; {start} to {start + count - 1} were asked for"
            )
        return self.given[torch.arange(start, start + count, device=self.device)]
