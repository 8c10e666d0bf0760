"""What looks everything up in a trace, in the places of the models that the loop expects, for one row or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.decode.drafter import GoOn, Offer, Proposal
from bpkit.decode.reread import Rereading
from bpkit.decode.sampling import Draw
from bpkit.decode.target import TargetOutput
from bpkit.decode.text import RowText, RunningText, counts, padded
from bpkit.decode.trees import Shapes, Tree, wanted_trees
from bpkit.decode.verify import Verdict
from bpkit.draft.block_diffusion import grown
from bpkit.draft.grown_tree import were_read
from bpkit.trace.records import CandidateTable, DraftTable, PromptTrace
from bpkit.trace.store.manifest import TraceError
from bpkit.types import OF_PREFILL, Draft, Feature, SourceSpec


class TracedPrompts:
    """Prompts of one trace, whose tables lie one behind the other, so that rows of different prompts share a lookup.

    Args:
        prompts: of one trace, one or more.
        wants: features that lookups give, as far as the prompts hold them.
    """

    def __init__(self, prompts: Sequence[PromptTrace], wants: frozenset[Feature]) -> None:
        self.prompts, self.wants = list(prompts), wants
        lengths = [prompt.output_length for prompt in prompts]
        self.starts = [0, *np.cumsum(lengths)[:-1].tolist()]
        self.sources = [TracedDrafts(tables) for tables in zip(*(p.sources for p in prompts), strict=True)]
        self.output = _joined([prompt.output_tokens for prompt in prompts]).astype(np.int64)
        self.of_positions = {name for name in wants - OF_PREFILL if name in prompts[0].features}
        self.of_prefill = {name for name in wants & OF_PREFILL if name in prompts[0].features}

    def text(self, place: int) -> TracedText:
        """The text of a request for the prompt at this place, before prefill."""
        return TracedText(self.prompts[place], self.starts[place], self.starts[place] - place)


class TracedText(RowText):
    """A request's text that knows its prompt's places in `TracedPrompts`.

    Attributes:
        traced: the prompt.
        output_at: row of the joined outputs that output token 0 has.
        drafts_at: row of the joined draft tables that position 0 would have, which has no drafts.
    """

    def __init__(self, prompt: PromptTrace, output_at: int, drafts_at: int) -> None:
        tokens = prompt.prompt_tokens.tolist()
        super().__init__(torch.tensor([tokens]), prompt.prompt_length + prompt.max_new_tokens, tokens=tokens)
        self.traced, self.output_at, self.drafts_at = prompt, output_at, drafts_at - 1

    def cut(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """As `OutputEnd`: where the output in the trace ends."""
        return len(tokens), self.position + len(tokens) == self.traced.output_length


class TracedDrafts:
    """The draft tables of several prompts and one source, one behind the other."""

    def __init__(self, tables: Sequence[DraftTable]) -> None:
        self.tables = tables
        self.columns = {size: column for column, size in enumerate(tables[0].block_sizes.tolist())}
        self.draft_length = _joined([table.draft_length for table in tables])
        self.num_accepted = _joined([table.num_accepted for table in tables])

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """int32 [rows, sizes, width]."""
        return _joined([table.tokens for table in self.tables])

    @cached_property
    def features(self) -> dict[Feature, NDArray[np.float32]]:
        """Each [rows, sizes, width, ...]."""
        return {name: _joined([table.features[name] for table in self.tables]) for name in self.tables[0].features}

    @cached_property
    def candidates(self) -> CandidateTable | None:
        """As of one prompt."""
        found = [table.candidates for table in self.tables if table.candidates is not None and table.rows]
        if not found:
            return None
        return CandidateTable(
            *(_joined([getattr(table, field.name) for table in found]) for field in fields(CandidateTable))
        )

    @cached_property
    def nodes(self) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
        """Parents and chances of trees that were traced as such, each [rows, sizes, width]."""
        found = [(table.parents, table.chances) for table in self.tables]
        if any(parents is None for parents, _ in found):
            return None
        parents, chances = zip(*found, strict=True)
        return _joined(parents), _joined(chances)

    @cached_property
    def matches(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Length of the match and its share: [rows] each; 0 and 1 where the trace does not hold them."""
        rows = len(self.draft_length)
        known = self.tables[0]
        length = None if known.match_length is None else _joined([_there(table.match_length) for table in self.tables])
        share = None if known.match_share is None else _joined([_there(table.match_share) for table in self.tables])
        return np.zeros(rows, np.int32) if length is None else length, np.ones(rows) if share is None else share

    def column(self, block_size: int) -> int:
        """Index of a block size. Raises TraceError if it was not traced."""
        try:
            return self.columns[block_size]
        except KeyError:
            sizes = [*self.columns]
            raise TraceError(
                f"block size {block_size} was asked for, but the trace has 1+{'+'.join(map(str, sizes))}: trace with "
                f"`--block-sizes 2-{max(sizes)}` so that there are no gaps, or restrict the policy's sizes"
            ) from None


class TracedTarget:
    """A `TargetSession` without a model. It has no logits; `TracedRule` knows what they decided."""

    positions: int | None = None

    def __init__(self, prompts: TracedPrompts, text: RunningText, *, stateful: bool) -> None:
        self.prompts, self.text = prompts, text
        self.rereading = [Rereading() for _ in text.rows] if stateful else None
        self.reread = 0

    @property
    def held(self) -> list[int]:
        return [row.length - 1 for row in self.text.rows]

    def prefill(self, tokens: Tensor, counts: Sequence[int], *, last: bool, **inputs: Any) -> TargetOutput:
        rows = _texts(self.text)
        known = self._known([0] * len(rows), 1)
        for name in self.prompts.of_prefill:
            known[name] = torch.stack([torch.tensor(row.traced.features[name]) for row in rows])[:, None]
        return TargetOutput(_nothing(len(rows)), None, None, known)

    def verify(self, tokens: Tensor, counts: Sequence[int]) -> TargetOutput:
        if self.rereading is not None:
            for row, width in zip(self.rereading, counts, strict=True):
                row.verify(width)
            self.reread = max(row.reread for row in self.rereading)
        return TargetOutput(_nothing(len(counts)), None, None, self._known(self.text.position, max(counts)))

    def verify_trees(self, tokens: Tensor, tree: Tree) -> TargetOutput:
        known = self._known(self.text.position, tree.deepest + 1)
        return TargetOutput(_nothing(len(tokens)), None, None, known)

    def accept(self, counts: Sequence[int], columns: Sequence[Sequence[int]]) -> None:
        """What is held goes by the text."""

    def _known(self, first: Sequence[int], width: int) -> dict[Feature, Tensor]:
        """Features of so many positions of each row from its first on; zeros beyond an output."""
        rows = [*zip(_texts(self.text), first, strict=True)]
        return {
            name: padded([torch.tensor(row.traced.features[name][at : at + width])[None] for row, at in rows])
            for name in self.prompts.of_positions
        }

    def rollback(self, counts: Sequence[int]) -> None:
        for row, count in zip(self.rereading or (), counts, strict=bool(self.rereading)):
            row.reject(count)

    def keep(self, rows: Sequence[int]) -> None:
        if self.rereading is not None:
            self.rereading = [self.rereading[row] for row in rows]

    def join(self, other: TracedTarget) -> None:
        if self.rereading is not None and other.rereading is not None:
            self.rereading += other.rereading

    def embed(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError("a trace knows its features and embeds nothing")

    def cache(self, row: int) -> None:
        """There is none."""


class TracedDrafter:
    """A `DrafterSession` without a model, that reads what a real one with such `work` would read."""

    def __init__(self, drafts: TracedDrafts, source: SourceSpec, wants: frozenset[Feature], text: RunningText) -> None:
        self.drafts, self.source, self.work, self.text = drafts, source, source.work, text
        self.features = {name: value for name, value in drafts.features.items() if name in wants} if wants else {}
        self.waiting: list[int] = []
        """Positions that the next draft reads, of each row; none until prefill has decided the first tokens."""
        self.lengths: list[int | None] = [None] * len(text.rows)
        """Tokens of each row's draft since the last advance; None where it did not draft."""
        self.tree: Proposal | None = None
        """The last draft, if the drafter has read nodes of it."""

    def advance(self, features: Sequence[Tensor] | None) -> None:
        rows, work = self.text.rows, self.work
        if not self.waiting:
            self.waiting = [work.first(row.prompt_length) for row in rows]
        else:
            self.waiting = [
                work.after_no_draft(waiting, yielded) if length is None else self._after_draft(row, length, yielded)
                for row, (waiting, length, yielded) in enumerate(
                    zip(self.waiting, self.lengths, self.text.counts, strict=True)
                )
            ]
        self.lengths, self.tree = [None] * len(rows), None

    def _after_draft(self, row: int, length: int, yielded: int) -> int:
        """Positions of a row that wait after a draft of it, of which so many tokens but one stand."""
        if self.tree is None or self.tree.parents is None:
            return self.work.after_draft(length, yielded - 1)
        parents, levels = self.tree.parents[row, :length].tolist(), self.tree.draft_sizes[row] - 1
        nodes = enumerate(zip(parents, self.tree.tokens[row].tolist(), strict=False))
        read = were_read(parents, self.source.branches, levels)
        children = {named: node for node, named in nodes if read[node]}
        path = [-1]
        for token in self.text.rows[row].newest[:-1]:
            if (path[-1], token) not in children:
                break
            path.append(children[path[-1], token])
        return yielded - len(path) + 1

    def offer(self, most: int) -> list[Offer]:
        match, share = self.drafts.matches
        return [Offer(self._best_path(at), int(match[at]), float(share[at])) for at in _at(self.text)]

    def _best_path(self, at: int) -> list[int]:
        """Tokens of the largest draft; of a tree, of each node the first child."""
        length, tokens = self.drafts.draft_length[at, -1], self.drafts.tokens[at, -1]
        if self.drafts.nodes is None:
            return cast("list[int]", tokens[:length].tolist())
        path = [-1]
        for node, parent in enumerate(self.drafts.nodes[0][at, -1, :length].tolist()):
            if parent == path[-1]:
                path.append(node)
        return [int(tokens[node]) for node in path[1:]]

    def draft(
        self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None, shapes: Shapes | None = None
    ) -> Proposal:
        at = _at(self.text)
        if self.source.branches > 1 and self.drafts.candidates is not None:
            whole = self._tree(self.drafts.candidates, at, block_size, shapes)
            self._drafted(whole.counts, block_size)
            return whole
        if shapes is not None:
            raise TraceError(
                f"the policy says which trees {self.source.drafter} is to draft, and its traces hold those that it "
                "chooses itself: measure that live, with `bpkit bench`"
            )
        columns = [self.drafts.column(size) if size > 1 else 0 for size in block_size]
        lengths = self.drafts.draft_length[at, columns].tolist()
        lengths = [length if size > 1 else 0 for length, size in zip(lengths, block_size, strict=True)]
        read = max(self.waiting, default=0)
        whole = self._proposal(at, columns, lengths, read)
        if go_on is not None and self.work.may_end_early and self.drafts.nodes is None:
            lengths = self._ended(whole, lengths, go_on)
            whole = self._proposal(at, columns, lengths, read)
        self._drafted(lengths, block_size)
        self.tree = whole if self.drafts.nodes is not None and self.work.reads == "tokens" else None
        return whole

    def _drafted(self, lengths: Sequence[int], block_size: Sequence[int]) -> None:
        """Note how long the drafts of rows are; those that do not draft are read along."""
        self.waiting = [0] * len(lengths)
        self.lengths = [length if size > 1 else None for length, size in zip(lengths, block_size, strict=True)]

    def _tree(
        self, candidates: CandidateTable, at: Sequence[int], block_size: Sequence[int], shapes: Shapes | None
    ) -> Proposal:
        """Trees of candidates, as the drafter makes them."""
        wanted, sizes = wanted_trees(block_size, shapes, self.source.trained_block_size)
        columns = [self.drafts.column(size) if size > 1 else 0 for size in sizes]
        tokens, chances, probabilities = (
            torch.from_numpy(table[at, columns, : max(sizes) - 1, : self.source.branches])
            for table in (candidates.tokens, candidates.chances, candidates.probabilities)
        )
        tokens = tokens.long()
        block = Proposal(tokens, None, None, [], max(self.waiting, default=0))
        made = grown(tokens, chances, [size - 1 for size in sizes], wanted, block)
        return replace(made, features=self._of_nodes(made, tokens, probabilities, at, columns))

    def _of_nodes(
        self, made: Proposal, tokens: Tensor, probabilities: Tensor, at: Sequence[int], columns: Sequence[int]
    ) -> dict[Feature, Tensor]:
        """Features of the nodes: of their positions; the probabilities are their own."""
        width = tokens.shape[1]
        features = {
            name: made.of_tokens(torch.from_numpy(value[at, columns, :width])) for name, value in self.features.items()
        }
        if Feature.DRAFT_PROBABILITY in features:
            own = made.of_tokens(tokens) == made.tokens[..., None]
            features[Feature.DRAFT_PROBABILITY] = (made.of_tokens(probabilities) * own).sum(dim=-1)
        real = torch.arange(made.tokens.shape[1]) < torch.tensor(made.counts)[:, None]
        return {Feature.DRAFT_TOKENS: made.tokens, **{name: _masked(value, real) for name, value in features.items()}}

    def _ended(self, whole: Proposal, lengths: Sequence[int], go_on: GoOn) -> list[int]:
        """Lengths of drafts that are made token after token, where a policy may end them."""
        drafted, left = [0] * len(lengths), list(lengths)
        for place in range(max(lengths)):
            now = [int(count > 0) for count in left]
            drafted = [count + more for count, more in zip(drafted, now, strict=True)]
            left = [max(0, count - 1) for count in left]
            if max(left) > 0:
                more = go_on(_one_token(whole, place, now))
                left = [count if goes_on else 0 for count, goes_on in zip(left, more, strict=True)]
            if max(left) == 0:
                break
        return drafted

    def _proposal(self, at: Sequence[int], columns: Sequence[int], lengths: list[int], read: int) -> Proposal:
        width = max(lengths)
        found = torch.from_numpy(self.drafts.tokens[at, columns, :width]).long()
        features = {name: torch.from_numpy(value[at, columns, :width]) for name, value in self.features.items()}
        if min(lengths) < width:  # behind a row's own tokens the tables hold none, or those of another size
            real = torch.arange(width) < torch.tensor(lengths)[:, None]
            found = found.where(real, 0)
            features = {name: _masked(value, real) for name, value in features.items()}
        return Proposal(
            found,
            None,
            None,
            lengths,
            read,
            {Feature.DRAFT_TOKENS: found, **features},
            **self._nodes(at, columns, lengths),
        )

    def _nodes(self, at: Sequence[int], columns: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
        """Of traced trees what proposals have beside tokens; nothing of chains."""
        if self.drafts.nodes is None:
            return {}
        width, sizes = max(lengths), self.drafts.tables[0].block_sizes
        # A store looks no further than it finds something; a model computes what it was asked for.
        drafted = [length + 1 for length in lengths] if self.work.free else sizes[columns].tolist()
        parents, chances = (torch.from_numpy(table[at, columns, :width]) for table in self.drafts.nodes)
        return {
            "parents": parents.long(),
            "chances": chances,
            "places": torch.arange(width).expand(len(at), width),
            "positions": [self.source.draft_size(size) for size in drafted],
        }

    def keep(self, rows: Sequence[int]) -> None:
        self.waiting = [self.waiting[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: TracedDrafter) -> None:
        self.waiting += other.waiting
        self.lengths += other.lengths


class TracedRule:
    """A `VerifyRule` that knows which drafted tokens stand."""

    def __init__(self, prompts: TracedPrompts, text: RunningText) -> None:
        self.prompts, self.text = prompts, text

    def draw(self, block_size: Sequence[int]) -> Any:
        """Drafts are looked up."""

    def verify(self, logits: Tensor, draft: Draft, width: Sequence[int]) -> Verdict:
        if draft.parents is not None:
            return self._verify_nodes(draft, width)
        return self._verdict(self._accepted(draft, width) if max(width) else [0] * len(width))

    def _verify_nodes(self, draft: Draft, width: Sequence[int]) -> Verdict:
        """Walk down from each anchor, as far as tokens are the output's."""
        tree: Tree | None = draft.nodes.tree
        parents = [range(count) for count in width] if tree is None else tree.parents
        paths = []
        for row, nodes, before in zip(_texts(self.text), draft.tokens.tolist(), parents, strict=True):
            first, last = row.output_at + row.position, row.output_at + row.traced.output_length - 1
            paths.append(_walked(nodes, before, self.prompts.output[first:last].tolist()))
        verdict = self._verdict([len(path) - 1 for path in paths])
        if tree is None:
            return verdict
        most = max(map(len, paths))
        return verdict._replace(path=torch.tensor([path + [0] * (most - len(path)) for path in paths]))

    def _verdict(self, accepted: Sequence[int]) -> Verdict:
        rows, most = _texts(self.text), max(accepted) + 1
        first = [row.output_at + row.position for row in rows]
        if len(first) == 1:
            tokens = torch.tensor(self.prompts.output[first[0] : first[0] + most])[None]
        else:
            places = np.array(first)[:, None] + np.arange(most)
            tokens = torch.from_numpy(self.prompts.output.take(places, mode="clip"))
        return Verdict(tokens, counts(accepted), torch.zeros(tokens.shape, dtype=torch.bool))

    def _accepted(self, draft: Draft, width: Sequence[int]) -> list[int]:
        at, stands = _at(self.text), [0] * len(width)
        asked = zip(draft.source.tolist(), draft.block_size.tolist(), width, strict=True)
        for row, (source, size, count) in enumerate(asked):
            if count:
                drafts = self.prompts.sources[source]
                stands[row] = min(int(drafts.num_accepted[at[row], drafts.column(size)]), count)
        return stands

    def keep(self, rows: Sequence[int]) -> None:
        """The text knows its rows."""

    def join(self, other: TracedRule) -> None:
        """The text knows its rows."""


def _texts(text: RunningText) -> list[TracedText]:
    rows: list[Any] = text.rows
    return rows


def _at(text: RunningText) -> list[int]:
    """Row of the joined draft tables at which each running row is."""
    return [row.drafts_at + row.position for row in _texts(text)]


def _walked(tokens: Sequence[int], parents: Sequence[int], output: Sequence[int]) -> list[int]:
    """Columns of a pass that stand, from the anchor's on.

    Args:
        tokens: of nodes, which are in columns from 1. parents: their columns. output: what comes after the anchor.

    >>> _walked([5, 7, 6, 9], [0, 0, 2, 1], [7, 6, 9])
    [0, 2, 3]
    """
    path = [0]
    for token in output:
        same = [
            column
            for column, (node, before) in enumerate(zip(tokens, parents, strict=False), 1)
            if node == token and before == path[-1]
        ]
        if not same:
            break
        path.append(same[0])
    return path


def _one_token(whole: Proposal, place: int, drafts: list[int]) -> Proposal:
    """The token at one place of a proposal, of the rows that drafted it."""
    features = {name: value[:, place : place + 1] for name, value in (whole.features or {}).items()}
    return Proposal(whole.tokens[:, place : place + 1], None, None, drafts, whole.read, features)


def _masked(value: Tensor, real: Tensor) -> Tensor:
    """Zeros where a feature [rows, width, ...] is of no drafted token."""
    return value.where(real.view(*real.shape, *[1] * (value.ndim - 2)), 0)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _there(value: NDArray[Any] | None) -> NDArray[Any]:
    assert value is not None
    return value


def _nothing(rows: int) -> Tensor:
    """Logits of a pass that makes none."""
    return torch.zeros(1, 1, 1).expand(rows, 1, 1)
