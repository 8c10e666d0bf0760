"""What a trace says of one prompt: numpy arrays, ready for replay, oracles and statistics.

Positions count output tokens decided before a draft: the draft at position *t* has output token *t - 1* as its anchor,
and its *k*-th token (from 0) stands for output token *t + k*. Position 0 is decided by prefill, so drafts begin at
position 1; **row `t - 1` of every table is position *t***.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bpkit.types import Feature

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class CandidateTable:
    """The best tokens of each drafted position, of a drafter whose positions do not depend on each other.

    Any tree of them can be replayed: whether a node stands is told by its rank and those before it on its path.

    Attributes:
        tokens: int32 [rows, sizes, width, branches], the best first, -1 where nothing was drafted.
        chances: as the drafter tells them (`bpkit.decode.sampling.chances`), float32 of the same shape; NaN there.
        probabilities: by the drafter, which without noise the chances are; the same.
        ranks: of the output's own token among them, int32 [rows, sizes, width]: `branches` where it is none of them or
            the output has ended, -1 where nothing was drafted.
    """

    tokens: Ints
    chances: Floats
    probabilities: Floats
    ranks: Ints

    @property
    def branches(self) -> int:
        return int(self.tokens.shape[-1])


@dataclass(frozen=True)
class DraftTable:
    """Every draft that could have been made while this output was decided.

    `rows` is the output length less one, `sizes` the number of block sizes, `width` the longest draft.

    Attributes:
        block_sizes: int32 [sizes], ascending, from 2.
        draft_length: tokens that the drafter proposed, int32 [rows, sizes]; an n-gram drafter may propose none.
        num_accepted: of them, those that stand if all are verified, without the step's last token: int32
            [rows, sizes]. At most `output_length - position - 1`.
        tokens: int32 [rows, sizes, width], -1 where nothing was drafted.
        features: `draft_probability`, `draft_entropy` (float32 [rows, sizes, width]) and, where they were asked for,
            `draft_hidden` (float32 [rows, sizes, width, drafter hidden]); NaN where nothing was drafted.
        match_probability: chance that the drafted token is the target's, given the drafter's distribution and the
            target's along the realised text, but not the noise: float32 [rows, sizes, width], NaN where nothing was
            drafted or beyond the output. None for greedy traces and for drafters without a distribution. An
            autoregressive draft goes on from its own tokens, so that after one that does not match this is no longer
            the chance given that all earlier ones matched; `oracle_distributions` takes another.
        match_length: of free sources, tokens of the match that each position's drafts come from: int32 [rows].
        match_share: of them, the share of its occurrences that goes on alike (`Feature.SOURCE_SHARE`): float64 [rows].
        candidates: of block diffusion with branches; the other tables are of the chains of the best candidates then.
        parents, chances: of other drafters of trees, as in `Draft`, int32 and float32 [rows, sizes, width], -1 and NaN
            where nothing was drafted; `num_accepted` is of whole trees.
    """

    block_sizes: Ints
    draft_length: Ints
    num_accepted: Ints
    tokens: Ints
    features: dict[Feature, Floats] = field(default_factory=dict)
    match_probability: Floats | None = None
    match_length: Ints | None = None
    match_share: NDArray[np.float64] | None = None
    candidates: CandidateTable | None = None
    parents: Ints | None = None
    chances: Floats | None = None

    @property
    def rows(self) -> int:
        """Positions at which a draft could begin."""
        return int(self.draft_length.shape[0])

    def column(self, block_size: int) -> int:
        """Index of a block size. Raises KeyError if it was not traced."""
        place = int(np.searchsorted(self.block_sizes, block_size))
        if place == len(self.block_sizes) or self.block_sizes[place] != block_size:
            raise KeyError(block_size)
        return place


@dataclass(frozen=True)
class PromptTrace:
    """One prompt with its output.

    Attributes:
        index: place in the trace, and the `stream_id` of the noise.
        id, domain: as the prompts have them.
        max_new_tokens: the limit that the output was made under.
        prompt_tokens, output_tokens: int32 [prompt length], [output length].
        features: `prefill_hidden` float32 [hidden]; where asked for `prefill_logits` float32 [vocab], and
            `last_hidden` float32 [output length, hidden], whose row *t* predicted output token *t*.
        prefill_top_tokens, prefill_top_log_probabilities: the 64 likeliest first tokens by the target's raw logits
            (no temperature), int32 [64] and float32 [64], in falling order.
        prefill_entropy: of the same distribution, in nats.
        near_ties: output positions where the two best candidates are closer than the tolerance, int32 [count].
        drafts: of the first source. others: of further sources, in their order.
    """

    index: int
    id: str
    domain: str
    max_new_tokens: int
    prompt_tokens: Ints
    output_tokens: Ints
    prefill_top_tokens: Ints
    prefill_top_log_probabilities: Floats
    prefill_entropy: float
    near_ties: Ints
    drafts: DraftTable
    features: dict[Feature, Floats] = field(default_factory=dict)
    others: tuple[DraftTable, ...] = ()

    @property
    def sources(self) -> tuple[DraftTable, ...]:
        """The drafts of every source."""
        return (self.drafts, *self.others)

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_tokens)

    @property
    def output_length(self) -> int:
        return len(self.output_tokens)

    @property
    def decided_by_steps(self) -> int:
        """Tokens that steps yield: all but the first, which prefill decides."""
        return self.output_length - 1

    def most_verified(self, position: int) -> int:
        """Drafted tokens that may be verified at a position: a step yields one token more than it verifies."""
        return self.max_new_tokens - position - 1


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The steps that decided one output.

    Attributes:
        tokens: that the steps yielded; the one that prefill decides is not among them.
        position, block_size, draft_length, verify_length, num_accepted, source: of each step, int32 [steps].
        draft_size: anchor and positions that the drafter computed, which is what a draft costs; 0 where it did not
            draft. By default that of chains.
        features: whether features of the drafter's distributions were wanted.
    """

    tokens: int
    position: Ints
    block_size: Ints
    draft_length: Ints
    verify_length: Ints
    num_accepted: Ints
    source: Ints = None  # type: ignore[assignment]
    draft_size: Ints = None  # type: ignore[assignment]
    features: bool = False

    def __post_init__(self) -> None:
        if self.source is None:
            object.__setattr__(self, "source", self.block_size * 0)
        if self.draft_size is None:
            object.__setattr__(self, "draft_size", self.draft_length + (self.draft_length > 0))

    @property
    def steps(self) -> int:
        """Turns of the loop."""
        return len(self.position)
