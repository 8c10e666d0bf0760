"""Block-diffusion drafting: the whole block in one forward of a DFlash model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from bpkit.assets import drafter_path
from bpkit.decode.attention import use_grouped_attention
from bpkit.decode.capture import Graphs, Input, counts_of
from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.host import to_host
from bpkit.decode.pretrained import device_of, hub_options, move, refuse_other_weights, working_dtype
from bpkit.decode.sampling import Draw
from bpkit.decode.slots import Reading, SlotCache
from bpkit.decode.text import RunningText, padded
from bpkit.decode.trees import Shapes, TreeShape, wanted_trees
from bpkit.draft.best_first import best_first, shaped
from bpkit.draft.dflash_checks import refuse_unfit, refuse_unknown_layout
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel
from bpkit.draft.newcomers import newcomers, take_in
from bpkit.draft.vocabulary import embedding_rows
from bpkit.types import BLOCK_DIFFUSION, Feature, work_of


class BlockDiffusionDrafter:
    """A DFlash drafter bound to the target whose embedding and head it uses.

    Any block size from 1 to twice the trained one; sizes differ in more than length, because attention inside the
    block is bidirectional.

    A position's distribution does not depend on what is drafted before it, so that further candidates cost no pass.
    With `branches` a draft is a tree of `block_size - 1` nodes: the beginnings of texts with the highest products of
    chances over the best candidates of each position. The block that the model is passed is then at most the trained
    one, and of the block size below that.

    A candidate's chance is its share of exp(score + noise), which without noise is its probability. With noise both are
    divided by 1.25 first: the target's scores are others, with which its choice is less sure.

    Args:
        branches: candidates at each position.
    """

    kind, work = BLOCK_DIFFUSION, work_of(BLOCK_DIFFUSION)
    provides = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})

    def __init__(self, model: DFlashModel, target: PreTrainedModel, *, name: str = "DFlash", branches: int = 1) -> None:
        if branches < 1:
            raise ValueError(f"branches must be 1 or more; got {branches}")
        refuse_unfit(model.config, target.config.get_text_config(), embedding_rows(target), name)
        self.model, self.target, self.name = model.eval(), target, name
        self.trained_block_size = model.config.block_size
        self.branches, self.max_block_size = branches, max(2, branches) * model.config.block_size
        self.feature_layers = tuple(model.config.target_layer_ids or ())
        if target.get_output_embeddings() is None:
            raise ValueError(
                f"drafter {name} uses the target's head, and the target has none: use a causal language model"
            )
        self._find_parts()

    def _find_parts(self) -> None:
        """The target's embedding and head, and where they take their input: looked up once, not at each draft."""
        target = self.target
        self._embedding, self._head = target.get_input_embeddings(), target.get_output_embeddings()
        self._embeds_on, self._reads_on = device_of(self._embedding, target), device_of(self._head, target)
        self._reads_as = working_dtype(self._head, target)

    @classmethod
    def load(cls, path: str, target: PreTrainedModel, *, branches: int = 1, **options: Any) -> BlockDiffusionDrafter:
        """Load a checkpoint of the published DFlash layout, from a folder or the Hub.

        Without a path it is the target's own, if bpkit knows the target, or else the shipped one. It is put where the
        target's head is.

        Raises:
            ValueError: its tensors or its settings are not those of a DFlash drafter; it would draft at random.
        """
        path = drafter_path(path, str(target.name_or_path or ""), "drafter")
        config, _ = PreTrainedConfig.get_config_dict(path, **hub_options(options))
        refuse_unknown_layout(path, config, vocab_size=target.config.get_text_config().vocab_size)
        # Before the weights are read, which would fail first, and with less to say.
        refuse_unfit(DFlashConfig.from_dict(config), target.config.get_text_config(), embedding_rows(target), path)
        model, info = DFlashModel.from_pretrained(
            path, dtype=target.dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        refuse_other_weights(path, info, "a DFlash drafter of the known layout")
        model = move(model, device_of(target.get_output_embeddings(), target))
        use_grouped_attention(model)
        return cls(model, target, name=path, branches=branches)

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings of tokens, int64 [..., count] -> [..., count, hidden]."""
        embedded: Tensor = self._embedding(tokens.to(self._embeds_on))
        return embedded

    def score(self, hidden: Tensor) -> Tensor:
        """The target's logits of the drafter's hidden states, [..., count, hidden] -> [..., count, vocab].

        The two may have different dtypes and devices. Logits are where the target takes its tokens.
        """
        logits: Tensor = self._head(hidden.to(self._reads_on, self._reads_as))
        return logits.to(self._embeds_on)

    def begin(self, text: RunningText) -> BlockDiffusionSession:
        self._find_parts()  # the target may have been moved
        return BlockDiffusionSession(self, text)


class BlockDiffusionSession:
    """Keys and values of the context features, and features that wait to enter them.

    While no row drafts the drafter is not called: features wait, and the next draft takes them all in. That draft costs
    one forward over (waiting positions + block) instead of (acceptance length + block).

    Rows share a pass, each with its own number of waiting features and its own block size: both are padded, and padding
    is written where no row looks. A row that does not draft while others do is read along.
    """

    graphs: Graphs | None = None
    """Passes that are captured, where some are."""

    def __init__(self, drafter: BlockDiffusionDrafter, text: RunningText) -> None:
        self.drafter, self.text = drafter, text
        rows, capacity = len(text.rows), text.max_length + drafter.max_block_size
        self.slot_cache = SlotCache(drafter.model.config, rows=rows, slots=text.slots, capacity=capacity)
        self.waiting: list[list[Tensor]] = [[] for _ in text.rows]
        self.largest = drafter.max_block_size if drafter.branches == 1 else drafter.trained_block_size
        """Positions of a block."""

    @property
    def model(self) -> DFlashModel:
        model: DFlashModel = self.drafter.model
        return model

    def advance(self, features: Sequence[Tensor] | None) -> None:
        assert features is not None
        for waiting, more in zip(self.waiting, features, strict=True):
            waiting.append(more)

    def draft(
        self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None, shapes: Shapes | None = None
    ) -> Proposal:
        trees, block_size = wanted_trees(block_size, shapes, self.largest)
        context = [waiting[0] if len(waiting) == 1 else torch.cat(waiting) for waiting in self.waiting]
        read = [len(features) for features in context]
        apart = newcomers(self.slot_cache.held, read)
        if apart:
            self._read_apart(apart, context)
        made = None if self.graphs is None else self._replay(self.graphs, context, block_size)
        if made is None:
            hidden = self._denoise(self.slot_cache, self.text.anchor, context, block_size)
            made = hidden, self.drafter.score(hidden)
        self.waiting = [[] for _ in context]
        (hidden, logits), counts = made, [size - 1 for size in block_size]
        if self.drafter.branches > 1:
            candidates, chances, scores = draw.candidates(logits, counts, self.drafter.branches)
            return grown(
                candidates, chances, counts, trees, Proposal(candidates[..., 0], scores, hidden, [], max(read))
            )
        tokens, scores = draw(logits, counts)
        return Proposal(tokens, scores, hidden, counts, max(read))

    def keep(self, rows: Sequence[int]) -> None:
        self.slot_cache.keep(rows)
        self.waiting = [self.waiting[row] for row in rows]

    def join(self, other: BlockDiffusionSession) -> None:
        self.slot_cache.join(other.slot_cache)
        self.waiting += other.waiting

    def _read_apart(self, rows: Sequence[int], context: list[Tensor]) -> None:
        """Read the context of some rows, which is nothing then."""
        count, anchor = len(rows), torch.cat([self.text.anchor[row : row + 1] for row in rows])
        cache = SlotCache(self.drafter.model.config, rows=count, slots=count, capacity=self.slot_cache.capacity)
        self._denoise(cache, anchor, [context[row] for row in rows], [1] * count)
        take_in(self.slot_cache, len(context), cache, rows)
        for row in rows:
            context[row] = context[row][:0]

    def _denoise(
        self, cache: SlotCache, anchor: Tensor, context: Sequence[Tensor], block_size: Sequence[int]
    ) -> Tensor:
        """Read the context of rows, and pass a block of each through the model, of which this gives `_blocks`."""
        read = [len(features) for features in context]
        reading, inputs = padded_pass(cache, read, block_size, self.model.device)
        features = padded([features[None] for features in context])
        hidden = self._blocks(cache, anchor, max(block_size), features, reading, inputs)
        cache.held = [held + count for held, count in zip(cache.held, read, strict=True)]
        return hidden

    def _replay(
        self, graphs: Graphs, context: Sequence[Tensor], block_size: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        """The same out of a graph, with the target's logits; None where there is none for such a pass."""
        read = [len(features) for features in context]
        shape = graphs.shape(self, max(read), max(block_size))
        if shape is None:
            return None
        cache, features = self.slot_cache, padded([features[None] for features in context])
        most, width = shape.widths

        def passed(anchor: Tensor, features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
            places = _own_places(cache, counts, most, width, shape.end)
            hidden = self._blocks(cache, anchor, width, features, *places)
            return hidden, self.drafter.score(hidden)

        replayed = graphs.run(
            shape,
            (),
            [
                Input(self.text.anchor, (shape.rows, 1)),
                Input(features, (shape.rows, most, features.shape[2])),
                counts_of([cache.held, read, block_size], shape.rows, fill=[0, 0, 1]),
            ],
            passed,
            (len(read), max(block_size) - 1),
        )
        if replayed is not None:
            cache.held = [held + count for held, count in zip(cache.held, read, strict=True)]
        return cast("tuple[Tensor, Tensor] | None", replayed)

    def _blocks(
        self,
        cache: SlotCache,
        anchor: Tensor,
        width: int,
        context: Tensor,
        reading: Reading,
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Hidden states of blocks without their anchors, [rows, width - 1, hidden].

        Args:
            anchor: int64 [rows, 1]. width: of the blocks. context: features, [rows, count, layers * hidden].
        """
        model = self.model
        masks = anchor.new_full((len(anchor), width - 1), model.config.mask_token_id)
        cache.begin(reading)
        hidden: Tensor = model(
            noise_embeds=self.drafter.embed(torch.cat([anchor, masks], dim=1)),
            context_hidden_states=context,
            past_key_values=cache,
            **inputs,
        ).last_hidden_state
        return hidden[:, 1:]


def grown(
    candidates: Tensor, chances: Tensor, counts: Sequence[int], wanted: Sequence[int | TreeShape], block: Proposal
) -> Proposal:
    """The block as a tree of candidates, whose chances are read from the device.

    Args:
        candidates: int64 [rows, positions, branches], falling by their chances, float32 alike.
        counts: positions of each row. wanted: the tree of each row, or how many nodes the best one is to have.
    """
    (read,), device = to_host([chances]), candidates.device
    trees = [
        shaped(own[:count], tree) if isinstance(tree, TreeShape) else best_first(own[:count], tree)
        for own, count, tree in zip(read.tolist(), counts, wanted, strict=True)
    ]
    shape = len(trees), max(map(len, trees))
    columns = torch.full((4, *shape), -1.0, dtype=torch.double)
    for row, tree in enumerate(trees):
        if tree:
            columns[:, row, : len(tree)] = torch.tensor(tree, dtype=torch.double).T
    parents, places, ranks, of_nodes = columns
    sent = torch.stack([places, ranks]).clamp_(min=0).long().to(device, non_blocking=True)
    rows = torch.arange(shape[0], device=device)[:, None]
    return replace(
        block,
        tokens=candidates[rows, sent[0], sent[1]],
        counts=[len(tree) for tree in trees],
        parents=parents.long(),
        chances=of_nodes.float(),
        places=sent[0],
        positions=[count + 1 for count in counts],
    )


def padded_pass(
    cache: SlotCache, read: Sequence[int], block_size: Sequence[int], device: torch.device
) -> tuple[Reading, dict[str, Any]]:
    """Where a pass over rows writes, and what a `DFlashModel` is told of it.

    Its source is [context, padded to the longest | block, padded to the largest]. Each row writes its own of both after
    the context that it holds, without a gap, so that columns of the cache are positions of the text.

    Args:
        read: positions of new context of each row.
    """
    context, width = max(read), max(block_size)
    if all(len(set(counts)) == 1 for counts in (cache.held, read, block_size)):
        return cache.place(context + width, [context + width] * len(read), device), {}
    ends = [sum(row) for row in zip(cache.held, read, block_size, strict=True)]
    counts = torch.tensor([cache.held, read, block_size], device=device)
    return _own_places(cache, counts, context, width, max(ends), (min(cache.held), max(cache.held)))


def _own_places(
    cache: SlotCache, counts: Tensor, context: int, width: int, end: int, lengths: tuple[int, int] = (0, 0)
) -> tuple[Reading, dict[str, Any]]:
    """The same where rows differ.

    Args:
        counts: positions that each row holds, of its new context and of its block, int64 [3, rows], on the device.
        context, width: to which the last two are padded. end: columns that are read.
        lengths: as in `Reading`.
    """
    held, new, size = counts[..., None]
    column = torch.arange(context + width, device=counts.device)
    in_block = column - context
    own = torch.where(in_block < 0, column, new + in_block)
    real = torch.where(in_block < 0, column < new, in_block < size)
    rows = torch.arange(len(held), device=counts.device)[:, None]
    reading = Reading(len(held), None, (held + own).masked_fill(~real, cache.capacity), rows, lengths, end)
    return reading, {
        "attention_mask": (torch.arange(end, device=counts.device) < held + new + size)[:, None, None],
        # Padding has the position of the block's last token and sees what that sees: no query is left without a key.
        "position_ids": held + own.minimum(new + size - 1),
        "key_end": end,
    }
