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
    """One row of a target that is taken back to the states before a pass where tokens of it were rejected.

    Which tokens are then read again, `bpkit.decode.reread` says. The states are copied before the first pass after a
    rollback that may be taken back: one over several tokens, or one that follows another without a rollback between. A
    single token after a rollback is the anchor, which stands, with all before it.
    """

    stateful = True

    def __init__(self, model: PreTrainedModel, **wanted: Any) -> None:
        super().__init__(model, **wanted)
        self.cache_argument = cache_argument(model) or CACHE_ARGUMENTS[0]
        self.rereading = Rereading()
        self.snapshot: Snapshot | None = None
        self.pending: Tensor | None = None
        """Accepted tokens that the states do not hold, int64 [1, length]."""
        self.since: Tensor | None = None
        """Tokens that were read since the states were copied, int64 [1, length]; None if the copy is no longer used."""
        self.passes = 0
        """Since the last rollback."""

    @property
    def held(self) -> int:
        return self.length + self._pending_length

    @property
    def _pending_length(self) -> int:
        return 0 if self.pending is None else self.pending.shape[1]

    @property
    def reread(self) -> int:
        return self.rereading.reread

    @property
    def cache(self) -> Any:
        if self.pending is not None:
            self._commit(self.pending)
            self.pending, self.rereading.pending = None, 0
        return self.past

    def _new_cache(self) -> Any:
        """A DynamicCache, or None for architectures that make one of their own kind."""
        return new_cache(self.model) if self.model._supports_default_dynamic_cache() else None

    def prefill(self, tokens: Tensor, **inputs: Any) -> TargetOutput:
        output = super().prefill(tokens, **inputs)
        self.snapshot = self.snapshot or Snapshot(self.past)
        self.snapshot.keep()
        return output

    def verify(self, tokens: Tensor) -> TargetOutput:
        pending, count = self.pending, tokens.shape[1]
        if self.rereading.verify(count) and pending is not None:
            self._commit(pending)
            pending = None
        fed = tokens if pending is None else torch.cat([pending, tokens], dim=1)
        if self.snapshot is None or (count == 1 and self.passes == 0):
            self.since = None  # all of it stands
        else:
            if self.since is None:
                self.snapshot.take()
            self.since = fed if self.since is None else torch.cat([self.since, fed], dim=1)
        self.pending, self.passes = None, self.passes + 1
        output = self._output(self._pass(fed, count, self._wanted), tokens.device)
        self.snapshot = self.snapshot or Snapshot(self.past)
        return TargetOutput(
            # Some architectures have no `logits_to_keep`.
            output.logits[:, -count:],
            None if output.features is None else output.features[:, -count:],
            None if output.last_hidden is None else output.last_hidden[:, -count:],
        )

    def rollback(self, count: int) -> None:
        """Drop the last tokens of the passes since the last rollback."""
        if self.passes == 0 and count == 0:
            return  # nothing was read
        read, snapshot, self.passes = self.since, self.snapshot, 0
        if count == 0 and snapshot is not None:
            self.since = None
            snapshot.keep()
            return
        if snapshot is None or read is None or count > read.shape[1]:
            raise ValueError(f"{count} tokens cannot be dropped: no states were kept from before them")
        snapshot.restore(read.shape[1])
        self.length -= read.shape[1]
        self.rereading.fed = read.shape[1]
        self.rereading.reject(count)
        self.pending = read[:, :-count] if count < read.shape[1] else None
        self.since = read[:, :0]  # the states are those that were copied

    def _commit(self, pending: Tensor) -> None:
        self._pass(pending, 1, [])
        if self.snapshot is not None:
            self.snapshot.keep()
        self.since = None

    def _pass(self, tokens: Tensor, logits_to_keep: int, states: Sequence[int], **inputs: Any) -> Any:
        output = super()._pass(tokens, logits_to_keep, states, **inputs)
        self.past = output[self.cache_argument] if self.past is None else self.past
        return output
