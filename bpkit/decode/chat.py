"""From a text to token ids, and from a user's message to the text that a chat template makes of it."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 [1, length]. What a chat template made begins with a start token of its own, and gets no other."""
    start = tokenizer.bos_token
    templated = bool(start) and text.startswith(start)
    return cast("Tensor", tokenizer(text, return_tensors="pt", add_special_tokens=not templated)["input_ids"])


def as_chat(tokenizer: PreTrainedTokenizerBase | None, text: str, target: str) -> str:
    """A user's message and the beginning of the answer, as text whose `token_ids` are those of the chat template.

    Args:
        target: how it is called, for messages.

    Raises:
        ValueError: there is no chat template, or its text is read as other tokens than it stands for.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            f"--chat: the tokenizer of {target} has no chat template, like those of base models; leave out --chat (and "
            "`chat` in prompt files), or name a target that was trained to chat"
        )
    message = [{"role": "user", "content": text}]
    meant = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    if token_ids(tokenizer, made).tolist() != meant["input_ids"].tolist():
        raise ValueError(
            f"--chat: the tokenizer of {target} adds special tokens to what its chat template makes: hand the decoder "
            "the token ids of `apply_chat_template` instead"
        )
    return made
