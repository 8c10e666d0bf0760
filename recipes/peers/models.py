"""What the parent prepares for all: prompts as token ids, and draft models that every library can load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from bpkit.decode.pretrained import load_causal_lm
from bpkit.draft.own_layers import FLAG, load_own_layers
from bpkit.prompts import Prompt
from recipes.peers.contestants import Contestant
from recipes.peers.measure import Task


def encoded(target: str, prompts: Sequence[Prompt]) -> list[Task]:
    """Token ids: users' messages by the chat template of the target, other texts as they stand."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    return [
        Task(prompt.id, prompt.domain, tuple(ids_of(prompt, tokenizer)), stream)
        for stream, prompt in enumerate(prompts)
    ]


def ids_of(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one prompt. Raises ValueError for a message where there is no chat template."""
    text = prompt.text
    if prompt.chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"prompt {prompt.id} is a user's message, and this target has no chat template")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    templated = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not (templated or prompt.chat))["input_ids"]
    return ids


@contextmanager
def whole_drafts(target: str, contestants: Sequence[Contestant]) -> Iterator[list[Contestant]]:
    """Contestants of other libraries with complete draft models: bpkit's may keep their own layers only."""
    with tempfile.TemporaryDirectory() as folder:
        whole: dict[str, str] = {}
        for one in contestants:
            draft = one.settings.get("draft")
            if draft is not None and draft not in whole:
                whole[draft] = str(draft)
                if PreTrainedConfig.get_config_dict(draft)[0].get(FLAG):
                    whole[draft] = f"{folder}/{len(whole)}"
                    write_whole(draft, target, whole[draft])
        yield [
            replace(one, settings={**one.settings, "draft": whole[one.settings["draft"]]})
            if one.settings.get("draft")
            else one
            for one in contestants
        ]


def write_whole(draft: str, target: str, folder: str) -> None:
    """Write a drafter that keeps its own layers only as a whole model, with the target's embedding."""
    model = load_own_layers(draft, load_causal_lm(target))
    setattr(model.config, FLAG, False)
    model.save_pretrained(folder)
