"""The records that pass between runtime, drafters and policies. Nothing here imports torch at run time.

Every tensor carries a leading batch axis: row *i* is request *i*. Terms (one meaning each):

- *anchor*: the last token already decided; the target has not seen it yet.
- *block_size*: positions in a draft block including the anchor; 1 means no drafting.
- *draft_length*: proposed tokens, `block_size - 1` or fewer.
- *num_accepted*: 0 .. draft_length, without the last token of the step.
- *acceptance_length*: `num_accepted + 1`, the tokens that a step yields.
- *node*: one drafted token of a tree; a draft without branches is a chain, and `num_accepted` is a depth in both.
- *source*: where a draft comes from, one of the decoder's drafters, by its place among them, from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Feature(StrEnum):
    """What a policy may ask for in `wants`. Nothing that no policy wants is computed."""

    PREFILL_HIDDEN = "prefill_hidden"
    """Final-norm hidden state of the last prompt token: float [batch, hidden]. Given to `begin`."""
    PREFILL_LOGITS = "prefill_logits"
    """Raw target logits after the last prompt token: float32 [batch, vocab]. Given to `begin`."""
    LAST_HIDDEN = "last_hidden"
    """Final-norm hidden state that predicted the anchor: float [batch, hidden]. Given to `begin` and `select`."""
    TARGET_FEATURES = "target_features"
    """The drafter's `feature_layers` of the target at the same position: float [batch, layers * hidden]. Given to
    `begin` and `select`; only with drafters that read the target's features."""
    ANCHOR_EMBEDDING = "anchor_embedding"
    """The target's embedding of the anchor: float [batch, hidden]. Given to `begin` and `select`."""
    ANCHOR_LOG_PROBABILITY = "anchor_log_probability"
    """Log-probability of the anchor by the raw logits, in nats: float32 [batch]. Given to `begin` and `select`."""
    ANCHOR_ENTROPY = "anchor_entropy"
    """Entropy of that distribution, in nats: float32 [batch]. Given to `begin` and `select`."""
    DRAFT_TOKENS = "draft_tokens"
    """The drafted tokens: int64 [batch, draft_length]. Given to `truncate` and `extend`."""
    DRAFT_PROBABILITY = "draft_probability"
    """The drafter's probability of each drafted token: float32 [batch, draft_length]."""
    DRAFT_ENTROPY = "draft_entropy"
    """Entropy of the drafter's distribution at each position, in nats: float32 [batch, draft_length]."""
    DRAFT_HIDDEN = "draft_hidden"
    """The drafter's last hidden state at each position: float [batch, draft_length, drafter hidden]."""
    SOURCE_OFFER = "source_offer"
    """Tokens that each source would draft now: int64 [batch, sources]. Sources that cost nothing have looked; of others
    it is the most that they can draft. Given to `begin` and `select`."""
    SOURCE_MATCH = "source_match"
    """Tokens of the match that a store's offer comes from, 0 if there is none: int64 [batch, sources]."""
    SOURCE_SHARE = "source_share"
    """Of the occurrences of that match, the share that goes on with the offer's first token: the number of these over
    the number of all plus one, so that few are not sure of much. 1 of sources that do not count, 0 without an offer.
    float64 [batch, sources]. Given to `begin` and `select`."""
    SOURCE_SUPPORT = "source_support"
    """Other free sources whose offers begin with the same token as a free source's: int64 [batch, sources]; 0 of
    sources without an offer. Given to `begin` and `select`."""
    SOURCE_SUCCESS = "source_success"
    """Share of a source's drafted tokens that stood lately, of those that were verified: float64 [batch, sources]. A
    moving average over its steps in this request, each with weight 0.2, from 0.5 on."""


OF_THE_DRAFTED_TOKEN = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY})
"""Features computed from the drafted token itself: under the rejection rule they would bias the output."""

OF_THE_DISTRIBUTION = frozenset({Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY})
"""Features whose computation goes over the drafter's whole vocabulary."""

OF_THE_DRAFT = OF_THE_DRAFTED_TOKEN | OF_THE_DISTRIBUTION | {Feature.DRAFT_HIDDEN}
"""Features of drafted tokens, which only `truncate` and `extend` are given."""

OF_THE_SOURCES = frozenset(
    {
        Feature.SOURCE_OFFER,
        Feature.SOURCE_MATCH,
        Feature.SOURCE_SHARE,
        Feature.SOURCE_SUPPORT,
        Feature.SOURCE_SUCCESS,
    }
)
"""What is known of each source before a draft, in every decoder, of one source or of several."""

OF_OFFERS = OF_THE_SOURCES - {Feature.SOURCE_SUCCESS}
"""What is known of a source by asking what it would draft."""

OF_THE_TARGET = frozenset(Feature) - OF_THE_DRAFT - OF_THE_SOURCES - {Feature.TARGET_FEATURES}
"""Features that every target provides. `target_features` are there with drafters that have feature layers."""

OF_PREFILL = frozenset({Feature.PREFILL_HIDDEN, Feature.PREFILL_LOGITS})
"""Features that only `begin` is given."""

OF_THE_ANCHOR = frozenset({Feature.ANCHOR_LOG_PROBABILITY, Feature.ANCHOR_ENTROPY})
"""Features of the token that was decided last and of its distribution."""

ON_THE_HOST = OF_THE_DRAFTED_TOKEN | OF_THE_DISTRIBUTION | OF_THE_ANCHOR | OF_THE_SOURCES
"""Features that are a number for each token. Methods that decide get them on the host, where counts are too; vectors
(hidden states, embeddings, logits) stay on the decoder's device, for `Policy.predict`."""

BLOCK_DIFFUSION, AUTOREGRESSIVE, NGRAM = "block-diffusion", "autoregressive", "n-gram"
EARLY_EXIT = "early-exit"
"""Kinds of the built-in drafters: labels for people and files. What a kind costs says its `DraftWork`."""


@dataclass(frozen=True, slots=True)
class DraftWork:
    """What a drafter does for a draft, in counts alone: replay and oracles price drafts by it that were never made.

    Positions that were decided wait for the drafter until its next draft, which reads them first.

    Attributes:
        reads: what it reads of decided positions: the target's `features` of every one; the `tokens`, of which it has
            read those that it drafted itself, all but the last; or `nothing`.
        passes: of its model for a draft: `one` for the whole block, one for `each` token, after which a policy may end
            the draft (`extend`), or `none`.
    """

    reads: Literal["features", "tokens", "nothing"]
    passes: Literal["one", "each", "none"]

    @property
    def waits(self) -> bool:
        """Whether decided positions wait while nothing is drafted."""
        return self.reads != "nothing"

    @property
    def free(self) -> bool:
        """Whether its drafts cost next to nothing, so that it is asked what it has before a policy selects."""
        return self.reads == "nothing" and self.passes == "none"

    @property
    def may_end_early(self) -> bool:
        """Whether a policy's `extend` is asked after each token."""
        return self.passes == "each"

    def first(self, prompt_length: int) -> int:
        """Positions that the first draft reads: the prompt, and the anchor where tokens are read."""
        if self.reads == "nothing":
            return 0
        return prompt_length + (self.reads == "tokens")

    def after_draft(self, draft_length: int, num_accepted: int) -> int:
        """Positions that wait after a step that drafted `draft_length` tokens."""
        if self.reads == "features":
            return num_accepted + 1
        if self.reads == "tokens":  # it lacks the anchor, and its last drafted token if that stands
            return 2 if num_accepted == draft_length else 1
        return 0

    def after_no_draft(self, waiting: int, yielded: int = 1) -> int:
        """Positions that wait after a step in which this drafter did not draft, before which `waiting` did.

        Args:
            yielded: tokens of the step: 1 at block size 1, perhaps more where another source drafted.
        """
        return waiting + yielded if self.waits else 0


_WORK = {
    BLOCK_DIFFUSION: DraftWork("features", "one"),
    AUTOREGRESSIVE: DraftWork("tokens", "each"),
    NGRAM: DraftWork("nothing", "none"),
    EARLY_EXIT: DraftWork("tokens", "each"),
}
_OF_THE_KIND = DraftWork("nothing", "none")
"""Stands for what `work_of` says of the kind."""


def work_of(kind: str) -> DraftWork:
    """The work of a built-in kind of drafters. Raises ValueError for another kind, whose costs nobody has told."""
    try:
        return _WORK[kind]
    except KeyError:
        raise ValueError(
            f"what drafts of kind {kind!r} cost is not known: give the drafter an attribute "
            "`work = DraftWork(reads=..., passes=...)` (bpkit.types)"
        ) from None


class FeatureNotWanted(KeyError):
    """A policy read a feature that it did not declare."""

    def __str__(self) -> str:
        return str(self.args[0])


def _lookup(features: Mapping[Feature, Tensor], name: Feature | str) -> Tensor:
    try:
        return features[Feature(name)]
    except ValueError:
        known = ", ".join(Feature)
        raise FeatureNotWanted(f"there is no feature {name!r}; the features are: {known}") from None
    except KeyError:
        raise FeatureNotWanted(
            f"feature {str(name)!r} is not here: add it to the policy's `wants`, and read draft features in "
            "`truncate` or `extend`, prefill features in `begin`"
        ) from None


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What a policy learns about one source of drafts.

    Attributes:
        drafter: name or path. kind: its label.
        trained_block_size, max_block_size, work, branches: as in `DecoderSpec`.
    """

    drafter: str
    kind: str
    trained_block_size: int
    max_block_size: int
    work: DraftWork
    branches: int = 1

    def draft_size(self, block_size: int) -> int:
        """Anchor and positions, one after the other, that a draft of such a size computes, which is what it costs."""
        return block_size if self.branches == 1 else min(block_size, self.trained_block_size)


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """What a policy learns about the decoder in `bind`.

    Where there are several sources of drafts, what is said of *the* drafter is said of the first, source 0, which is
    where drafts of policies come from that name no source.

    Attributes:
        target: name or path, for messages and compatibility checks.
        drafter: the same of the drafter.
        drafter_kind: the drafter's label, `block-diffusion`, `autoregressive`, `n-gram` or another.
        trained_block_size: the block size the drafter was trained with, or its default where it has none.
        max_block_size: the largest block size that the runtime will use.
        hidden_size: of the target.
        vocab_size: of the target.
        verify_rule: `coupled` or `rejection`.
        device: of the decoder, as torch writes it; networks of a policy belong there.
        stateful: whether the target has recurrent states, so that it reads accepted tokens again after a rejection.
        work: what the drafter does for a draft; needed for kinds that are not built in.
        others: further sources of drafts, in their order, from source 1 on.
        branches: the most tokens that may follow one in a draft; 1 where drafts are chains. A tree of `block_size - 1`
            nodes is at most `trained_block_size - 1` deep.

    Raises:
        ValueError: `work` was left out and the kind is not built in.
    """

    target: str
    drafter: str
    drafter_kind: str
    trained_block_size: int
    max_block_size: int
    hidden_size: int
    vocab_size: int
    verify_rule: str = "coupled"
    device: str = "cpu"
    stateful: bool = False
    work: DraftWork = _OF_THE_KIND
    others: tuple[SourceSpec, ...] = ()
    branches: int = 1

    def __post_init__(self) -> None:
        if self.work is _OF_THE_KIND:
            object.__setattr__(self, "work", work_of(self.drafter_kind))

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """All sources of drafts."""
        sizes = self.trained_block_size, self.max_block_size
        return (SourceSpec(self.drafter, self.drafter_kind, *sizes, self.work, self.branches), *self.others)

    def with_branches(self, branches: int) -> DecoderSpec:
        """The same decoder with at most so many branches; 1 is chains, of the sizes that a tree may be deep."""
        first, *others = (
            source
            if source.branches <= branches
            else replace(source, branches=branches, max_block_size=branches * source.trained_block_size)
            for source in self.sources
        )
        return replace(self, branches=first.branches, max_block_size=first.max_block_size, others=tuple(others))


@dataclass(frozen=True, slots=True)
class SourceWork:
    """What one source did in a step; as in `Work`."""

    source: int
    draft_size: int
    waiting: int
    drafted: int
    features: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What a step did, as far as it costs time.

    Rows share passes that are as wide as the widest of them, so the first five counts are those of the widest row.

    Attributes:
        draft_size: 0 if nothing was drafted, else the tokens that were drafted plus one.
        waiting: positions that the drafter had to read before it drafted; 0 if nothing was drafted.
        verify_width: positions that the target verified, anchor included.
        context_length: prompt and output tokens before the step.
        reread: tokens that a stateful target read once more, because a rejection had taken it back to before them.
        features: whether the policy wanted features that are computed from the drafter's distributions.
        rows: that ran.
        drafted: draft sizes of all rows together, without padding.
        verified: positions that the target verified of all rows together, without padding.
        source: that drafted; where several did in one step, the first of them. What is said of the draft is of its own.
        others: of the other sources that drafted in this step, for other rows.
    """

    draft_size: int
    waiting: int
    verify_width: int
    context_length: int
    features: bool = False
    reread: int = 0
    rows: int = 1
    drafted: int = 0
    verified: int = 0
    source: int = 0
    others: tuple[SourceWork, ...] = ()

    def __post_init__(self) -> None:
        if self.rows == 1:
            object.__setattr__(self, "drafted", self.draft_size)
            object.__setattr__(self, "verified", self.verify_width)

    @property
    def drafts(self) -> tuple[SourceWork, ...]:
        """Of each source that drafted."""
        if not self.draft_size:
            return ()
        own = SourceWork(self.source, self.draft_size, self.waiting, self.drafted, self.features)
        return (own, *self.others)


PHASES = ("draft", "catch_up", "features", "verify", "rest", "prefill")
"""What a cost model prices: the parts of a step, and reading prompts."""


class CostModel(Protocol):
    """Seconds that each phase of a step takes on some device."""

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        """Cost of one of `PHASES` at a context length (prompt and output tokens before the step).

        `draft` goes by block size, with one position waiting; `catch_up` is what a draft takes longer by the number
        of waiting positions; `features` is what probabilities and entropies of a draft take, by block size; `verify`
        goes by verified positions, anchor included; `rest` is all else in a step, its size is 1; `prefill` is a pass of
        the target that reads prompts, by their tokens in it, of all rows together. Only where time under load is
        simulated is a cost model asked for that.
        """
        ...


def of_source(cost: CostModel, source: int) -> CostModel:
    """What steps cost whose drafts come from a source: the model itself for source 0, else what its `of_source` gives.

    Raises:
        ValueError: the cost model prices one source only; or it has no figures for this one.
    """
    if source == 0:
        return cost
    other: Callable[[int], CostModel] | None = getattr(cost, "of_source", None)
    if other is None:
        raise ValueError(
            f"cost model {type(cost).__name__} prices drafts of source 0 only, and source {source} was asked for: give "
            "it a method of_source(source), or measure it with `bpkit calibrate` and the same drafters"
        )
    return other(source)


class BatchCostModel(CostModel, Protocol):
    """A cost model that prices steps of several rows, too."""

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        """Cost of one of `PHASES` for all rows of a step together; for one row what `seconds` says.

        Rows share passes that are as large as the largest of them.

        Args:
            size, context_length: as in `seconds`, of the widest and of the longest row.
            rows: that run.
            positions: of all rows, without padding: draft sizes for `draft`, verified positions for `verify`. Other
                phases do not look at it, and `prefill` not at `rows` either.
        """
        ...


@dataclass(slots=True)
class Context:
    """What is known before a draft. Counts are on the host; see `ON_THE_HOST` for where features are.

    Attributes:
        position: output tokens decided so far, int64 [batch]; 1 in `begin`, since prefill decides the first.
        remaining: tokens that may still be generated, int64 [batch].
        context_length: prompt and output tokens so far, int64 [batch].
        generator: the policy's own random numbers (never the token noise), a CPU generator.
        predictions: what `Policy.predict` made of the features, on the host; None where it was not asked.
        row_ids: a number for each row that stays its own while it runs; no two requests of a decoder share one.
        running: rows that run now; in `begin` those that run already count, too. By default the rows of this context.
    """

    spec: DecoderSpec
    position: Tensor
    remaining: Tensor
    context_length: Tensor
    generator: torch.Generator
    features: Mapping[Feature, Tensor] = field(default_factory=dict)
    predictions: Mapping[str, Tensor] | None = None
    row_ids: tuple[int, ...] = ()
    running: int = 0

    def __post_init__(self) -> None:
        self.running = self.running or self.batch_size

    @property
    def batch_size(self) -> int:
        return int(self.position.shape[0])

    def full(self, value: int) -> Tensor:
        """`value` for every row: int64 [batch], on the host."""
        return self.position.new_full((self.batch_size,), value)

    def __getitem__(self, name: Feature | str) -> Tensor:
        """A wanted feature by name. Raises FeatureNotWanted."""
        return _lookup(self.features, name)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `select` may return: beside sizes the sources, where there are several, and trees, where these are drafted.

    Attributes:
        block_size: of the next draft, anchor included, int64 [batch]; 1 is no draft.
        source: that drafts, int64 [batch].
        parents: of trees to draft the node that each follows, by its place, which is before its own; -1 is the anchor.
            int64 [batch, nodes], of which the first `block_size - 1` of a row count; None where the drafter chooses.
        ranks: which of the candidates after its parent each node is, 0 the best, below `SourceSpec.branches`; int64
            alike, and None where `parents` is.

    No two children of a node have one rank, and no path is longer than `trained_block_size - 1`. A source that drafts
    chains is asked for the chain of the best: parents -1, 0, 1, ... and ranks 0.
    """

    block_size: Tensor
    source: Tensor
    parents: Tensor | None = None
    ranks: Tensor | None = None


@dataclass(slots=True)
class Draft:
    """What the drafter proposed. Counts are on the host; see `ON_THE_HOST` for where features are.

    Attributes:
        block_size: as selected, int64 [batch].
        draft_length: proposed tokens, int64 [batch]; at most `block_size - 1`.
        tokens: int64 [batch, width], for the runtime; a policy asks for them through `wants`.
        logits: the drafter's scores after logits processors, float32 [batch, width, vocab], or None for
            drafters that have no distribution. For the runtime.
        predictions: what `Policy.predict` made of the features, each [batch, width, ...], on the host; None where it
            was not asked.
        read: decided positions that sources read before they drafted, by source, for the runtime.
        source: that was asked, int64 [batch]; by default source 0. Features that a row's source does not have are NaN.
        parents: of a tree the token that each follows, by its place in the draft, which is before its own; -1 is the
            anchor. int64 [batch, draft_length]; None where drafts are chains. Tokens of a tree are ordered best first,
            or as the `Plan` has them, without those that are ruled out.
        chances: of a tree, that each token is the target's where its parent stands, as far as the drafter can tell:
            by its scores and, at temperatures above 0, the noise that it shares with the target. Float32
            [batch, draft_length], not calibrated; NaN of sources that draft chains; None where all drafts are chains.
        nodes: which of a tree are verified, for the runtime.
        whole: the draft before it was cut to them, for the runtime; None where nobody wants to know.
        positions: anchor and positions that the drafter computed for each row, for the runtime.
    """

    context: Context
    block_size: Tensor
    draft_length: Tensor
    tokens: Tensor
    logits: Tensor | None = None
    features: Mapping[Feature, Tensor] = field(default_factory=dict)
    predictions: Mapping[str, Tensor] | None = None
    read: Mapping[int, int] = field(default_factory=dict)
    source: Tensor = None  # type: ignore[assignment]
    parents: Tensor | None = None
    chances: Tensor | None = None
    nodes: Any = None
    whole: Draft | None = None
    positions: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.source is None:
            self.source = self.block_size * 0

    def full(self, value: int) -> Tensor:
        """`value` for every row: int64 [batch]."""
        return self.context.full(value)

    def first(self, count: int) -> Draft:
        """The draft as it was after `count` tokens."""

        def cut(values: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
            return {name: value[:, :count] for name, value in values.items()}

        return replace(
            self,
            draft_length=self.draft_length.clamp(max=count),
            tokens=self.tokens[:, :count],
            logits=None if self.logits is None else self.logits[:, :count],
            features=cut(self.features),
            predictions=None if self.predictions is None else cut(self.predictions),
            parents=None if self.parents is None else self.parents[:, :count],
            chances=None if self.chances is None else self.chances[:, :count],
        )

    def __getitem__(self, name: Feature | str) -> Tensor:
        """A wanted feature by name. Raises FeatureNotWanted."""
        return _lookup(self.features, name)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of a step went, on the decoder's clock. `rest` is what lies outside the three phases."""

    draft: float = 0.0
    verify: float = 0.0
    policy: float = 0.0
    rest: float = 0.0

    @property
    def total(self) -> float:
        return self.draft + self.verify + self.policy + self.rest

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.draft + other.draft, self.verify + other.verify, self.policy + other.policy, self.rest + other.rest
        )


@dataclass(frozen=True, slots=True)
class Prefill:
    """The first record of rows that begin together: their prompts were read and the first token of each decided.

    Attributes:
        tokens: int64 [batch, 1].
        near_ties: of each row, 1 if the token's top-2 gap was below tolerance.
        row_ids: as in `Context`.
        stopped: whether each row ended.
    """

    tokens: Tensor
    seconds: Seconds
    near_ties: tuple[int, ...] = ()
    row_ids: tuple[int, ...] = ()
    stopped: tuple[bool, ...] = ()

    def row(self, place: int) -> Prefill:
        """The record of one row, of whom the time is all rows'."""
        if len(self.row_ids) <= 1:
            return self
        return Prefill(self.tokens[place : place + 1], self.seconds, *_of_row(self, place))


@dataclass(frozen=True, slots=True)
class StepTree:
    """The tree that was drafted in a step, on the host. What lies behind a row's `draft_length` is padding.

    Attributes:
        tokens: int64 [batch, nodes].
        parents, chances: as in `Draft`, [batch, nodes].
        verified: which of them were, bool [batch, nodes].
    """

    tokens: Tensor
    parents: Tensor
    chances: Tensor
    verified: Tensor

    def row(self, place: int) -> StepTree:
        """That of one row."""
        at = slice(place, place + 1)
        return StepTree(self.tokens[at], self.parents[at], self.chances[at], self.verified[at])


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the loop, on the host.

    Attributes:
        block_size: as used, int64 [batch].
        draft_length: tokens the drafter proposed, int64 [batch].
        verify_length: drafted tokens that were verified after truncation, int64 [batch].
        num_accepted: drafted tokens that stand, without the step's last token, int64 [batch].
        tokens: what the step yields, int64 [batch, width]: of each row `num_accepted + 1`, and padding behind them.
        position: output index of the first of `tokens`, int64 [batch].
        seconds: of all rows together, on the decoder's clock.
        fallbacks: policy faults that the runtime mended in this step.
        near_ties: of each row, yielded positions whose top-2 gap was below tolerance.
        row_ids: as in `Context`.
        stopped: whether each row ended.
        source: that drafted, int64 [batch]; 0 at block size 1. By default source 0.
        offer_agreed: where the policy wants to know what sources offer: of each free source's offer before the step,
            whether it was asked or not, the tokens from the first on that the step yields as well; -1 of other
            sources. int64 [batch, sources], else None.
        path: of drafts that are trees the tokens that stand, by their places in the draft: int64 [batch, width], of
            each row `num_accepted`, and -1 behind them. None where drafts are chains.
        tree: what was drafted, where drafts are trees and an observer `wants_trees`; else None.
    """

    block_size: Tensor
    draft_length: Tensor
    verify_length: Tensor
    num_accepted: Tensor
    tokens: Tensor
    position: Tensor
    seconds: Seconds
    fallbacks: int = 0
    near_ties: tuple[int, ...] = ()
    row_ids: tuple[int, ...] = ()
    stopped: tuple[bool, ...] = ()
    source: Tensor = None  # type: ignore[assignment]
    offer_agreed: Tensor | None = None
    path: Tensor | None = None
    tree: StepTree | None = None

    def __post_init__(self) -> None:
        if self.source is None:
            object.__setattr__(self, "source", self.block_size * 0)

    def clone(self) -> Step:
        """A copy with tensors of its own."""
        agreed = None if self.offer_agreed is None else self.offer_agreed.clone()
        path = None if self.path is None else self.path.clone()
        own = {name: getattr(self, name).clone() for name in _COUNTS}
        return replace(self, tokens=self.tokens.clone(), offer_agreed=agreed, path=path, **own)

    def row(self, place: int) -> Step:
        """The record of one row, of whom the time and the faults are all rows'."""
        if len(self.row_ids) <= 1:
            return self
        at = slice(place, place + 1)
        counts = {name: getattr(self, name)[at] for name in _COUNTS}
        tokens = self.tokens[at, : int(self.num_accepted[place]) + 1]
        near_ties, row_ids, stopped = _of_row(self, place)
        return Step(
            **counts,
            tokens=tokens,
            seconds=self.seconds,
            fallbacks=self.fallbacks,
            near_ties=near_ties,
            row_ids=row_ids,
            stopped=stopped,
            offer_agreed=None if self.offer_agreed is None else self.offer_agreed[at],
            path=None if self.path is None else self.path[at, : int(self.num_accepted[place])],
            tree=None if self.tree is None else self.tree.row(place),
        )

    @property
    def acceptance_length(self) -> Tensor:
        """Tokens that the step yields: `num_accepted + 1`, int64 [batch]."""
        return self.num_accepted + 1


_COUNTS = ("block_size", "draft_length", "verify_length", "num_accepted", "position", "source")

Record = Prefill | Step


def _of_row(record: Record, place: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    at = slice(place, place + 1)
    return record.near_ties[at], record.row_ids[at], record.stopped[at]
