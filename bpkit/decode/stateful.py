"""Targets with recurrent states, which cannot drop tokens as a KV cache can: they go back to a copy of their states.

What a layer keeps for each token is cropped, which costs nothing; what it folds into states is copied before a pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from bpkit.decode.reread import Rereading
from bpkit.decode.target import CachedTarget, TargetOutput
from bpkit.decode.text import RunningText

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state")
"""Names under which the architectures of transformers take their cache and return it."""
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
        cache: a `Cache`, or what an architecture of its own kind has in its place: an object, a list or a dict.
    """

    def __init__(self, cache: Any) -> None:
        self.cropped: list[tuple[Any, Crop]] = []
        self.linear: list[LinearAttentionCacheLayerMixin] = []
        others: list[Any] = [cache]
        for layer in cache.layers if isinstance(cache, Cache) else ():
            crop, linear = crop_of(type(layer)), isinstance(layer, LinearAttentionCacheLayerMixin)
            # A layer that is both would record past convolution states with its past keys.
            if (crop is None and not linear) or (linear and getattr(layer, "is_sliding", False)):
                others.append(layer)
                continue
            if linear:
                self.linear.append(layer)
            if crop is not None:
                self.cropped.append((layer, crop))
        self.others = [other if isinstance(other, (list, dict)) else vars(other) for other in others]
        """What lies elsewhere: copied value by value."""
        self.states: list[Tensor] = []
        self.values: list[Any] = []

    def take(self) -> None:
        """Copy the states. Nothing is read from the device."""
        states = self._linear_states()
        if len(self.states) != len(states):
            self.states = [torch.empty_like(state) for state in states]
        if states:
            torch._foreach_copy_(self.states, states)
        self.values = [_copied(other) for other in self.others]

    def restore(self, count: int) -> None:
        """Put the copied states back and drop the `count` tokens that were read since."""
        if self.states:
            torch._foreach_copy_(self._linear_states(), self.states)
        for other, values in zip(self.others, self.values, strict=True):
            if isinstance(other, list):
                other[:] = _copied(values)
            else:
                other.update(_copied(values))
        self._crop(count)

    def keep(self) -> None:
        """Drop none: sliding layers forget what lies before their window."""
        self._crop(0)

    def _crop(self, count: int) -> None:
        for layer, crop in self.cropped:
            crop(layer, -count)

    def _linear_states(self) -> list[Tensor]:
        layers = ([*layer.conv_states.values(), *layer.recurrent_states.values()] for layer in self.linear)
        return [state for states in layers for state in states if state is not None]


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name of the argument that carries the model's cache; None if it takes none."""
    # A subclass may hand it through to its base among other keywords.
    forwards = [vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind)]
    known = [name for forward in forwards for name in inspect.signature(forward).parameters]
    return next((name for name in known if name in CACHE_ARGUMENTS), None)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache for snapshots: only its sliding windows record what they forget."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.activate_past_recording()
    return cache


class StatefulTarget(CachedTarget):
    """Takes the states back to before a pass where tokens of it were rejected.

    Which tokens are then read again, `bpkit.decode.reread` says. A pass over one token needs no copy of the states.
    """

    def __init__(self, model: PreTrainedModel, text: RunningText, **kept: Any) -> None:
        super().__init__(model, text, **kept)
        self.cache_argument = cache_argument(model) or CACHE_ARGUMENTS[0]
        self.rereading = Rereading()
        self.pending: Tensor | None = None
        self.last_pass: Tensor | None = None
        """Tokens of the last pass, int64 [1, length], pending ones included."""
        self.fresh = False
        """Whether the snapshot is of the states as they are now."""

    @property
    def reread(self) -> int:
        return self.rereading.reread

    @property
    def cache(self) -> Any:
        if self.pending is not None:
            self._commit(self.pending)
            self.pending, self.rereading.pending = None, 0
        return self.held

    def _new_cache(self) -> Any:
        """A DynamicCache, or None for architectures that make one of their own kind."""
        return new_cache(self.model) if self.model._supports_default_dynamic_cache() else None

    def prefill(self, **inputs: Any) -> TargetOutput:
        output = super().prefill(**inputs)
        self.snapshot = Snapshot(self.held)
        self.snapshot.keep()
        return output

    def verify(self, drafted: Tensor) -> TargetOutput:
        tokens, pending = torch.cat([self.text.anchor, drafted], dim=1), self.pending
        count = tokens.shape[1]
        if self.rereading.verify(count) and pending is not None:
            self._commit(pending)
            pending = None
        fed = tokens if pending is None else torch.cat([pending, tokens], dim=1)
        if count > 1 and not self.fresh:
            self.snapshot.take()
        self.last_pass, self.pending, self.fresh = fed, None, False
        return self._forward(fed, logits_to_keep=count)

    def rollback(self, count: Sequence[int]) -> None:
        (last,) = count
        self.rereading.reject(last)
        if last == 0 or self.last_pass is None:
            self.snapshot.keep()
            return
        self.snapshot.restore(self.last_pass.shape[1])
        self.length -= self.last_pass.shape[1]
        self.pending, self.fresh = self.last_pass[:, :-last], True

    def _commit(self, pending: Tensor) -> None:
        self._pass(pending, 1, [])
        self.snapshot.keep()
        self.fresh = False

    def _forward(self, tokens: Tensor, *, logits_to_keep: int, **inputs: Any) -> TargetOutput:
        output = super()._forward(tokens, logits_to_keep=logits_to_keep, **inputs)
        positions = tokens.shape[1] if self.last_pass is None else logits_to_keep
        return TargetOutput(
            # Some architectures have no `logits_to_keep`.
            output.logits[:, -logits_to_keep:],
            None if output.features is None else output.features[:, -positions:],
            None if output.last_hidden is None else output.last_hidden[:, -positions:],
        )

    def _pass(self, tokens: Tensor, logits_to_keep: int, hidden_states: list[int], **inputs: Any) -> Any:
        output = super()._pass(tokens, logits_to_keep, hidden_states, **inputs)
        self.held = output[self.cache_argument] if self.held is None else self.held
        return output
