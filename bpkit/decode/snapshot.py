"""The states of a target's cache at one token, to go back to where later tokens were rejected.

What a layer keeps for each token is cropped, which costs nothing; what it folds into states is copied before a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

Crop = Callable[[Any, int], None]
_copied = partial(tree_map_only, Tensor, torch.clone)
"""The same with copies of all tensors in dicts, lists and tuples."""


def crop_of(kind: type) -> Crop | None:
    """How layers of a class drop tokens from what they keep for each token; None if nothing does it wholly.

    The inherited `crop` of a class that keeps more than its base does (DeepSeek-V4's compressors) would leave the rest.
    Linear attention is left out: its own `crop` does not mend recurrent states.
    """
    for base in kind.__mro__:
        if issubclass(base, LinearAttentionCacheLayerMixin):
            continue
        if "crop" in vars(base):
            crop: Crop = vars(base)["crop"]
            return crop
        if "update" in vars(base) or "__init__" in vars(base):
            return None
    return None


class Snapshot:
    """Goes back over the tokens that a cache read since `take`.

    Args:
        cache: a `Cache`, or what an architecture of its own kind has in its place: an object, a list or a tuple.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.cropped: list[tuple[Any, Crop]] = []
        self.linear: list[LinearAttentionCacheLayerMixin] = []
        self.others: list[Any] = [cache]
        """Held by none of the above: copied attribute by attribute."""
        for layer in cache.layers if isinstance(cache, Cache) else ():
            crop, linear = crop_of(type(layer)), isinstance(layer, LinearAttentionCacheLayerMixin)
            # A layer that is both would record past convolution states with its past keys.
            if (crop is None and not linear) or (linear and getattr(layer, "is_sliding", False)):
                self.others.append(layer)
                continue
            if linear:
                self.linear.append(layer)
            if crop is not None:
                self.cropped.append((layer, crop))
        self.states: list[Tensor] = []
        self.values: list[Any] = []

    def take(self) -> None:
        """Copy the states. Nothing is read from the device."""
        states = list(self._linear_states())
        if len(self.states) != len(states):
            self.states = [torch.empty_like(state) for state in states]
        if states:
            torch._foreach_copy_(self.states, states)
        self.values = [_copied(_held(other)) for other in self.others]

    def restore(self, count: int) -> None:
        """Put the copied states back and drop the `count` tokens that were read since."""
        if self.states:
            torch._foreach_copy_(list(self._linear_states()), self.states)
        for other, values in zip(self.others, self.values, strict=True):
            _put_back(other, _copied(values))
        self._crop(count)

    def keep(self) -> None:
        """Drop none: sliding layers forget what lies before their window."""
        self._crop(0)

    def _crop(self, count: int) -> None:
        for layer, crop in self.cropped:
            crop(layer, -count)

    def _linear_states(self) -> Iterator[Tensor]:
        for layer in self.linear:
            for state in (*layer.conv_states.values(), *layer.recurrent_states.values()):
                if state is not None:
                    yield state


def _held(other: Any) -> Any:
    """What to copy of an object; the layers of a cache are looked after one by one."""
    if isinstance(other, (list, dict)):
        return other
    return {name: value for name, value in vars(other).items() if name != "layers"}


def _put_back(other: Any, values: Any) -> None:
    if isinstance(other, list):
        other[:] = values
    elif isinstance(other, dict):
        other.update(values)
    else:
        vars(other).update(values)
