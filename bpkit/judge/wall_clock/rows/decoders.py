"""What a bench of many rows times: sets of prompts, decoded at a batch size by the loop or by transformers' `generate`.

Timed alike: wall clock from token ids in to all outputs finished, preparations included. Nobody makes texts of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bpkit.decode.clock import WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.result import Generation
from bpkit.judge.sources import Counts, counts_of_steps
from bpkit.judge.wall_clock.decoders import EncodedPrompt, generate_options, near_ties_of, seconds_of_calls
from bpkit.types import Prefill, Seconds, Step


class Text(NamedTuple):
    """An output, and the output positions of its near ties, as in `Outcome`."""

    tokens: tuple[int, ...]
    near_ties: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What came of a set of prompts.

    Attributes:
        texts: by prompt id.
        seconds: wall clock of the whole set.
        prefill_seconds: of `seconds`; None where it cannot be told.
        passes: of the target, prefill left out.
        row_steps: steps of all rows together.
        target_seconds, drafter_seconds, policy_seconds: of `seconds`; None where they cannot be told apart.
        sources: steps of rows and their tokens by source, where there are several.
    """

    texts: Mapping[str, Text]
    seconds: float
    prefill_seconds: float | None
    passes: int
    row_steps: int
    target_seconds: float | None
    drafter_seconds: float | None
    policy_seconds: float | None
    fallbacks: int = 0
    sources: Counts = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of all outputs, each up to its end."""
        return sum(len(text.tokens) for text in self.texts.values())


class RowsDecoder(Protocol):
    """Something that decodes many prompts."""

    name: str

    def run(self, tasks: Sequence[EncodedPrompt], batch_size: int) -> RunOutcome:
        """Decode prompts, so many at once."""
        ...


class PolicyRows:
    """A SpeculativeDecoder under one policy; a row that ends makes room for the next prompt."""

    def __init__(self, name: str, decoder: SpeculativeDecoder, options: Mapping[str, Any], seed: int) -> None:
        self.name, self.decoder = name, decoder
        self.options = {**options, "seed": seed}

    def run(self, tasks: Sequence[EncodedPrompt], batch_size: int) -> RunOutcome:
        clock = WallClock(self.decoder.target.device, wait=True)
        prompts = [{"prompt": task.ids, "stream_id": task.stream_id} for task in tasks]
        started = clock.now()
        with self.decoder.run_many(prompts, batch_size=batch_size, **self.options) as runs:
            records = list(runs)
        seconds = clock.now() - started
        generations: dict[int, Generation] = dict(runs.ended())
        for generation in generations.values():
            if generation.error is not None:
                raise generation.error
            seconds -= generation.observer_seconds
        parts = sum((record.seconds for record in records), Seconds())
        steps = [record for record in records if isinstance(record, Step)]
        known = getattr(self.decoder.clock, "tells_parts", True)
        return RunOutcome(
            texts={
                task.prompt.id: Text(tuple(generations[i].tokens[0].tolist()), near_ties_of(generations[i]))
                for i, task in enumerate(tasks)
            },
            seconds=seconds,
            prefill_seconds=sum(one.seconds.total for one in records if isinstance(one, Prefill)) if known else None,
            passes=len(steps),
            row_steps=sum(len(step.row_ids) for step in steps),
            target_seconds=parts.verify if known else None,
            drafter_seconds=parts.draft if known else None,
            policy_seconds=parts.policy,
            fallbacks=sum(step.fallbacks for step in steps),
            sources=counts_of_steps(self.decoder.spec, steps),
        )


class GenerateRows:
    """transformers' own `generate`: batches of prompts in their order, padded on the left, each run to its last end."""

    def __init__(self, name: str, target: PreTrainedModel, options: Mapping[str, Any], seed: int) -> None:
        self.name, self.target, self.seed = name, target, seed
        self.options = generate_options(options)
        config = target.generation_config
        ends = config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.pad = config.pad_token_id if config.pad_token_id is not None else min(self.ends, default=0)

    def run(self, tasks: Sequence[EncodedPrompt], batch_size: int) -> RunOutcome:
        clock = WallClock(self.target.device, wait=True)
        outputs: list[Tensor] = []
        first: list[int] = []
        with seconds_of_calls(self.target) as passes:
            started = clock.now()
            for start in range(0, len(tasks), batch_size):
                batch = tasks[start : start + batch_size]
                if self.options["do_sample"]:
                    torch.manual_seed(self.seed + start)
                first.append(len(passes))
                ids, mask = left_padded([task.ids for task in batch], self.pad)
                made = self.target.generate(input_ids=ids, attention_mask=mask, pad_token_id=self.pad, **self.options)
                outputs += made[:, ids.shape[1] :]
            seconds = clock.now() - started
        on_cpu = self.target.device.type == "cpu"  # a GPU works on after a call: its time says nothing
        texts = [Text(up_to_end(output.tolist(), self.ends)) for output in outputs]
        return RunOutcome(
            texts={task.prompt.id: text for task, text in zip(tasks, texts, strict=True)},
            seconds=seconds,
            prefill_seconds=sum(passes[place] for place in first) if on_cpu else None,
            passes=len(passes) - len(first),
            row_steps=sum(len(text.tokens) - 1 for text in texts),
            target_seconds=sum(passes) if on_cpu else None,
            drafter_seconds=0.0 if on_cpu else None,
            policy_seconds=0.0 if on_cpu else None,
        )


def left_padded(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts [1, length] as one batch, and its attention mask: both int64 [prompts, largest length]."""
    width = max(ids.shape[1] for ids in prompts)
    batch = prompts[0].new_full((len(prompts), width), pad)
    mask = torch.zeros_like(batch)
    for row, ids in enumerate(prompts):
        batch[row, width - ids.shape[1] :] = ids[0]
        mask[row, width - ids.shape[1] :] = 1
    return batch, mask


def up_to_end(tokens: Sequence[int], ends: Set[int]) -> tuple[int, ...]:
    """An output without the padding behind its first end token.

    >>> up_to_end([5, 6, 0, 1, 1], {0}), up_to_end([5, 6], {0})
    ((5, 6, 0), (5, 6))
    """
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: last + 1])
