"""What a policy is handed, as data: copies of it, what differs from them, some of its rows."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bpkit.decode.guard import PolicyFault, decision, kept_tokens, shapes_of
from bpkit.decode.trees import closed
from bpkit.types import Context, Draft, Feature, Plan, Step

Given = Context | Draft | Step
"""What methods of a policy are handed, beside the state."""
G = TypeVar("G", bound=Given)
DECIDES = ("select", "extend", "truncate")
Decided = list[int] | list[tuple[int, int]] | list[tuple[int, ...]]
"""Of each row the number; where a Plan was returned, block size and source; of trees the nodes that a mask keeps."""


class NotedFeatures(UserDict[Feature, Tensor]):
    """Features that note which are `read`, and which names were asked for and are `missed`."""

    def __init__(self, features: Mapping[Feature, Tensor], read: set[str], missed: set[str]) -> None:
        super().__init__(_unnoted(features))
        self.read, self.missed = read, missed

    def __getitem__(self, name: Feature) -> Tensor:
        (self.read if name in self.data else self.missed).add(str(name))
        return self.data[name]

    get = Mapping.get  # which asks for the item, there or not


def changed(given: G, change: Callable[[Tensor], Tensor]) -> G:
    """The record with every tensor of it changed, and plain features."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Mapping):
            named = _unnoted(value).items()
            return {name: change(held) if isinstance(held, Tensor) else held for name, held in named}
        return changed(value, change) if isinstance(value, Context) else value

    return dataclasses.replace(given, **{e.name: of(getattr(given, e.name)) for e in dataclasses.fields(given)})


def copied(given: G) -> G:
    """A copy with tensors of its own."""
    return changed(given, Tensor.clone)


def some_rows(given: Context | Draft, places: Sequence[int], random: Tensor) -> Context | Draft:
    """What is asked about some rows, in this order, without padding that they do not need.

    What `predict` made of the features beside other rows is left out, so that it is asked anew.

    Args:
        random: state of the generator that they get for their own.
    """

    def taken(value: Tensor) -> Tensor:
        return value[list(places)]

    context = changed(given if isinstance(given, Context) else given.context, taken)
    context.row_ids = tuple(context.row_ids[place] for place in places)
    context.generator, context.predictions = torch.Generator(), None
    context.generator.set_state(random)
    if isinstance(given, Context):
        return context
    draft = dataclasses.replace(changed(given, taken), context=context, predictions=None)
    return draft.first(int(draft.draft_length.max()))


def filled(draft: Draft) -> Draft:
    """With ones in the padding: probabilities that tempt a policy to trust positions that are not there."""
    behind = torch.arange(draft.tokens.shape[1]) >= draft.draft_length[:, None]

    def fill(values: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        return {
            name: value.masked_fill(behind.view(*behind.shape, *[1] * (value.ndim - 2)), 1)
            for name, value in values.items()
        }

    predictions = None if draft.predictions is None else fill(draft.predictions)
    return dataclasses.replace(draft, features=fill(draft.features), predictions=predictions)


def numbers(method: str, answer: Any, given: Given) -> Decided:
    """What was decided of each row. Raises PolicyFault, as the runtime does."""
    assert not isinstance(given, Step)
    if isinstance(given, Draft):
        masked = method == "truncate" and isinstance(answer, Tensor) and answer.ndim == 2
        return _kept(answer, given) if masked else decision(method, answer, given.draft_length.tolist())
    spec, rows = given.spec, given.batch_size
    if not isinstance(answer, Plan):
        return decision(method, answer, [spec.max_block_size] * rows)
    sources = decision("source", answer.source, [len(spec.sources)] * rows)
    sizes = decision(method, answer.block_size, [spec.sources[source].max_block_size for source in sources])
    shapes_of(answer, sizes, [spec.sources[source] for source in sources])
    return list(zip(sizes, sources, strict=True))


def _kept(mask: Tensor, draft: Draft) -> Decided:
    """What a mask keeps of each row: of chains how many of the first tokens, of trees their nodes."""
    lengths, trees = draft.draft_length.tolist(), draft.parents is not None
    parents = draft.parents.tolist() if draft.parents is not None else [range(-1, length - 1) for length in lengths]
    asked = kept_tokens(mask, lengths, draft.tokens.shape[1])
    kept = [closed(*row) for row in zip(asked, parents, strict=True)]
    if any(sum(row) > len(nodes) for row, nodes in zip(asked, kept, strict=True)):
        raise PolicyFault("it keeps tokens without those before them on their paths")
    return [tuple(nodes) for nodes in kept] if trees else [len(nodes) for nodes in kept]


def row_ids(given: Given) -> tuple[int, ...]:
    """Of the rows, in their order."""
    return given.context.row_ids if isinstance(given, Draft) else given.row_ids


def random_of(given: Given) -> Tensor:
    """The state of the policy's random numbers; of a step nothing."""
    if isinstance(given, Step):
        return torch.empty(0)
    return (given.context if isinstance(given, Draft) else given).generator.get_state()


def differences(before: Given, now: Given) -> list[tuple[str, str, str]]:
    """What differs, by the name that an author writes, with both values as text."""
    prefix = type(now).__name__.lower()
    was, is_now, missing = dict(_named(before, prefix)), dict(_named(now, prefix)), object()
    return [
        (name, shown(was.get(name, "nothing")), shown(is_now.get(name, "nothing")))
        for name in was | is_now
        if not same(was.get(name, missing), is_now.get(name, missing))
    ]


def same(one: Any, other: Any) -> bool:
    """Equal values; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other))


def shown(value: Any, most: int = 60) -> str:
    """A value as it stands in messages."""
    text = str(value.tolist() if isinstance(value, Tensor) else value)
    return text if len(text) <= most or not isinstance(value, Tensor) else f"{text[: most - 3]}..."


def _named(given: Given, prefix: str) -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(given):
        value, name = getattr(given, entry.name), f"{prefix}.{entry.name}"
        if isinstance(value, Context):
            yield from _named(value, name)
        elif entry.name == "features":
            yield from ((f"{prefix}[{str(feature)!r}]", tensor) for feature, tensor in _unnoted(value).items())
        elif entry.name == "predictions":
            yield from ((f"{name}[{own!r}]", tensor) for own, tensor in (value or {}).items())
        else:
            yield name, value


def _unnoted(features: Mapping[Any, Tensor]) -> Mapping[Any, Tensor]:
    """The features, without a note that they were read."""
    return features.data if isinstance(features, NotedFeatures) else features
