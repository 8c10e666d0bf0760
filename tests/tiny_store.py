"""Stores of n-grams that tests make in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpkit import SpeculativeDecoder
from bpkit.draft.stores.build import make_tables
from bpkit.draft.stores.files import Store, StoreFacts, open_store, write_store
from bpkit.testing import TinyPair


def store_of(
    folder: Path, texts: Sequence[Sequence[int]], *, vocab_size: int = 100, ngrams: int = 10_000, **facts: Any
) -> Store:
    """The store of token ids, in a folder."""
    tables = make_tables(texts, vocab_size=vocab_size, n=5, most=ngrams)
    counts: Any = {"texts": len(texts), "tokens": sum(map(len, texts)), "n": 5, "ngrams": len(tables.ngrams)}
    write_store(folder, StoreFacts(target="tiny", vocab_size=vocab_size, source=["a test"], **counts, **facts), tables)
    return open_store(folder)


def tiny_store(folder: Path, pair: TinyPair, prompts: Sequence[str]) -> Path:
    """The folder of a store of what the pair's target answers, so that drafts of its answers are often right."""
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0), "fixed:8", tokenizer=pair.tokenizer)
    made = [decoder.generate(pair.ids(prompt), max_new_tokens=24, temperature=0) for prompt in prompts]
    store_of(folder, [one.tokens[0].tolist() for one in made], vocab_size=pair.target.config.vocab_size)
    return folder
