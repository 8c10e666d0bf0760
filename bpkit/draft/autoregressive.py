"""Autoregressive drafting: any causal language model with the target's tokenizer, token after token."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpkit.assets import drafter_path
from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.pretrained import device_of, input_device, inside, move, position_limit
from bpkit.decode.sampling import Draw
from bpkit.decode.serving import served_by, session_class, why_no_trees
from bpkit.decode.stateful import cache_argument
from bpkit.decode.target import TargetOutput, TargetSession
from bpkit.decode.text import RunningText
from bpkit.decode.trees import Level, Shapes, wanted_trees
from bpkit.draft.config import ASSISTANT_BLOCK_SIZE
from bpkit.draft.grown_tree import GrownTree
from bpkit.draft.level_wise import Growth
from bpkit.draft.newcomers import LONG, newcomers, take_in
from bpkit.draft.own_layers import load_own_layers
from bpkit.draft.vocabulary import embedding_rows, fetch_tokenizer, refuse_another_tokenizer
from bpkit.types import AUTOREGRESSIVE, Feature, work_of


class AutoregressiveDrafter:
    """An assistant model (Leviathan et al. 2023, 2211.17192). A policy's `extend` may end a draft early.

    With `branches` a draft is a tree of `block_size - 1` nodes, at most `trained_block_size - 1` deep, which grows
    level by level (EAGLE-2, 2406.16858): the `branches` nodes of a level that are the likeliest to be reached are read
    in one pass, each has `branches` candidates, and of all that came up the best are drafted. `extend` is not asked.

    Args:
        branches: candidates after each token, and nodes that are read at each level.

    Raises:
        ValueError: another tokenizer, an assistant that cannot take back tokens, or one that cannot read trees and
            should.
    """

    kind, work = AUTOREGRESSIVE, work_of(AUTOREGRESSIVE)
    provides = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})
    feature_layers: tuple[int, ...] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        target: PreTrainedModel,
        *,
        name: str = "assistant",
        block_size: int = ASSISTANT_BLOCK_SIZE,
        branches: int = 1,
    ) -> None:
        refuse_another_tokenizer(model, target, name)
        self.inner = inside(model)
        served = served_by(self.inner)
        if isinstance(served, str) or cache_argument(self.inner) != "past_key_values":
            why = served if isinstance(served, str) else "it has a cache of its own kind"
            raise ValueError(
                f"drafter {name} ({type(model).__name__}) cannot take back drafted tokens: {why}; use another assistant"
            )
        self.stateful = served.stateful
        self.model, self.name = model.eval(), name
        self.trained_block_size, self.max_block_size = block_size, max(32, max(2, branches) * block_size)
        self.last_index = model.config.get_text_config().num_hidden_layers
        self.positions = position_limit(model)
        self._ended = False
        self._rows, self._width = embedding_rows(model), target.config.get_text_config().vocab_size
        self._reads_all = self._rows >= embedding_rows(target)
        self.target = target
        self._embedding, self._target_embedding = model.get_input_embeddings(), target.get_input_embeddings()
        self.branches = branches
        self._refuse_branches()

    def _refuse_branches(self) -> None:
        """Raise ValueError for a number of branches that cannot be drafted."""
        if not 1 <= self.branches <= self._width:
            raise ValueError(f"branches must be from 1 to {self._width}, the target's vocabulary; got {self.branches}")
        why = why_no_trees(self.inner) if self.branches > 1 else None
        if why is not None:
            raise ValueError(f"drafter {self.name} ({type(self.model).__name__}) {why}: use it with branches=1")

    @classmethod
    def load(
        cls, path: str, target: PreTrainedModel, *, block_size: int = ASSISTANT_BLOCK_SIZE, branches: int = 1
    ) -> AutoregressiveDrafter:
        """Load a causal language model from a folder or the Hub; without a path, the target's own or the shipped one.

        It is put where the target takes its input.

        Raises:
            ValueError: a drafter of another layout, weights that are not the model's, or another tokenizer.
        """
        path = drafter_path(path, str(target.name_or_path or ""), "assistant")
        model = load_own_layers(path, target)
        fetch_tokenizer(path)
        return cls(move(model, input_device(target)), target, name=path, block_size=block_size, branches=branches)

    def begin(self, text: RunningText) -> AutoregressiveSession:
        return (LevelWiseSession if self.branches > 1 else AutoregressiveSession)(self, text)

    def reader(self, rows: int, capacity: int, *, slots: int) -> TargetSession:
        """What reads texts of up to `capacity` tokens with the assistant, with room for so many rows."""
        kind = session_class(self.inner)
        session = kind(self.inner, rows=rows, slots=slots, capacity=capacity, feature_layers=(), keep_hidden=True)
        if self.model is not self.inner:
            session.wrapper = self.model
        return session

    def own(self, tokens: Tensor) -> Tensor:
        """Token ids as the assistant reads them; of those that only the target has, its last id. int64, same shape."""
        tokens = tokens.to(device_of(self._embedding, self.model))
        return tokens if self._reads_all else tokens.clamp(max=self._rows - 1)

    def score(self, logits: Tensor) -> Tensor:
        """The assistant's logits, [..., own width], over the target's vocabulary: padding is cut, or -inf."""
        more = self._width - logits.shape[-1]
        if more != 0:  # a negative number cuts
            logits = nn.functional.pad(logits, (0, more), value=float("-inf"))
        return logits.to(device_of(self._target_embedding, self.target))

    def room(self, length: int, count: int) -> int:
        """How many of `count` tokens can be drafted after `length` positions: fewer where the assistant's end.

        That is said once; to read on would raise or mean nothing.
        """
        if self.positions is None or length + count - 1 <= self.positions:
            return count
        if not self._ended:
            self._ended = True
            warnings.warn(
                f"drafter {self.name} has {self.positions} positions and the text is longer: drafting ends there, and "
                "the text goes on without it; use an assistant with more positions (said once)",
                stacklevel=2,
            )
        return max(0, self.positions - length + 1)

    def nothing(self, rows: int) -> Proposal:
        """A proposal of no tokens."""
        width, hidden = self._width, self.model.config.get_text_config().hidden_size
        of = partial(torch.empty, device=device_of(self._target_embedding, self.target))
        return Proposal(
            of((rows, 0), dtype=torch.long),
            of((rows, 0, width)),
            of((rows, 0, hidden), dtype=self.model.dtype),
            [0] * rows,
        )


class TokenByToken(ABC):
    """Drafts token after token: what reads, and what it knows after each, is a subclass's.

    A row that has drafted all that it should reads nothing more; one that does not draft while others do is read along.
    """

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        left = self.room(block_size)
        if max(left) == 0:
            return self.nothing()
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        counts, waited = [0] * len(left), self.waiting()
        logits, hidden = self.first()
        while True:
            drafts = [int(count > 0) for count in left]
            tokens, scores = draw(logits, drafts)
            steps.append((tokens, scores, hidden))
            counts = [count + more for count, more in zip(counts, drafts, strict=True)]
            left = [max(0, count - 1) for count in left]
            if go_on is not None and max(left) > 0:
                more = go_on(Proposal(tokens, scores, hidden, drafts))
                left = [count if goes_on else 0 for count, goes_on in zip(left, more, strict=True)]
            if max(left) == 0:
                break
            logits, hidden = self.following(tokens, [int(count > 0) for count in left])
        tokens, scores, hidden = (torch.cat(values, dim=1) for values in zip(*steps, strict=True))
        return Proposal(tokens, scores, hidden, counts, waited)

    @abstractmethod
    def room(self, block_size: Sequence[int]) -> list[int]:
        """Tokens that each row may draft."""

    @abstractmethod
    def waiting(self) -> int:
        """Decided tokens that are unread, of the row with most."""

    @abstractmethod
    def first(self) -> tuple[Tensor, Tensor]:
        """Read what is unread: logits over the target's vocabulary and hidden states after it, [rows, 1, ...]."""

    @abstractmethod
    def following(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read the tokens that were drafted last, int64 [rows, 1], of the rows with count 1; as of `first`."""

    @abstractmethod
    def nothing(self) -> Proposal:
        """A proposal of no tokens."""


class AutoregressiveSession(TokenByToken):
    """The assistant reads the text, its own drafts included, and is taken back where they do not stand.

    Rows share passes: in the first each reads what it has not read yet, in the others what it drafted last.
    """

    def __init__(self, drafter: AutoregressiveDrafter, text: RunningText) -> None:
        self.drafter, self.text = drafter, text
        self.reader = drafter.reader(len(text.rows), self.capacity, slots=text.slots)
        self.held = [0] * len(text.rows)
        """Tokens that were read of each row: of its text, and of the draft that follows."""

    @property
    def capacity(self) -> int:
        """Tokens that the rows may come to, drafted ones included."""
        return self.text.max_length + self.drafter.max_block_size

    def advance(self, features: Sequence[Tensor] | None) -> None:
        # Drafted tokens that do not stand were read at the place of the anchor or behind it.
        stand = [min(held, length - 1) for held, length in zip(self.held, self.text.length, strict=True)]
        self.reader.rollback([held - left for held, left in zip(self.held, stand, strict=True)])
        self.held = stand

    def room(self, block_size: Sequence[int]) -> list[int]:
        room, length = self.drafter.room, self.text.length
        return [room(at, size - 1) if size > 1 else 0 for at, size in zip(length, block_size, strict=True)]

    def waiting(self) -> int:
        return max(map(len, self._unread()))

    def first(self) -> tuple[Tensor, Tensor]:
        logits, hidden = self._read_text()
        return self.drafter.score(logits), hidden

    def following(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        logits, hidden = self._read(self.drafter.own(tokens), counts)
        return self.drafter.score(logits), hidden

    def nothing(self) -> Proposal:
        return self.drafter.nothing(len(self.text.rows))

    def keep(self, rows: Sequence[int]) -> None:
        self.reader.keep(rows)
        self.held = [self.held[row] for row in rows]

    def join(self, other: AutoregressiveSession) -> None:
        self.reader.join(other.reader)
        self.held += other.held

    def _unread(self) -> list[list[int]]:
        """Tokens of each row that the assistant has not read; none if it has too few positions for them."""
        limit = self.drafter.positions
        return [
            row.tokens[held:] if limit is None or row.length <= limit else []
            for row, held in zip(self.text.rows, self.held, strict=True)
        ]

    def _read_text(self) -> tuple[Tensor, Tensor]:
        """Read all that is unread; logits and hidden states after each row's last token, [rows, 1, ...]."""
        unread, stateful = self._unread(), self.drafter.stateful
        counts = [len(row) for row in unread]
        if len(set(counts)) == 1 and not stateful:
            return self._note(self.reader.prefill(self._ids(unread), counts, last=True), counts)
        # Of long texts logits are wanted at the end alone. States go back to where several tokens were read last.
        early = [count > LONG and (held == 0 or not stateful) for count, held in zip(counts, self.held, strict=True)]
        unread = [row[:-1] if at_once else [] for row, at_once in zip(unread, early, strict=True)]
        apart = newcomers(self.held, counts)
        if apart:
            self._read_apart(apart, [unread[row] for row in apart])
            unread = [[] if row in apart else tokens for row, tokens in enumerate(unread)]
        if any(unread):
            counts = [len(row) for row in unread]
            self._note(self.reader.prefill(self._ids(unread), counts, last=False), counts)
        unread = self._unread()
        counts = [len(row) for row in unread]
        logits, hidden = self._read(self._ids(unread), counts)
        rows = torch.arange(len(counts), device=logits.device)
        last = torch.tensor(counts, device=logits.device).sub(1).clamp(min=0)
        return logits[rows, last][:, None], hidden[rows, last][:, None]

    def _read_apart(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Read these tokens of some rows, of which nothing was read yet."""
        reader, counts = self.drafter.reader(len(rows), self.capacity, slots=len(rows)), [len(row) for row in tokens]
        reader.prefill(self._ids(tokens), counts, last=False)
        take_in(self.reader, len(self.held), reader, rows)
        for row, count in zip(rows, counts, strict=True):
            self.held[row] = count

    def _read(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read tokens int64 [rows, width], `counts` of each row."""
        return self._note(self.reader.verify(tokens, counts), counts)

    def _note(self, output: TargetOutput, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Count what was read; logits and hidden states."""
        assert output.last_hidden is not None
        self.held = [held + count for held, count in zip(self.held, counts, strict=True)]
        return output.logits, output.last_hidden

    def _ids(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Tokens of each row as the assistant reads them, int64 [rows, longest]."""
        width = max(map(len, tokens))
        padded = [[*row, *[0] * (width - len(row))] for row in tokens]
        return self.drafter.own(torch.tensor(padded))


class LevelWiseSession(AutoregressiveSession):
    """Drafts trees. What was read of one stays for the path that stands, whose keys and values move into place."""

    def __init__(self, drafter: AutoregressiveDrafter, text: RunningText) -> None:
        super().__init__(drafter, text)
        self.trees: list[GrownTree] = []
        """Of the last draft, as long as it is not known what stands; `begins` are lengths of the texts before it."""
        self.begins: list[int] = []

    def draft(
        self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None, shapes: Shapes | None = None
    ) -> Proposal:
        wanted, sizes = wanted_trees(block_size, shapes, self.drafter.trained_block_size)
        levels = self.room(sizes)
        if max(levels) == 0:
            return self.nothing()
        waited, self.begins = self.waiting(), self.text.length
        growth = Growth(draw, self.drafter.branches, wanted, levels)
        growth.take(*self.first())
        while (following := growth.next()) is not None:
            growth.take(*self._read_level(*following))
        proposal, self.trees = growth.draft(waited)
        return proposal

    def advance(self, features: Sequence[Tensor] | None) -> None:
        if self.trees:
            rows = zip(self.trees, self.text.rows, self.begins, strict=True)
            paths = [tree.path(row.tokens[begin:-1]) for tree, row, begin in rows]
            read = [max(0, len(tree.columns) - 1) for tree in self.trees]
            reader: Any = self.reader  # a SlotTarget, as others read no trees
            reader.accept(read, [[place - 1 for place in path] for path in paths])
            self.held = [held - count + len(path) for held, count, path in zip(self.held, read, paths, strict=True)]
            self.trees = []
        super().advance(features)

    def _read_level(self, tokens: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Read the newest columns of trees, int64 [rows, width]: as of `following`."""
        reader: Any = self.reader
        own = self.drafter.own(tokens)
        logits, hidden = self._note(reader.verify_trees(own, level.on(own.device)), level.counts)
        return self.drafter.score(logits), hidden
