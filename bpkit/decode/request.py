"""One request: a prompt, how its tokens are chosen, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bpkit.decode.inputs import ModelInputs
from bpkit.decode.sampling import Sampler
from bpkit.decode.stopping import OutputEnd
from bpkit.decode.text import RowText


@dataclass(eq=False)
class Request:
    """What one row needs that it does not share with others.

    Attributes:
        number: its row id.
        seed: of the noise, None for greedy decoding. stream_id: tells apart prompts that share a seed.
        temperature: for observers; 0 for greedy decoding.
        generator: random numbers for the policy of rows that begin with this one.
        inputs: what the target takes beside tokens, such as images.
        failure: what ended it before its end, such as a logits processor that raised.
    """

    number: int
    text: RowText
    sampler: Sampler
    stopping: OutputEnd
    generator: torch.Generator
    seed: int | None = None
    stream_id: int = 0
    temperature: float = 0.0
    inputs: ModelInputs | None = None
    failure: Exception | None = None

    def cut(self, tokens: list[int]) -> tuple[int, bool]:
        """How many of `tokens` are generated, 1 or more, and whether the row ends: also where something raised."""
        self.failure = self.failure or self.sampler.processors.failure
        if self.failure is None:
            try:
                return self.stopping.cut(tokens)
            except Exception as error:
                self.failure = error
        return 1, True

    def settle(self) -> None:
        """After tokens were appended: processors forget what cannot come back."""
        self.sampler.processors.rollback.settle(self.text.padding + self.text.length)

    def finish(self) -> None:
        """The row ended: processors are left as plain decoding would leave them."""
        self.sampler.processors.rollback.finish(self.text.padding + self.text.length)

    @property
    def of_prefill(self) -> Mapping[str, Any]:
        """What the pass over the prompt takes beside tokens."""
        return {} if self.inputs is None else self.inputs.prefill
