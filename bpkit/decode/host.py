"""From the device to the host. Each call is a point at which the host waits for the device, so there are few of them.

What a step needs on the host is counts, tokens and numbers that belong to single tokens: a few hundred bytes. They are
packed on the device and copied together. Nothing else in bpkit's decoding may read a tensor of the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.types import ON_THE_HOST, Feature


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors on the host, by one copy for all that lie on a device; others are returned as they are."""
    if all(tensor.is_cpu for tensor in tensors):
        return list(tensors)
    away = [place for place, tensor in enumerate(tensors) if not tensor.is_cpu]
    copies = dict(zip(away, _one_copy([tensors[place] for place in away]), strict=True))
    return [copies.get(place, tensor) for place, tensor in enumerate(tensors)]


Features = dict[Feature, Tensor]
Predictions = dict[str, Tensor]


def to_host_with(
    tensors: Sequence[Tensor], features: Features, predictions: Predictions | None
) -> tuple[list[Tensor], Features, Predictions | None]:
    """`tensors`, and in the same copy what policies get on the host: features of single tokens, and predictions."""
    if not features:
        return to_host(tensors), features, predictions
    numbers = [name for name in features if name in ON_THE_HOST]
    made = predictions or {}
    read = to_host([*tensors, *(features[name] for name in numbers), *made.values()])
    first, second = len(tensors), len(tensors) + len(numbers)
    features = {**features, **dict(zip(numbers, read[first:second], strict=True))}
    return read[:first], features, None if predictions is None else dict(zip(made, read[second:], strict=True))


def _one_copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    if len(tensors) == 1:
        return [tensors[0].cpu()]
    # The widest types first, so that each part begins at a multiple of its own width.
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
    first = tensors[0].device
    parts = [tensors[place].to(first).contiguous().view(-1).view(torch.uint8) for place in order]
    packed, start = torch.cat(parts).cpu(), 0
    copies: dict[int, Tensor] = {}
    for place, part in zip(order, parts, strict=True):
        like, end = tensors[place], start + part.shape[0]
        copies[place] = packed[start:end].view(like.dtype).view(like.shape)
        start = end
    return [copies[place] for place in range(len(tensors))]
