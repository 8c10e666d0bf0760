"""Random rows of the shipped pair: what any policy may be asked, made without models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bpkit.policy import State
from bpkit.types import OF_THE_DRAFT, OF_THE_SOURCES, Context, DecoderSpec, Draft, Feature, Seconds, Step

SHIPPED = DecoderSpec("shipped target", "shipped drafter", "block-diffusion", 16, 32, hidden_size=256, vocab_size=4096)
_WIDTH = {
    Feature.PREFILL_HIDDEN: 256,
    Feature.PREFILL_LOGITS: 4096,
    Feature.LAST_HIDDEN: 256,
    Feature.TARGET_FEATURES: 768,
    Feature.ANCHOR_EMBEDDING: 256,
    Feature.DRAFT_HIDDEN: 256,
}


def random_context(rows: int, wants: Iterable[Feature], random: torch.Generator) -> Context:
    """Rows at unlike positions, with the wanted features that are known before a draft."""
    made = Context(
        SHIPPED,
        position=torch.randint(1, 200, (rows,), generator=random),
        remaining=torch.randint(1, 200, (rows,), generator=random),
        context_length=torch.randint(5, 700, (rows,), generator=random),
        generator=torch.Generator().manual_seed(0),
    )
    made.features = {name: _values(name, (rows,), random) for name in wants if name not in OF_THE_DRAFT}
    return made


def random_draft(
    context: Context,
    block_size: Tensor,
    drafted: Sequence[int],
    wants: Iterable[Feature],
    random: torch.Generator,
    padding_is_nan: bool = True,
) -> Draft:
    """Drafts of these lengths. Beyond them tokens are -1, and other features NaN or those of a drafter that is sure."""
    length, width = torch.tensor(drafted), max(drafted)
    padding = torch.arange(width) >= length[:, None]
    features = {}
    for name in sorted(set(wants) & OF_THE_DRAFT):
        value = _values(name, (len(drafted), width), random)
        sure = 1.0 if name == Feature.DRAFT_PROBABILITY else 0.0
        value[padding] = -1 if name == Feature.DRAFT_TOKENS else torch.nan if padding_is_nan else sure
        features[name] = value
    tokens = torch.zeros(len(drafted), width, dtype=torch.long).masked_fill(padding, -1)
    return Draft(context, block_size, length, tokens, features=features)


def random_step(draft: Draft, verify_length: Tensor, seconds: float, random: torch.Generator) -> Step:
    """A step in which each row accepts some of what it verified. Beyond what it yields tokens are -1."""
    share = torch.rand(len(verify_length), generator=random)
    accepted = ((verify_length + 1) * share).long()
    tokens = torch.zeros(len(accepted), int(accepted.max()) + 1, dtype=torch.long)
    tokens[torch.arange(tokens.shape[1]) > accepted[:, None]] = -1
    position = draft.context.position
    return Step(draft.block_size, draft.draft_length, verify_length, accepted, tokens, position, Seconds(rest=seconds))


def _values(name: Feature, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    if name == Feature.DRAFT_TOKENS:
        return torch.randint(SHIPPED.vocab_size, shape, generator=random)
    if name in _WIDTH:
        return torch.randn(*shape, _WIDTH[name], generator=random)
    if name in OF_THE_SOURCES - {Feature.SOURCE_SHARE, Feature.SOURCE_SUCCESS}:
        return torch.randint(32, (*shape, 1), generator=random)
    value = torch.rand((*shape, 1) if name in OF_THE_SOURCES else shape, generator=random)
    if name == Feature.DRAFT_PROBABILITY:
        return value**0.1
    return value.log() if name == Feature.ANCHOR_LOG_PROBABILITY else value


def state_of(state: State, rows: list[int]) -> State:
    """Some rows of a state, in this order."""
    return {name: value[rows] for name, value in state.items()}


def row_of(given: Any, row: int, generator: torch.Generator | None = None) -> Any:
    """A context, draft or step of one row alone, without padding."""
    changed: dict[str, Any] = {}
    for field in fields(given):
        value = getattr(given, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value[row : row + 1]
    if isinstance(given, Context):
        changed |= {"features": {name: value[row : row + 1] for name, value in given.features.items()}, "running": 0}
        changed["generator"] = torch.Generator().manual_seed(0)
    if isinstance(given, Draft):
        length = int(given.draft_length[row])
        changed["features"] = {name: value[row : row + 1, :length] for name, value in given.features.items()}
        changed |= {"tokens": changed["tokens"][:, :length], "context": row_of(given.context, row)}
    if isinstance(given, Step):
        changed["tokens"] = changed["tokens"][:, : int(given.num_accepted[row]) + 1]
        changed["seconds"] = Seconds(rest=given.seconds.rest / len(given.num_accepted))
    return replace(given, **changed)
