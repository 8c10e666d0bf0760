"""Block-diffusion drafting: the whole block in one forward of a DFlash model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from bpkit.assets import shipped
from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.pretrained import device_of, hub_options, move, refuse_other_weights, working_dtype
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
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

    While block size 1 is chosen the drafter is not called: features wait, and the next draft takes them all in. That
    draft costs one forward over (waiting positions + block) instead of (acceptance length + block).
    """

    def __init__(self, drafter: BlockDiffusionDrafter, text: RunningText) -> None:
        self.drafter, self.text = drafter, text
        self.cache = DynamicCache()
        self.unread: list[Tensor] = []

    def advance(self, features: Tensor | None) -> None:
        assert features is not None
        self.unread.append(features)

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        (size,) = block_size
        context = self.unread[0] if len(self.unread) == 1 else torch.cat(self.unread, dim=1)
        self.unread = []
        anchor = self.text.newest[:, -1:]
        masks = anchor.new_full((1, size - 1), self.drafter.model.config.mask_token_id)
        hidden = self.drafter.model(
            noise_embeds=self.drafter.embed(torch.cat([anchor, masks], dim=1)),
            context_hidden_states=context,
            past_key_values=self.cache,
        ).last_hidden_state[:, 1:]
        self.cache.crop(-size)
        tokens, scores = draw(self.drafter.score(hidden))
        return Proposal(tokens, scores, hidden, read=context.shape[1])
