"""Text in pieces: tokens in, finished text out, by transformers' own rule for when text is final."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer


class TextPieces(TextStreamer):
    """Collects the text that `TextStreamer` would print."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._ready: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._ready.append(text)

    def put(self, tokens: Tensor) -> Iterator[str]:
        """Take tokens, int64 [1, count], and yield the text that they complete."""
        # One by one: a token may complete a character that began in the last step.
        for token in tokens[0].cpu():
            super().put(token[None])
        yield from self._take()

    def end(self) -> Iterator[str]:
        """Yield what is left."""
        super().end()
        yield from self._take()

    def _take(self) -> list[str]:
        ready, self._ready = self._ready, []
        return [text for text in ready if text]
