"""Block-diffusion drafting: the whole block in one forward of a DFlash model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from bpkit.assets import shipped
from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.pretrained import device_of, hub_options, move, refuse_other_weights, working_dtype
from bpkit.decode.sampling import Draw
from bpkit.decode.slots import Reading, SlotCache
from bpkit.decode.text import RunningText, padded
from bpkit.draft.dflash_checks import refuse_unfit, refuse_unknown_layout
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel
from bpkit.draft.vocabulary import embedding_rows
from bpkit.types import BLOCK_DIFFUSION, Feature, work_of


class BlockDiffusionDrafter:
    """A DFlash drafter bound to the target whose embedding and head it uses.

    Any block size from 1 to twice the trained one; sizes differ in more than length, because attention inside the
    block is bidirectional.
    """

    kind, work = BLOCK_DIFFUSION, work_of(BLOCK_DIFFUSION)
    provides = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})

    def __init__(self, model: DFlashModel, target: PreTrainedModel, *, name: str = "DFlash") -> None:
        refuse_unfit(model.config, target.config.get_text_config(), embedding_rows(target), name)
        self.model, self.target, self.name = model.eval(), target, name
        self.trained_block_size = model.config.block_size
        self.max_block_size = 2 * model.config.block_size
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
    def load(cls, path: str, target: PreTrainedModel, **options: Any) -> BlockDiffusionDrafter:
        """Load a checkpoint of the published DFlash layout, from a folder or the Hub; without a path, the shipped one.

        It is put where the target's head is.

        Raises:
            ValueError: its tensors or its settings are not those of a DFlash drafter; it would draft at random.
        """
        path = path or str(shipped("drafter"))
        config, _ = PreTrainedConfig.get_config_dict(path, **hub_options(options))
        refuse_unknown_layout(path, config, vocab_size=target.config.get_text_config().vocab_size)
        # Before the weights are read, which would fail first, and with less to say.
        refuse_unfit(DFlashConfig.from_dict(config), target.config.get_text_config(), embedding_rows(target), path)
        model, info = DFlashModel.from_pretrained(
            path, dtype=target.dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        refuse_other_weights(path, info, "a DFlash drafter of the known layout")
        return cls(move(model, device_of(target.get_output_embeddings(), target)), target, name=path)

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

    def __init__(self, drafter: BlockDiffusionDrafter, text: RunningText) -> None:
        self.drafter, self.text = drafter, text
        rows, capacity = len(text.rows), text.max_length + drafter.max_block_size
        self.cache = SlotCache(drafter.model.config, rows=rows, slots=rows, capacity=capacity)
        self.waiting: list[list[Tensor]] = [[] for _ in text.rows]

    def advance(self, features: Sequence[Tensor] | None) -> None:
        assert features is not None
        for waiting, more in zip(self.waiting, features, strict=True):
            waiting.append(more)

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        hidden, read = self._denoise(block_size)
        counts = [size - 1 for size in block_size]
        tokens, scores = draw(self.drafter.score(hidden[:, 1:]), counts)
        return Proposal(tokens, scores, hidden[:, 1:], counts, read)

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.keep(rows)
        self.waiting = [self.waiting[row] for row in rows]

    def join(self, other: BlockDiffusionSession) -> None:
        # Their prompts are read before: in one pass with the others', all rows would be padded to the longest.
        nothing = [waiting[0][:0].clone() for waiting in other.waiting]
        other._denoise([1] * len(nothing))
        self.cache.join(other.cache)
        self.waiting += [[none] for none in nothing]

    def _denoise(self, block_size: Sequence[int]) -> tuple[Tensor, int]:
        """Read what waits and pass each row's block through the model.

        Returns:
            hidden states of the blocks, [rows, largest block, hidden], and how much was read of the row that had most.
        """
        context = [waiting[0] if len(waiting) == 1 else torch.cat(waiting) for waiting in self.waiting]
        read, anchor, model = [len(features) for features in context], self.text.anchor, self.drafter.model
        masks = anchor.new_full((len(read), max(block_size) - 1), model.config.mask_token_id)
        reading, inputs = padded_pass(self.cache, read, block_size, model.device)
        self.cache.begin(reading)
        hidden: Tensor = model(
            noise_embeds=self.drafter.embed(torch.cat([anchor, masks], dim=1)),
            context_hidden_states=padded([features[None] for features in context]),
            past_key_values=self.cache,
            **inputs,
        ).last_hidden_state
        self.cache.held = [held + count for held, count in zip(self.cache.held, read, strict=True)]
        self.waiting = [[] for _ in read]
        return hidden, max(read)


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
    held, new, size = torch.tensor([cache.held, read, block_size], device=device)[..., None]
    column = torch.arange(context + width, device=device)
    in_block = column - context
    own = torch.where(in_block < 0, column, new + in_block)
    counts = torch.where(in_block < 0, column < new, in_block < size)
    ends = [sum(row) for row in zip(cache.held, read, block_size, strict=True)]
    reading = Reading(
        rows=len(read),
        start=None,
        places=torch.where(counts, held + own, cache.capacity),
        row_indices=torch.arange(len(read), device=device)[:, None],
        lengths=(min(cache.held), max(cache.held)),
        end=max(ends),
    )
    return reading, {
        "attention_mask": (torch.arange(reading.end, device=device) < held + new + size)[:, None, None],
        # Padding has the position of the block's last token and sees what that sees: no query is left without a key.
        "position_ids": held + own.minimum(new + size - 1),
        "key_end": reading.end,
    }
