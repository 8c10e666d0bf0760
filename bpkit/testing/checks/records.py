"""What a policy is handed, as data: copies of it, what differs from them, one record for several requests."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bpkit.types import Context, Draft, Feature, Step

Given = Context | Draft | Step
"""What methods of a policy are handed, beside the state."""
G = TypeVar("G", bound=Given)
Asked = TypeVar("Asked", bound=Context | Draft)
DECIDES = ("select", "extend", "truncate")
FILL = 1
"""What stands in the padding of a batch: a probability that tempts a policy to trust positions that are not there."""


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
            return {name: change(tensor) for name, tensor in _unnoted(value).items()}
        return changed(value, change) if isinstance(value, Context) else value

    return dataclasses.replace(given, **{e.name: of(getattr(given, e.name)) for e in dataclasses.fields(given)})


def copied(given: G) -> G:
    """A copy with tensors of its own."""
    return changed(given, Tensor.clone)


def joined(given: Sequence[G]) -> G:
    """Records of one request each as one of all, padded to the widest."""

    def of(values: Sequence[Any]) -> Any:
        first = values[0]
        if any(value is None for value in values):
            return None
        if isinstance(first, Tensor):
            each = [value[0] for value in values]
            return pad_sequence(each, True, FILL) if first.ndim > 1 else torch.stack(each)
        if isinstance(first, Mapping):
            return {name: of([value[name] for value in values]) for name in first}
        return joined(values) if isinstance(first, Context) else first

    fields = dataclasses.fields(given[0])
    return dataclasses.replace(given[0], **{e.name: of([getattr(one, e.name) for one in given]) for e in fields})


def asked_anew(given: Asked, seed: int) -> Asked:
    """With a generator of its own, and without what `predict` made of the features."""
    if isinstance(given, Draft):
        return dataclasses.replace(given, context=asked_anew(given.context, seed), predictions=None)
    return dataclasses.replace(given, generator=torch.Generator().manual_seed(seed), predictions=None)


def most_of(given: Context | Draft, largest: int) -> list[int]:
    """What may be decided about each row at most: the largest block size, or all that was drafted."""
    return [largest] * given.batch_size if isinstance(given, Context) else given.draft_length.tolist()


def generator_of(given: Context | Draft) -> torch.Generator:
    """The policy's random numbers."""
    return given.generator if isinstance(given, Context) else given.context.generator


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
