"""The parquet tables of a trace, and the way from a PromptTrace to rows and back.

`prompts.parquet` has a row for each prompt, `drafts.parquet` a row for each prompt, position and block size. Each
prompt is a row group of its own in both, so that one can be read without the others. Units and meaning of every column
are in the schema's metadata and in the documentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bpkit.trace.records import DraftTable, Floats, Ints, PromptTrace
from bpkit.types import Feature


def _field(name: str, kind: Any, meaning: str) -> Any:
    return pa.field(name, kind, nullable=False, metadata={"meaning": meaning})


_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
PROMPTS = pa.schema(
    [
        _field("index", pa.int32(), "place in the trace, and the stream_id of the noise"),
        _field("id", pa.string(), "of the prompt"),
        _field("domain", pa.string(), "kind of text"),
        _field("max_new_tokens", pa.int32(), "limit on the output, tokens"),
        _field("prompt_tokens", _INTS, "token ids"),
        _field("output_tokens", _INTS, "token ids; the first is decided by prefill"),
        _field("prefill_top_tokens", _INTS, "the 64 likeliest first tokens by raw logits, ids in falling order"),
        _field("prefill_top_log_probabilities", _FLOATS, "their log-probabilities, nats"),
        _field("prefill_entropy", pa.float32(), "of that distribution over the whole vocabulary, nats"),
        _field("near_ties", _INTS, "output positions whose top-2 gap is below tolerance"),
        _field("prefill_hidden", _FLOATS, "final-norm hidden state of the last prompt token [hidden]"),
    ]
)
DRAFTS = pa.schema(
    [
        _field("index", pa.int32(), "of the prompt"),
        _field("position", pa.int32(), "output tokens decided before the draft, from 1"),
        _field("block_size", pa.int32(), "positions in the block, anchor included"),
        _field("draft_length", pa.int32(), "tokens that the drafter proposed"),
        _field("num_accepted", pa.int32(), "of them, those that stand, without the step's last token"),
        _field("tokens", _INTS, "proposed token ids [draft_length]"),
    ]
)
OPTIONAL = {
    Feature.PREFILL_LOGITS: _field("prefill_logits", _FLOATS, "raw logits after the prompt [vocab]"),
    Feature.LAST_HIDDEN: _field(
        "last_hidden", _FLOATS, "final-norm hidden state that predicted each output token [output length * hidden]"
    ),
    Feature.TARGET_FEATURES: _field(
        "target_features", _FLOATS, "the drafter's layers of the target there [output length * layers * hidden]"
    ),
    Feature.ANCHOR_EMBEDDING: _field(
        "anchor_embedding", _FLOATS, "the target's embedding of each output token [output length * hidden]"
    ),
    Feature.ANCHOR_LOG_PROBABILITY: _field(
        "anchor_log_probability", _FLOATS, "of each output token by raw logits, nats [output length]"
    ),
    Feature.ANCHOR_ENTROPY: _field("anchor_entropy", _FLOATS, "of that distribution, nats [output length]"),
    Feature.DRAFT_PROBABILITY: _field(
        "draft_probability", _FLOATS, "drafter's probability of each proposed token [draft_length]"
    ),
    Feature.DRAFT_ENTROPY: _field(
        "draft_entropy", _FLOATS, "entropy of its distribution at each place, nats [draft_length]"
    ),
    Feature.DRAFT_HIDDEN: _field("draft_hidden", _FLOATS, "its last hidden states [draft_length * drafter hidden]"),
}
MATCH = _field(
    "match_probability", _FLOATS, "chance that proposed and target token agree, noise unknown [draft_length]"
)
_MATRICES = frozenset({Feature.LAST_HIDDEN, Feature.TARGET_FEATURES, Feature.ANCHOR_EMBEDDING})
_VECTORS = frozenset({Feature.PREFILL_LOGITS, Feature.ANCHOR_LOG_PROBABILITY, Feature.ANCHOR_ENTROPY})
OF_PROMPTS = _MATRICES | _VECTORS
"""Optional features that stand in the table of prompts; the others stand with the drafts."""


def to_tables(trace: PromptTrace) -> tuple[pa.Table, pa.Table]:
    """One prompt as rows of the two tables."""
    return _prompt_table(trace), _draft_table(trace)


def _prompt_table(trace: PromptTrace) -> pa.Table:
    names = [field.name for field in PROMPTS if field.name != "prefill_hidden"]
    columns = {name: [getattr(trace, name)] for name in names}
    columns["prefill_hidden"] = [trace.features[Feature.PREFILL_HIDDEN]]
    schema = PROMPTS
    for name in sorted(OF_PROMPTS & set(trace.features)):
        schema = schema.append(OPTIONAL[name])
        columns[str(name)] = [trace.features[name].ravel()]
    return pa.table(columns, schema=schema)


def _draft_table(trace: PromptTrace) -> pa.Table:
    drafts = trace.drafts
    rows, sizes = drafts.draft_length.shape
    length = drafts.draft_length.ravel()
    columns: dict[str, Any] = {
        "index": np.full(rows * sizes, trace.index, np.int32),
        "position": np.repeat(np.arange(1, rows + 1, dtype=np.int32), sizes),
        "block_size": np.tile(drafts.block_sizes, rows),
        "draft_length": length,
        "num_accepted": drafts.num_accepted.ravel(),
        "tokens": _lists(drafts.tokens, length, pa.int32()),
    }
    schema = DRAFTS
    for name in sorted(drafts.features):
        schema = schema.append(OPTIONAL[name])
        columns[str(name)] = _lists(drafts.features[name], length, pa.float32())
    if drafts.match_probability is not None:
        schema = schema.append(MATCH)
        columns[MATCH.name] = _lists(drafts.match_probability, length, pa.float32())
    return pa.table(columns, schema=schema)


def _lists(padded: NDArray[Any], length: Ints, kind: Any) -> Any:
    """A list column from an array [rows, sizes, width, ...]: the first `length` places of each draft."""
    width, depth = padded.shape[2], math.prod(padded.shape[3:])
    flat = padded.reshape(len(length), width, depth)
    inside = np.arange(width) < length[:, None]
    offsets = np.concatenate([[0], np.cumsum(length.astype(np.int64) * depth)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError("one prompt's drafts are too large for a table: trace fewer block sizes or features")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat[inside].ravel(), kind))


def from_tables(prompt: pa.Table, drafts: pa.Table, block_sizes: Sequence[int]) -> PromptTrace:
    """The prompt that `to_tables` wrote."""
    row = {name: prompt.column(name).chunk(0)[0] for name in prompt.column_names}
    output = _array(row["output_tokens"])
    features = {Feature.PREFILL_HIDDEN: _array(row["prefill_hidden"])}
    features.update({name: _array(row[name]) for name in _VECTORS if name in row})
    features.update({name: _array(row[name]).reshape(len(output), -1) for name in _MATRICES if name in row})
    return PromptTrace(
        index=row["index"].as_py(),
        id=row["id"].as_py(),
        domain=row["domain"].as_py(),
        max_new_tokens=row["max_new_tokens"].as_py(),
        prompt_tokens=_array(row["prompt_tokens"]),
        output_tokens=output,
        prefill_top_tokens=_array(row["prefill_top_tokens"]),
        prefill_top_log_probabilities=_array(row["prefill_top_log_probabilities"]),
        prefill_entropy=row["prefill_entropy"].as_py(),
        near_ties=_array(row["near_ties"]),
        drafts=_draft_arrays(drafts, len(output) - 1, np.array(block_sizes, np.int32)),
        features=features,
    )


def _array(scalar: Any) -> NDArray[Any]:
    """The values of a list scalar."""
    values: NDArray[Any] = scalar.values.to_numpy(zero_copy_only=False)
    return values


def _draft_arrays(table: pa.Table, rows: int, sizes: Ints) -> DraftTable:
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    shape = (rows, len(sizes))
    length: Ints = columns["draft_length"].to_numpy().reshape(shape).astype(np.int32)
    width = int(sizes.max()) - 1

    def padded(name: str, empty: float, kind: type) -> NDArray[Any]:
        flat = columns[name].flatten().to_numpy(zero_copy_only=False)
        total = int(length.sum())
        tail = (len(flat) // max(1, total),) if name == Feature.DRAFT_HIDDEN else ()
        values = np.full((rows * len(sizes), width, *tail), empty, kind)
        values[np.arange(width) < length.reshape(-1, 1)] = flat.reshape(total, *tail)
        return values.reshape(*shape, width, *tail)

    features: dict[Feature, Floats] = {
        name: padded(name, np.nan, np.float32) for name in OPTIONAL if name not in OF_PROMPTS and name in columns
    }
    return DraftTable(
        block_sizes=sizes,
        draft_length=length,
        num_accepted=columns["num_accepted"].to_numpy().reshape(shape).astype(np.int32),
        tokens=padded("tokens", -1, np.int32),
        features=features,
        match_probability=padded(MATCH.name, np.nan, np.float32) if MATCH.name in columns else None,
    )
