"""The target model: prefill, verify, and rollback of what was rejected."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bpkit.decode.inputs import ModelInputs
from bpkit.decode.pretrained import position_limit
from bpkit.decode.text import RunningText
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

    def features_of(self, count: int) -> Tensor | None:
        """Features of the first `count` positions, those that stand."""
        return None if self.features is None else self.features[:, :count]

    def last(self) -> TargetOutput:
        """Only the last position."""
        return TargetOutput(
            self.logits[:, -1:],
            None if self.features is None else self.features[:, -1:],
            None if self.last_hidden is None else self.last_hidden[:, -1:],
            None if self.known is None else {name: value[:, -1:] for name, value in self.known.items()},
        )


class TargetSession(Protocol):
    """A target that reads one running text: live, or out of a trace."""

    @property
    def positions(self) -> int | None:
        """How many tokens it can read; None if there is no such limit."""
        ...

    @property
    def reread(self) -> int:
        """Tokens that the last pass read once more; see `bpkit.decode.reread`."""
        ...

    @property
    def cache(self) -> Any:
        """What it keeps of the text, all decided tokens but the anchor, as the model takes it; None without a model."""
        ...

    def prefill(self, **inputs: Any) -> TargetOutput:
        """Read the prompt, whose logits after the last token decide the first.

        Args:
            inputs: what the model takes beside the prompt, such as images.
        """
        ...

    def verify(self, drafted: Tensor) -> TargetOutput:
        """Score the anchor and drafted tokens, int64 [rows, width], all of which are kept until `rollback`."""
        ...

    def rollback(self, count: Sequence[int]) -> None:
        """Drop the last tokens that were read, so many of each row."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding of tokens, [..., hidden]."""
        ...


class CachedTarget:
    """A target session whose KV cache is cropped where tokens are rejected.

    Args:
        feature_layers: layer *i* means `hidden_states[i + 1]`.
        keep_hidden: also return final-norm hidden states.
    """

    wrapper: Any = None
    """What passes run through, such as the compiled model, where that is not the model itself."""
    inputs: ModelInputs | None = None
    """What passes after prefill take beside tokens; None if nothing."""
    cache_argument = "past_key_values"
    """The argument that carries the model's cache."""

    def __init__(
        self, model: PreTrainedModel, text: RunningText, *, feature_layers: tuple[int, ...], keep_hidden: bool
    ) -> None:
        self.model, self.text = model, text
        self.feature_indices = [i + 1 for i in feature_layers]
        self.last_index = model.config.get_text_config().num_hidden_layers if keep_hidden else None
        self.held = self._new_cache()
        self.length = 0
        """Tokens in the cache."""
        self.positions = position_limit(model)
        self.counts_positions = counts_positions(model)

    @property
    def reread(self) -> int:
        return 0

    @property
    def cache(self) -> Any:
        return self.held

    def _new_cache(self) -> Any:
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        cache.activate_past_recording()
        return cache

    def prefill(self, **inputs: Any) -> TargetOutput:
        output = self._forward(self.text.prompt, logits_to_keep=1, **inputs)
        # Some architectures have no `logits_to_keep`.
        return replace(output, logits=output.logits[:, -1:])

    def verify(self, drafted: Tensor) -> TargetOutput:
        return self._forward(torch.cat([self.text.anchor, drafted], dim=1), logits_to_keep=0)

    def rollback(self, count: Sequence[int]) -> None:
        (last,) = count
        self.held.crop(-last)
        self.length -= last

    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    def _forward(self, tokens: Tensor, *, logits_to_keep: int, **inputs: Any) -> TargetOutput:
        """All that the loop needs of a pass, on the device of the tokens: layers may lie on several."""
        output, device = self._pass(tokens, logits_to_keep, self._wanted, **inputs), tokens.device
        states = [self._hidden(output, i).to(device) for i in self.feature_indices]
        return TargetOutput(
            logits=output.logits.to(device),
            features=torch.cat(states, dim=-1) if states else None,
            last_hidden=None if self.last_index is None else self._hidden(output, self.last_index).to(device),
        )

    def _hidden(self, output: Any, index: int) -> Tensor:
        """Hidden states [1, positions, hidden]; some architectures have several streams of them, or fewer layers."""
        states = output.hidden_states[index] if index < len(output.hidden_states or ()) else None
        size = self.model.config.get_text_config().hidden_size
        if states is None or states.dim() != 3 or states.shape[-1] != size:
            found = "none" if states is None else f"{list(states.shape)}"
            raise ValueError(
                f"{type(self.model).__name__} gives no hidden states [1, positions, {size}] at index {index} (found: "
                f"{found}): use a drafter and a policy that read no hidden states of the target"
            )
        return cast("Tensor", states)

    @property
    def _wanted(self) -> list[int]:
        return self.feature_indices + ([] if self.last_index is None else [self.last_index])

    def _pass(self, tokens: Tensor, logits_to_keep: int, hidden_states: list[int], **inputs: Any) -> Any:
        """Run the model over tokens."""
        count = tokens.shape[1]
        if self.inputs is not None and self.length > 0:
            inputs.update(self.inputs.at(self.length, count))
        if self.counts_positions and "position_ids" not in inputs:
            inputs["position_ids"] = torch.arange(self.length, self.length + count, device=tokens.device)[None]
        self.length += count
        return (self.model if self.wrapper is None else self.wrapper)(
            input_ids=tokens,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            output_hidden_states=hidden_states or False,
            **{self.cache_argument: self.held},
            **inputs,
        )


def counts_positions(model: PreTrainedModel) -> bool:
    """Whether a model wants to be told the positions of its tokens, as `generate` does.

    Some count from 0 in every pass otherwise (Bamba). Models of more than text have positions of their own.
    """
    if model.config.get_text_config(decoder=True) is not model.config:
        return False
    return "position_ids" in inspect.signature(type(model).forward).parameters
