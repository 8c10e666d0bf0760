"""A store on disk: a folder with `store.json` and arrays of numpy, mapped into memory and never unpickled."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bpkit.draft.stores.build import DEPTH, StoreTables
from bpkit.draft.stores.tables import TOKEN, Corpus, NgramTable
from bpkit.files import faults, write_json

FACTS = "store.json"
NUMBER = np.dtype("<u4")
"""How other numbers than token ids lie in a file."""
MAX_BYTES = 8 * 2**30
"""Of an array that is opened; larger ones are refused."""
_MAX_FACTS = 2**20


class StoreFacts(BaseModel):
    """What a store holds, and its history.

    Attributes:
        target: whose tokenizer made the token ids, and in a store of its answers whose they are.
        target_fingerprint: of its weights, where they were at hand.
        tokenizer: fingerprint of the token that each id stands for; None if the tokenizer was not at hand.
        vocab_size: of the target; all token ids are below it.
        source, part: what it was made from, such as traces, and which prompts of it.
        texts, tokens: how many there were.
        n: tokens of an n-gram. ngrams: how many are kept.
        made, command, versions: when, how and with what.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    target: str
    target_fingerprint: str | None = None
    tokenizer: str | None = None
    vocab_size: int = Field(ge=1)
    source: list[str]
    part: str = "all"
    texts: int = Field(ge=1)
    tokens: int = Field(ge=1)
    n: int = Field(ge=2, le=DEPTH)
    ngrams: int = Field(ge=0)
    made: str = ""
    command: str = ""
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Store:
    """An open store, which is only read."""

    path: Path
    facts: StoreFacts
    model: NgramTable
    corpus: Corpus


def write_store(folder: Path, facts: StoreFacts, tables: StoreTables) -> None:
    """Write a store. `store.json` comes last: where it is, the arrays are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    for name, array in vars(tables).items():
        partial = folder / f".{name}.{os.getpid()}.npy"
        try:
            np.save(partial, array, allow_pickle=False)
            os.replace(partial, folder / f"{name}.npy")
        finally:
            partial.unlink(missing_ok=True)
    write_json(folder / FACTS, facts)


def check_store_folder(folder: Path) -> None:
    """Refuse to write a store where something else lies than one, or half of one. Raises ValueError."""
    own = {FACTS, *(f"{field.name}.npy" for field in fields(StoreTables))}
    if folder.is_file() or (folder.is_dir() and any(path.name not in own for path in folder.iterdir())):
        raise ValueError(f"{folder} is there already and has other files than a store: name a new folder")


def read_facts(folder: Path) -> StoreFacts:
    """What a store says of itself. Raises ValueError or FileNotFoundError."""
    path = folder / FACTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no store (no {FACTS} in it): make one with `bpkit store build TRACE --out {folder}`"
        )
    if path.stat().st_size > _MAX_FACTS:
        raise ValueError(f"{path} has more than {_MAX_FACTS} bytes and is no description of a store; build it again")
    try:
        return StoreFacts.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path} is no description of a store that this version reads ({faults(error)}); build it again"
        ) from None


def open_store(folder: Path) -> Store:
    """Open a store, whose arrays are mapped into memory.

    Raises:
        ValueError: a file that is damaged, too large or not the store's. FileNotFoundError: no store there.
    """
    facts = read_facts(folder)
    rows, ids, length = facts.ngrams, facts.vocab_size + 1, facts.tokens + facts.texts  # a separator behind each text
    ngrams = _array(folder / "ngrams.npy", (rows, facts.n), TOKEN)
    if ngrams.size and int(ngrams.max()) >= facts.vocab_size:
        raise ValueError(f"{folder / 'ngrams.npy'} has token ids of {facts.vocab_size} or more; build the store again")
    likeliest = _array(folder / "likeliest.npy", (rows, facts.n - 1))
    if likeliest.size and int(likeliest.max()) >= rows:
        raise ValueError(f"{folder / 'likeliest.npy'} does not belong to its table; build the store again")
    # Not in stores of earlier versions.
    counts = _array(folder / "counts.npy", (rows,)) if (folder / "counts.npy").exists() else None
    model = NgramTable(ngrams, likeliest, _firsts(folder / "ngram_firsts.npy", ids, rows), counts)
    tokens, suffixes = _array(folder / "tokens.npy", (length,), TOKEN), _array(folder / "suffixes.npy", (length,))
    return Store(folder, facts, model, Corpus(tokens, suffixes, _firsts(folder / "suffix_firsts.npy", ids, length)))


def _array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any] = NUMBER) -> NDArray[np.uint32]:
    """An array of this shape and dtype, mapped; numbers are put in the machine's order where that is another."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the store; build it again")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, and {MAX_BYTES:,} is the most; build a smaller one"
        )
    try:
        array = np.load(path, mmap_mode="r" if all(shape) else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); build the store again") from None
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        what = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {what}, where {FACTS} says {dtype} {list(shape)}; build the store again")
    return array if dtype == TOKEN else array.astype(np.uint32, copy=False)


def _firsts(path: Path, ids: int, rows: int) -> NDArray[np.uint32]:
    """Where the rows of each first token begin."""
    firsts = _array(path, (ids,))
    if int(firsts[-1]) > rows or (firsts[1:] < firsts[:-1]).any():
        raise ValueError(f"{path} does not belong to its table; build the store again")
    return firsts
