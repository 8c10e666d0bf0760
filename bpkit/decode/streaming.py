"""Text in pieces: tokens in, finished text out, by transformers' own rule for when text is final."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer


class TextPieces(TextStreamer):
    """Collects the text that `TextStreamer` would print."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._ready: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._ready.append(text)

    def put(self, tokens: Tensor) -> list[str]:
        """Take tokens, int64 [1, count]; the text that they complete."""
        self._ready = []
        # One by one: a token may complete a character that began in the last step.
        for token in tokens[0].cpu():
            super().put(token[None])
        return self._ready

    def end(self) -> list[str]:
        """What is left."""
        self._ready = []
        super().end()
        return self._ready
