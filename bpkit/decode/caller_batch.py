"""A batch as transformers' `generate` hands it over: its rows told apart, and their texts put together again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from bpkit.decode.host import to_host
from bpkit.decode.inputs import model_inputs
from bpkit.decode.noise import TARGET_SALT, GumbelNoise
from bpkit.decode.observers import next_number
from bpkit.decode.refuse import refuse_changing_frequencies
from bpkit.decode.request import Request
from bpkit.decode.rollback import PREFIX_CONSTRAINED
from bpkit.decode.sampling import Processors, Sampler
from bpkit.decode.stopping import Stopping, end_tokens, length_limit
from bpkit.decode.text import RowText

_BY_ROW = frozenset({"attention_mask", "position_ids", "input_ids", "cache_position"})
_OF_ALL_PROMPTS = ("EncoderNoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor")


@dataclass(frozen=True)
class CallerBatch:
    """What `generate` hands to a `custom_generate` callable.

    Attributes:
        ids: int64 [rows, length], on the device; `model_kwargs` may have an attention mask.
    """

    ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: Mapping[str, Any]

    def requests(
        self,
        model: PreTrainedModel,
        seed: int | Sequence[int] | None,
        stream_id: int | Sequence[int],
        generator: Callable[[int | None, int], torch.Generator],
    ) -> list[Request]:
        """The rows, each with what it does not share.

        Args:
            seed: of sampling: for all rows, or for each; None draws one from torch's global generator.
            stream_id: of the first row, those of the others follow; or of each.
            generator: makes the policy's random numbers from seed and stream.

        Raises:
            ValueError: something cannot be told apart by row.
        """
        ids, rows, most = self.ids, self.ids.shape[0], length_limit(self.criteria)
        padding, (host,) = left_padding(ids, self.model_kwargs.get("attention_mask")), to_host([ids])
        if rows > 1 or any(padding):
            refuse_shared(padding, self.processors, self.model_kwargs)
        seeds: list[int | None] = [None] * rows
        if self.config.do_sample:
            seeds = [*each_row(int(torch.randint(2**62, ())) if seed is None else seed, rows, "seed", step=0)]
        streams = each_row(stream_id, rows, "stream_id", step=1)
        made = []
        for row, (pads, tokens) in enumerate(zip(padding, host.tolist(), strict=True)):
            own = slice(row, row + 1)
            padded = ids[own, :pads] if pads else None
            text = RowText(ids[own, pads:], most - pads, padding=padded, tokens=tokens[pads:])
            refuse_changing_frequencies(model, text.length, text.max_length)
            made.append(
                Request(
                    next_number(),
                    text,
                    self._sampler(text, row, seeds[row], streams[row], model),
                    Stopping(self.criteria, text),
                    generator(seeds[row], streams[row]),
                    seeds[row],
                    streams[row],
                    temperature=0.0 if seeds[row] is None else float(self.config.temperature or 1.0),
                    inputs=model_inputs(model, text.prompt, {} if pads or rows > 1 else self.model_kwargs),
                )
            )
        return made

    def _sampler(self, text: RowText, row: int, seed: int | None, stream: int, model: PreTrainedModel) -> Sampler:
        ends = end_tokens(self.criteria)
        processors = Processors(of_row(self.processors, row), ends=ends, prompt_length=self.ids.shape[1])
        noise = None
        if seed is not None:
            vocabulary = model.config.get_text_config().vocab_size
            noise = GumbelNoise(seed, stream, vocabulary, self.ids.device, salt=TARGET_SALT)
        return Sampler(text, processors, noise)


def left_padding(ids: Tensor, mask: Tensor | None) -> list[int]:
    """How many tokens of each row are left padding, by the attention mask, [rows, length].

    Raises:
        ValueError: the mask hides other tokens.
    """
    rows, length = ids.shape
    if mask is None:
        return [0] * rows
    (seen,) = to_host([mask == 1])
    found: list[int] = (length - seen.sum(dim=-1)).tolist() if seen.shape == ids.shape else [length]
    if any(count == length or not bool(row[count:].all()) for count, row in zip(found, seen, strict=False)):
        raise ValueError(
            "the attention mask hides tokens: of a prompt only padding on its left may be hidden; where no mask is "
            "given and the prompt has pad tokens, transformers makes one, so pass a mask of ones to have them read"
        )
    return found


def refuse_shared(padding: Sequence[int], processors: LogitsProcessorList, model_kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for what cannot be told apart by row, where several rows or padded ones come together.

    Args:
        padding: tokens of each row that are left padding.
    """
    rows = len(padding)
    inputs = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)} - _BY_ROW
    positions = model_kwargs.get("position_ids")
    if positions is not None:  # those that `generate` makes count the tokens that are no padding
        usual = [list(range(positions.shape[-1] - pads)) for pads in padding]
        own = to_host([positions])[0].expand(rows, -1) if positions.ndim == 2 else positions
        if positions.ndim != 2 or [row[pads:].tolist() for row, pads in zip(own, padding, strict=True)] != usual:
            inputs.add("position_ids")
    if inputs:
        raise ValueError(
            f"{', '.join(sorted(inputs))}: in a batch of {rows} rows, or with padding, only token ids can be told "
            "apart by row; call once for each prompt, without padding"
        )
    for processor in processors:
        if rows > 1 and type(processor).__name__ in _OF_ALL_PROMPTS:
            raise ValueError(
                f"logits processor {type(processor).__name__} looks at the prompts of all {rows} rows: call once "
                "for each"
            )


def each_row(value: int | Sequence[int], rows: int, name: str, *, step: int) -> list[int]:
    """A number for each row: those that are given, or from one number on by `step`.

    >>> each_row(5, 3, "stream_id", step=1)
    [5, 6, 7]
    """
    if isinstance(value, int):
        return [value + step * row for row in range(rows)]
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} values for {rows} rows: give one, or one for each row")
    return list(value)


def of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors of one row: a function of allowed tokens is told which row it is, as in plain decoding."""
    if row == 0 or not any(type(processor) is PREFIX_CONSTRAINED for processor in processors):
        return processors
    made = LogitsProcessorList()
    for processor in processors:
        if type(processor) is PREFIX_CONSTRAINED:
            processor = copy.copy(processor)
            processor._prefix_allowed_tokens_fn = _AllowedOfRow(processor._prefix_allowed_tokens_fn, row)
        made.append(processor)
    return made


class _AllowedOfRow:
    """A function of allowed tokens for one row. What it says of its state is what the function says."""

    def __init__(self, allowed: Callable[[int, Tensor], list[int]], row: int) -> None:
        self.allowed, self.row = allowed, row
        for name in ("stateless", "snapshot", "restore"):
            if hasattr(allowed, name):
                setattr(self, name, getattr(allowed, name))

    def __call__(self, _: int, ids: Tensor) -> list[int]:
        return self.allowed(self.row, ids)


def sequences(ids: Tensor, outputs: Sequence[Tensor], config: GenerationConfig) -> Tensor:
    """Prompts [rows, length] and outputs [1, count] of several counts: int64 [rows, longest], padded on the right."""
    fill = config.pad_token_id
    if fill is None:  # as transformers
        ends = config.eos_token_id
        fill = ends[0] if isinstance(ends, list) else ends
    longest = max(output.shape[1] for output in outputs)
    padded = [functional.pad(output, (0, longest - output.shape[1]), value=fill or 0) for output in outputs]
    return torch.cat([ids, torch.cat(padded)], dim=1)
