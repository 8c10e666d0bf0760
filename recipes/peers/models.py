"""What the parent prepares for all: prompts as token ids, and draft models that every library can load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers import AutoTokenizer, PreTrainedConfig

from bpkit.decode.chat import as_chat, token_ids
from bpkit.decode.pretrained import load_causal_lm
from bpkit.draft.own_layers import FLAG, load_own_layers
from bpkit.prompts import Prompt
from recipes.peers.contestants import Contestant
from recipes.peers.measure import Task


def encoded(target: str, prompts: Sequence[Prompt]) -> list[Task]:
    """Token ids: users' messages by the chat template of the target, other texts as they stand."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [as_chat(tokenizer, one.text, target) if one.chat else one.text for one in prompts]
    return [
        Task(one.id, one.domain, tuple(token_ids(tokenizer, text)[0].tolist()), stream)
        for stream, (one, text) in enumerate(zip(prompts, texts, strict=True))
    ]


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
