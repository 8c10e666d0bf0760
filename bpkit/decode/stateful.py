"""A session of a target with recurrent states, which cannot drop tokens as a KV cache can."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from bpkit.decode.reread import Rereading
from bpkit.decode.snapshot import Snapshot
from bpkit.decode.target import CachedTarget, TargetOutput
from bpkit.decode.text import RunningText

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state")
"""Names under which the architectures of transformers take their cache and return it."""


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

    The accepted tokens of that pass are then pending and go before the tokens of the next one; see
    `bpkit.decode.reread`. A pass over one token, which always stands, needs no copy of the states.
    """

    def __init__(
        self, model: PreTrainedModel, text: RunningText, *, feature_layers: tuple[int, ...], keep_hidden: bool
    ) -> None:
        super().__init__(model, text, feature_layers=feature_layers, keep_hidden=keep_hidden)
        self.argument = cache_argument(model) or CACHE_ARGUMENTS[0]
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
        if not self.model._supports_default_dynamic_cache():
            return None
        return new_cache(self.model)

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
        output = self._call(
            input_ids=tokens,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            output_hidden_states=hidden_states or False,
            **{self.argument: self.held},
            **inputs,
        )
        self.held = output[self.argument] if self.held is None else self.held
        return output
