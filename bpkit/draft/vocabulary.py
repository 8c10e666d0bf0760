"""Whether an assistant model and a target mean the same by a token id."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

PADDING = 128
"""Rows by which two vocabularies of one tokenizer may differ where the tokenizers themselves cannot be compared."""

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that a model can read, padding included."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def refuse_another_tokenizer(model: PreTrainedModel, target: PreTrainedModel, name: str) -> None:
    """Raise unless an assistant has the target's tokenizer, as far as that can be known without the network.

    Where both tokenizers lie in the models' folders or in the cache, every id that both know must stand for the same
    token; sizes do not matter, since embeddings are often padded. Otherwise the sizes may differ by `PADDING`.
    """
    ours, theirs = (m.config.get_text_config().vocab_size for m in (model, target))
    paths = [str(m.name_or_path or "") for m in (model, target)]
    same = _same_tokens(*paths)
    if same is None and abs(ours - theirs) > PADDING:
        raise ValueError(
            f"drafter {name} has a vocabulary of {ours}, the target of {theirs}: an autoregressive drafter must share "
            "the target's tokenizer; if it does, put the tokenizer's files into the folders of both models"
        )
    if same is False:
        raise ValueError(
            f"drafter {name} has another tokenizer than the target {paths[1]}: an autoregressive drafter must share "
            "the target's tokenizer; use a model of the target's family"
        )


def fetch_tokenizer(path: str) -> None:
    """Get the tokenizer of a model that is being loaded into the cache, if the Hub can be asked."""
    for file in _FILES:
        if tokenizer_file(path, file, local=False) is not None:
            return


def tokenizer_file(path: str, file: str, *, local: bool = True) -> Path | None:
    """A file of a model's folder, or of the Hub's as far as it was fetched; None if there is none."""
    try:
        found = cached_file(
            path,
            file,
            local_files_only=local,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # neither a folder nor a name of the Hub
        return None
    return None if found is None else Path(found)


def _same_tokens(ours: str, theirs: str) -> bool | None:
    """Whether the ids that both tokenizers know stand for the same tokens; None if either is not at hand."""
    if not ours or not theirs:
        return None
    for name in _FILES:
        files = [tokenizer_file(path, name) for path in (ours, theirs)]
        if files[0] is not None and files[1] is not None and files[0].read_bytes() == files[1].read_bytes():
            return True
    tokens = [_tokens(path) for path in (ours, theirs)]
    if tokens[0] is None or tokens[1] is None:
        return None
    return all(tokens[1].get(i, token) == token for i, token in tokens[0].items())


def _tokens(path: str) -> dict[int, str] | None:
    """The token of each id, or None if there is no tokenizer that can be read."""
    if not any(tokenizer_file(path, file) for file in _FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception:  # whatever a tokenizer's own code raises: one that cannot be read is not compared
        return None
    return {i: token for token, i in tokenizer.get_vocab().items()}


def fingerprint_tokenizer(path: str) -> str | None:
    """SHA-256 over the token that each id stands for, as 16 hexadecimal digits; None if no tokenizer is at hand.

    Args:
        path: folder or Hub name of a model; the network is not asked.
    """
    tokens = _tokens(path)
    if tokens is None:
        return None
    return hashlib.sha256("".join(f"{i} {tokens[i]}\0" for i in sorted(tokens)).encode()).hexdigest()[:16]
