"""Runs of single requests as tapes that can be laid side by side: what an engine would hand over for several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bpkit.decode.guard import kind_of
from bpkit.policy import State
from bpkit.testing.checks.runs import Run
from bpkit.testing.checks.stage import short
from bpkit.types import Context, Draft, Seconds, Step

FILL = 1
"""What stands in the padding of a batch: a probability that tempts a policy to trust positions that are not there."""


@dataclass
class Turn:
    """One step of one request; draft and step only where the policy was asked or told."""

    context: Context
    draft: Draft | None = None
    step: Step | None = None


@dataclass
class Tape:
    """One request, as it was decoded by itself."""

    run: Run
    begin: Context
    turns: list[Turn] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{short(self.run.case.prompt)} at temperature {self.run.case.temperature:g}"


def tape_of(run: Run) -> Tape | None:
    """The tape of a run; None if it had no step."""
    tape: Tape | None = None
    for call in run.calls:
        given = call.given
        if call.method == "begin" and isinstance(given, Context):
            tape = Tape(run, given)
        elif tape is not None and call.method == "select" and isinstance(given, Context):
            tape.turns.append(Turn(given))
        elif tape is not None and isinstance(given, Draft):
            tape.turns[-1].draft = given
        elif tape is not None and isinstance(given, Step):
            tape.turns[-1].step = given
    return tape if tape is not None and tape.turns else None


def contexts(rows: Sequence[Context], seed: int) -> Context:
    """One context of several, each of one row, with a generator of its own."""
    names = rows[0].features.keys()
    return Context(
        rows[0].spec,
        torch.cat([row.position for row in rows]),
        torch.cat([row.remaining for row in rows]),
        torch.cat([row.context_length for row in rows]),
        torch.Generator().manual_seed(seed),
        {name: torch.cat([row.features[name] for row in rows]) for name in names},
    )


def drafts(rows: Sequence[Turn], context: Context) -> Draft | None:
    """One draft of several turns, padded to the longest; None if nobody drafted."""
    there = next((row.draft for row in rows if row.draft is not None), None)
    if there is None:
        return None
    every = [row.draft if row.draft is not None else _none(there) for row in rows]
    width = max(draft.tokens.shape[1] for draft in every)
    logits = [draft.logits for draft in every if draft.logits is not None]
    return Draft(
        context,
        torch.cat([draft.block_size for draft in every]),
        torch.cat([draft.draft_length for draft in every]),
        torch.cat([_padded(draft.tokens, width) for draft in every]),
        torch.cat([_padded(scores, width) for scores in logits]) if len(logits) == len(every) else None,
        {name: torch.cat([_padded(draft.features[name], width) for draft in every]) for name in there.features},
    )


def cut(turn: Turn, length: int) -> Turn:
    """A turn whose draft has no more than so many tokens.

    A block of a block-diffusion drafter is then a smaller one, as `select` may ask for in another row. Others propose
    fewer tokens than the block has room for.
    """
    if turn.draft is None or turn.draft.tokens.shape[1] <= length:
        return turn
    draft = turn.draft.first(length)
    if draft.context.spec.work.passes == "one":
        draft = dataclasses.replace(draft, block_size=draft.draft_length + 1)
    return dataclasses.replace(turn, draft=draft)


def steps(rows: Sequence[Step], seconds: Seconds) -> Step:
    """One step of several that took so long together."""
    width = max(row.tokens.shape[1] for row in rows)

    def joined(get: Callable[[Step], Tensor]) -> Tensor:
        return torch.cat([get(row) for row in rows])

    return Step(
        joined(lambda row: row.block_size),
        joined(lambda row: row.draft_length),
        joined(lambda row: row.verify_length),
        joined(lambda row: row.num_accepted),
        torch.cat([_padded(row.tokens, width) for row in rows]),
        joined(lambda row: row.position),
        seconds,
    )


def share(seconds: Seconds, parts: int) -> Seconds:
    """An equal part."""
    return Seconds(*(getattr(seconds, entry.name) / parts for entry in dataclasses.fields(seconds)))


def total(rows: Sequence[Step]) -> Seconds:
    """The time of all."""
    whole = Seconds()
    for row in rows:
        whole += row.seconds
    return whole


def copied_state(state: State) -> State:
    """With tensors of its own."""
    return {name: value.clone() for name, value in state.items()}


def rows_of(state: State, places: Sequence[int]) -> State:
    """Some rows of a state, in this order, as an engine takes them."""
    return {name: value[list(places)].clone() for name, value in state.items()}


def joined_states(one: State, other: State) -> State:
    """Rows of both; of names that only one of them has nothing is kept."""
    return {name: torch.cat([value, other[name]]) for name, value in one.items() if name in other}


def bad_state(state: object, rows: int) -> str | None:
    """What keeps a state from being moved row by row."""
    if not isinstance(state, dict):
        return f"the state is {kind_of(state)}, not a dict of tensors"
    for name, value in state.items():
        if not isinstance(value, Tensor):
            return f"state[{name!r}] is {kind_of(value)}, not a tensor: the runtime cannot move rows of it"
        if value.ndim == 0 or value.shape[0] != rows:
            return f"state[{name!r}] has shape {list(value.shape)} for {rows} requests: the batch axis comes first"
    return None


def _none(like: Draft) -> Draft:
    """A row that drafted nothing."""
    return Draft(
        like.context,
        torch.ones_like(like.block_size),
        torch.zeros_like(like.draft_length),
        like.tokens[:, :0],
        None if like.logits is None else like.logits[:, :0],
        {name: value[:, :0] for name, value in like.features.items()},
    )


def _padded(value: Tensor, width: int) -> Tensor:
    """[1, count, ...] -> [1, width, ...]."""
    missing = value.new_full((1, width - value.shape[1], *value.shape[2:]), FILL)
    return torch.cat([value, missing], dim=1)
