"""The target model: prefill, verify, and rollback of what was rejected."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bpkit.decode.inputs import ModelInputs
from bpkit.decode.pretrained import hidden_states_at, position_limit
from bpkit.decode.text import to_device
from bpkit.types import Feature


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What one target pass gives.

    Attributes:
        logits: [rows, positions, vocab]; prefill gives one position only.
        features: hidden states of the drafter's layers, concatenated, [rows, positions, layers * hidden], or None.
        last_hidden: final-norm hidden states, [rows, positions, hidden], or None if no policy wants them.
        known: what policies may see of each position of the text, [rows, positions, ...], where that need not be
            computed (in replay).
    """

    logits: Tensor
    features: Tensor | None
    last_hidden: Tensor | None
    known: Mapping[Feature, Tensor] | None = None

    def features_of(self, counts: Sequence[int]) -> list[Tensor] | None:
        """Features of the first positions of each row, those that stand: of each [count, layers * hidden]."""
        if self.features is None:
            return None
        return [self.features[row, :count] for row, count in enumerate(counts)]

    def features_at(self, columns: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """The same of any positions of each row."""
        if self.features is None:
            return None
        return [self.features[row, to_device(own, self.features.device)] for row, own in enumerate(columns)]

    def last(self) -> TargetOutput:
        """Only the last position."""
        return TargetOutput(
            self.logits[:, -1:],
            None if self.features is None else self.features[:, -1:],
            None if self.last_hidden is None else self.last_hidden[:, -1:],
            None if self.known is None else {name: value[:, -1:] for name, value in self.known.items()},
        )


class TargetSession(Protocol):
    """A target that reads the texts of some rows, in their order: live, or out of a trace."""

    @property
    def held(self) -> list[int]:
        """Tokens that the memory of each row holds."""
        ...

    @property
    def positions(self) -> int | None:
        """How many tokens it can read; None if there is no such limit."""
        ...

    @property
    def reread(self) -> int:
        """Tokens that the last pass read once more, of the row with most of them; see `bpkit.decode.reread`."""
        ...

    def prefill(self, tokens: Tensor, counts: Sequence[int], *, last: bool, **inputs: Any) -> TargetOutput:
        """Read tokens of prompts after those that are held; more than once where prompts are read in chunks.

        Args:
            tokens: int64 [rows, width]. counts: how many of them count in each row, from the left; 0 reads nothing.
            last: whether logits are wanted, of each row's last token; all counts are equal then.
            inputs: what the model takes beside tokens, such as images.

        Returns:
            Features of all positions. Logits and last hidden states of one position, which without `last` mean nothing.
        """
        ...

    def verify(self, tokens: Tensor, counts: Sequence[int]) -> TargetOutput:
        """Score anchors and drafted tokens, all of which are kept until `rollback`.

        Args:
            tokens: int64 [rows, width]. counts: how many of them count in each row, from the left; 0 reads nothing.

        Returns:
            [rows, width, ...]; what lies behind the tokens that count means nothing.
        """
        ...

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last tokens that were read, so many of each row; the others stand from then on."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        ...

    def join(self, other: Any) -> None:
        """Take in the rows of another session of the same model after one's own; the other is not used again."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding of tokens, [..., hidden]."""
        ...

    def cache(self, row: int) -> Any:
        """What is held of a row, as the model takes it; None without a model."""
        ...


class LiveTarget:
    """What sessions over a model share: how a pass is called, and what is taken from it.

    Args:
        feature_layers: layer *i* means `hidden_states[i + 1]`.
        keep_hidden: also return final-norm hidden states.
    """

    wrapper: Any = None
    """What passes run through, such as the compiled model, where that is not the model itself."""
    cache_argument = "past_key_values"
    """The argument that carries the model's cache."""

    def __init__(self, model: PreTrainedModel, *, feature_layers: tuple[int, ...], keep_hidden: bool) -> None:
        self.model = model
        self.feature_indices = [i + 1 for i in feature_layers]
        self.last_index = model.config.get_text_config().num_hidden_layers if keep_hidden else None
        self.positions = position_limit(model)
        self.counts_positions = counts_positions(model)

    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    def _call(self, tokens: Tensor, cache: Any, *, logits_to_keep: int, states: Sequence[int], **inputs: Any) -> Any:
        """Run the model over tokens.

        Args:
            tokens: int64 [rows, count]; or what stands for their embeddings, [rows, count, hidden].
            logits_to_keep: positions, counted from the end, of which logits are wanted; 0 means all.
            states: indices of hidden states that are wanted.
        """
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        return (self.model if self.wrapper is None else self.wrapper)(
            use_cache=True,
            logits_to_keep=logits_to_keep,
            output_hidden_states=hidden_states_at(states),
            **{name: tokens, self.cache_argument: cache},
            **inputs,
        )

    @property
    def _wanted(self) -> list[int]:
        return self.feature_indices + ([] if self.last_index is None else [self.last_index])

    def _output(self, output: Any, device: torch.device) -> TargetOutput:
        """What the loop needs of a pass, on the device of the tokens: layers may lie on several."""
        states = [self._hidden(output, i).to(device) for i in self.feature_indices]
        return TargetOutput(
            logits=output.logits.to(device),
            features=torch.cat(states, dim=-1) if states else None,
            last_hidden=None if self.last_index is None else self._hidden(output, self.last_index).to(device),
        )

    def _hidden(self, output: Any, index: int) -> Tensor:
        """Hidden states [rows, positions, hidden]; some architectures have several streams of them, or fewer layers."""
        states = output.hidden_states[index] if index < len(output.hidden_states or ()) else None
        size = self.model.config.get_text_config().hidden_size
        if states is None or states.dim() != 3 or states.shape[-1] != size:
            found = "none" if states is None else f"{list(states.shape)}"
            raise ValueError(
                f"{type(self.model).__name__} gives no hidden states [rows, positions, {size}] at index {index} "
                f"(found: {found}): use a drafter and a policy that read no hidden states of the target"
            )
        return cast("Tensor", states)


def of_prefill(output: TargetOutput) -> TargetOutput:
    """A pass over parts of prompts: features of all positions, the rest of the last alone."""
    # Some architectures have no `logits_to_keep`.
    hidden = None if output.last_hidden is None else output.last_hidden[:, -1:]
    return TargetOutput(output.logits[:, -1:], output.features, hidden)


class CachedTarget(LiveTarget):
    """One row whose `DynamicCache` is cropped where tokens are rejected."""

    inputs: ModelInputs | None = None
    """What passes after prefill take beside tokens; None if nothing."""
    stateful = False

    def __init__(self, model: PreTrainedModel, **wanted: Any) -> None:
        super().__init__(model, **wanted)
        self.past = self._new_cache()
        self.length = 0
        """Tokens that went through the model and stand or may be dropped."""

    @property
    def held(self) -> int:
        """Tokens that are remembered."""
        return self.length

    @property
    def reread(self) -> int:
        return 0

    @property
    def cache(self) -> Any:
        return self.past

    def _new_cache(self) -> Any:
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        cache.activate_past_recording()
        return cache

    def prefill(self, tokens: Tensor, **inputs: Any) -> TargetOutput:
        """Read tokens int64 [1, count] of a prompt."""
        return of_prefill(self._output(self._pass(tokens, 1, self._wanted, **inputs), tokens.device))

    def verify(self, tokens: Tensor) -> TargetOutput:
        """Score tokens int64 [1, count]."""
        return self._output(self._pass(tokens, 0, self._wanted), tokens.device)

    def rollback(self, count: int) -> None:
        """Drop the last tokens."""
        if self.length:  # a window that holds nothing yet cannot be cropped
            self.past.crop(-count)
            self.length -= count

    def _pass(self, tokens: Tensor, logits_to_keep: int, states: Sequence[int], **inputs: Any) -> Any:
        count = tokens.shape[1]
        if self.inputs is not None and self.length > 0:
            inputs.update(self.inputs.at(self.length, count))
        if self.counts_positions and "position_ids" not in inputs:
            inputs["position_ids"] = torch.arange(self.length, self.length + count, device=tokens.device)[None]
        self.length += count
        return self._call(tokens, self.past, logits_to_keep=logits_to_keep, states=states, **inputs)


def counts_positions(model: PreTrainedModel) -> bool:
    """Whether a model wants to be told the positions of its tokens, as `generate` does.

    Some count from 0 in every pass otherwise (Bamba). Models of more than text have positions of their own.
    """
    if model.config.get_text_config(decoder=True) is not model.config:
        return False
    return "position_ids" in inspect.signature(type(model).forward).parameters
