"""The target model: prefill, verify, and rollback of what was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bpkit.types import Feature


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What one target pass gives.

    Attributes:
        logits: [1, positions, vocab]; prefill gives the last position only.
        features: hidden states of the drafter's layers, concatenated, [1, positions, layers * hidden], or None.
        last_hidden: final-norm hidden states, [1, positions, hidden], or None if no policy wants them.
        known: what policies may see of each position, [1, positions, ...], where that need not be computed (in replay).
    """

    logits: Tensor
    features: Tensor | None
    last_hidden: Tensor | None
    known: Mapping[Feature, Tensor] | None = None

    def first(self, count: int) -> TargetOutput:
        """Only the first `count` positions, those that stand."""
        return TargetOutput(
            self.logits[:, :count],
            None if self.features is None else self.features[:, :count],
            None if self.last_hidden is None else self.last_hidden[:, :count],
            None if self.known is None else {name: value[:, :count] for name, value in self.known.items()},
        )


class TargetSession:
    """One request's view of the target: its KV cache holds the decided tokens without the anchor.

    Args:
        feature_layers: layer *i* means `hidden_states[i + 1]`.
        keep_hidden: also return final-norm hidden states.
    """

    def __init__(self, model: PreTrainedModel, *, feature_layers: tuple[int, ...], keep_hidden: bool) -> None:
        self.model = model
        self.feature_indices = [i + 1 for i in feature_layers]
        self.last_index = model.config.get_text_config().num_hidden_layers if keep_hidden else None
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.cache.activate_past_recording()

    def prefill(self, prompt: Tensor) -> TargetOutput:
        """Read the prompt, int64 [1, length], whose logits after the last token decide the first."""
        return self._forward(prompt, logits_to_keep=1)

    def verify(self, tokens: Tensor) -> TargetOutput:
        """Score anchor and drafted tokens, int64 [1, width + 1], all of which enter the cache."""
        return self._forward(tokens, logits_to_keep=0)

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens from the cache."""
        self.cache.crop(-count)

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding of tokens, [..., hidden]."""
        embedded: Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    def _forward(self, tokens: Tensor, *, logits_to_keep: int) -> TargetOutput:
        wanted = self.feature_indices + ([] if self.last_index is None else [self.last_index])
        output = self.model(
            input_ids=tokens,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            output_hidden_states=wanted or False,
        )
        states = output.hidden_states
        return TargetOutput(
            logits=output.logits,
            features=torch.cat([states[i] for i in self.feature_indices], dim=-1) if self.feature_indices else None,
            last_hidden=None if self.last_index is None else states[self.last_index],
        )
