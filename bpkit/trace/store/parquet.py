"""The parquet tables of a trace, and the way from a PromptTrace to rows and back.

`prompts.parquet` has a row for each prompt, `drafts.parquet` a row for each prompt, position and block size. Each
prompt is a row group of its own in both, so that one can be read without the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bpkit.trace.records import CandidateTable, DraftTable, Ints, PromptTrace
from bpkit.types import Feature

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


def _schema(*columns: tuple[str, Any, str]) -> Any:
    """A schema of names, types and meanings."""
    return pa.schema([pa.field(name, kind, nullable=False, metadata={"meaning": said}) for name, kind, said in columns])


PROMPTS = _schema(
    ("index", pa.int32(), "place in the trace, and the stream_id of the noise"),
    ("id", pa.string(), "of the prompt"),
    ("domain", pa.string(), "kind of text"),
    ("max_new_tokens", pa.int32(), "limit on the output, tokens"),
    ("prompt_tokens", _INTS, "token ids"),
    ("output_tokens", _INTS, "token ids; the first is decided by prefill"),
    ("prefill_top_tokens", _INTS, "the 64 likeliest first tokens by raw logits, ids in falling order"),
    ("prefill_top_log_probabilities", _FLOATS, "their log-probabilities, nats"),
    ("prefill_entropy", pa.float32(), "of that distribution over the whole vocabulary, nats"),
    ("near_ties", _INTS, "output positions whose top-2 gap is below tolerance"),
    ("prefill_hidden", _FLOATS, "final-norm hidden state of the last prompt token [hidden]"),
)
DRAFTS = _schema(
    ("index", pa.int32(), "of the prompt"),
    ("position", pa.int32(), "output tokens decided before the draft, from 1"),
    ("block_size", pa.int32(), "positions in the block, anchor included"),
    ("draft_length", pa.int32(), "tokens that the drafter proposed"),
    ("num_accepted", pa.int32(), "of them, those that stand, without the step's last token"),
    ("tokens", _INTS, "proposed token ids [draft_length]"),
)
MORE_OF_PROMPTS = _schema(
    ("anchor_embedding", _FLOATS, "the target's embedding of each output token [output length * hidden]"),
    ("anchor_entropy", _FLOATS, "of that distribution, nats [output length]"),
    ("anchor_log_probability", _FLOATS, "of each output token by raw logits, nats [output length]"),
    ("last_hidden", _FLOATS, "final-norm hidden state that predicted each output token [output length * hidden]"),
    ("prefill_logits", _FLOATS, "raw logits after the prompt [vocab]"),
    ("target_features", _FLOATS, "the drafter's layers of the target there [output length * layers * hidden]"),
)
MORE_OF_DRAFTS = _schema(
    ("candidate_chances", _FLOATS, "of the best tokens at each place, as the drafter tells [draft_length * branches]"),
    ("candidate_probabilities", _FLOATS, "of the same by the drafter, without noise [draft_length * branches]"),
    ("candidate_ranks", _INTS, "of the output's own token among them, from 0; `branches` of none [draft_length]"),
    ("candidate_tokens", _INTS, "their token ids, the best first [draft_length * branches]"),
    ("draft_entropy", _FLOATS, "entropy of its distribution at each place, nats [draft_length]"),
    ("draft_hidden", _FLOATS, "its last hidden states [draft_length * drafter hidden]"),
    ("draft_probability", _FLOATS, "drafter's probability of each proposed token [draft_length]"),
    ("match_length", pa.int32(), "of stores, tokens of the match that the position's drafts come from"),
    ("match_share", pa.float64(), "of its occurrences, those that go on alike over all and one"),
    ("node_chances", _FLOATS, "of trees, that each token stands where its parent does [draft_length]"),
    ("node_parents", _INTS, "of trees, the token that each follows; -1 is the anchor [draft_length]"),
    ("match_probability", _FLOATS, "chance that proposed and target token agree, noise unknown [draft_length]"),
)
"""Columns that are there if they were asked for, or where the drafter has them."""
MATCH, MATCH_LENGTH, MATCH_SHARE = "match_probability", "match_length", "match_share"
CANDIDATES = "candidate_tokens", "candidate_chances", "candidate_probabilities", "candidate_ranks"
NODES = "node_parents", "node_chances"
FLOAT = np.nan, np.float32
_EMPTY: dict[str, Any] = dict.fromkeys((*CANDIDATES[::3], NODES[0]), (-1, np.int32))
"""What stands where nothing was drafted, and the type, of columns that are no floats."""
_WIDE = frozenset({Feature.DRAFT_HIDDEN, *CANDIDATES[:3]})
"""Columns of several values for each token."""
_BY_OUTPUT_TOKEN = (Feature.LAST_HIDDEN, Feature.TARGET_FEATURES, Feature.ANCHOR_EMBEDDING)


def to_tables(trace: PromptTrace) -> tuple[pa.Table, pa.Table]:
    """One prompt as rows of the two tables."""
    values = {name: getattr(trace, name, None) for name in PROMPTS.names}
    values |= {name: value.ravel() for name, value in trace.features.items()}
    prompts = _table({name: [value] for name, value in values.items()}, PROMPTS, MORE_OF_PROMPTS)
    return prompts, _draft_table(trace)


def _draft_table(trace: PromptTrace) -> pa.Table:
    drafts = trace.drafts
    rows, sizes = drafts.draft_length.shape
    length = drafts.draft_length.ravel()
    more: dict[str, Any] = {str(name): values for name, values in drafts.features.items()}
    if drafts.match_probability is not None:
        more[MATCH] = drafts.match_probability
    if (found := drafts.candidates) is not None:
        more.update(zip(CANDIDATES, (found.tokens, found.chances, found.probabilities, found.ranks), strict=True))
    if drafts.parents is not None:
        more.update(zip(NODES, (drafts.parents, drafts.chances), strict=True))
    columns = {
        "index": np.full(rows * sizes, trace.index, np.int32),
        "position": np.repeat(np.arange(1, rows + 1, dtype=np.int32), sizes),
        "block_size": np.tile(drafts.block_sizes, rows),
        "draft_length": length,
        "num_accepted": drafts.num_accepted.ravel(),
        "tokens": _lists(drafts.tokens, length),
        **{name: _lists(values, length) for name, values in more.items()},
    }
    for name, of_rows in ((MATCH_LENGTH, drafts.match_length), (MATCH_SHARE, drafts.match_share)):
        if of_rows is not None:
            columns[name] = np.repeat(of_rows, sizes)
    return _table(columns, DRAFTS, MORE_OF_DRAFTS)


def _table(columns: Mapping[str, Any], always: Any, more: Any) -> pa.Table:
    return pa.table(columns, schema=pa.schema([*always, *(field for field in more if field.name in columns)]))


def _lists(padded: NDArray[Any], length: Ints) -> Any:
    """A list column from an array [rows, sizes, width, ...]: the first `length` places of each draft."""
    width, depth = padded.shape[2], math.prod(padded.shape[3:])
    flat = padded.reshape(len(length), width, depth)
    inside = np.arange(width) < length[:, None]
    offsets = np.concatenate([[0], np.cumsum(length.astype(np.int64) * depth)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError("one prompt's drafts are too large for a table: trace fewer block sizes or features")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat[inside].ravel()))


def from_tables(prompt: pa.Table, drafts: pa.Table, block_sizes: Sequence[int]) -> PromptTrace:
    """The prompt that `to_tables` wrote."""
    values = {name: _value(prompt.column(name).chunk(0)[0]) for name in prompt.column_names}
    output_length = len(values["output_tokens"])
    names = (Feature.PREFILL_HIDDEN, *map(Feature, MORE_OF_PROMPTS.names))
    features = {name: values.pop(name) for name in names if name in values}
    for name in features.keys() & _BY_OUTPUT_TOKEN:
        features[name] = features[name].reshape(output_length, -1)
    drafted = _draft_arrays(drafts, output_length - 1, np.array(block_sizes, np.int32))
    return PromptTrace(drafts=drafted, features=features, **values)


def _value(scalar: Any) -> Any:
    """A number, a string, or the numpy array of a list."""
    return scalar.values.to_numpy(zero_copy_only=False) if pa.types.is_list(scalar.type) else scalar.as_py()


def _draft_arrays(table: pa.Table, rows: int, sizes: Ints) -> DraftTable:
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    shape = (rows, len(sizes))
    length: Ints = columns["draft_length"].to_numpy().reshape(shape).astype(np.int32)
    width = int(sizes.max()) - 1

    def padded(name: str, empty: float, kind: type) -> NDArray[Any]:
        flat = columns[name].flatten().to_numpy(zero_copy_only=False)
        total = int(length.sum())
        tail = (len(flat) // max(1, total),) if name in _WIDE else ()
        values = np.full((rows * len(sizes), width, *tail), empty, kind)
        values[np.arange(width) < length.reshape(-1, 1)] = flat.reshape(total, *tail)
        return values.reshape(*shape, width, *tail)

    matched = {name: columns.pop(name).to_numpy() for name in (MATCH_LENGTH, MATCH_SHARE) if name in columns}
    of_rows = {name: values.reshape(shape)[:, 0] for name, values in matched.items()}
    more = {name: padded(name, *_EMPTY.get(name, FLOAT)) for name in MORE_OF_DRAFTS.names if name in columns}
    match, parents, chances = (more.pop(name, None) for name in (MATCH, *NODES))
    candidates = [more.pop(name) for name in CANDIDATES if name in more]
    return DraftTable(
        block_sizes=sizes,
        draft_length=length,
        num_accepted=columns["num_accepted"].to_numpy().reshape(shape).astype(np.int32),
        tokens=padded("tokens", -1, np.int32),
        features={Feature(name): values for name, values in more.items()},
        match_probability=match,
        candidates=CandidateTable(*candidates) if candidates else None,
        parents=parents,
        chances=chances,
        **of_rows,
    )
