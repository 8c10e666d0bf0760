"""Block-diffusion drafting: the whole block in one forward of a DFlash model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bpkit.assets import shipped
from bpkit.drafters.base import GoOn, Proposal
from bpkit.drafters.dflash_model import DFlashModel
from bpkit.runtime.sampling import Draw
from bpkit.types import BLOCK_DIFFUSION, Feature

# Settings of newer checkpoints that change the drafts; ignoring them would draft worse without a word.
_NOT_HONOURED = ("output_multiplier", "final_logit_softcapping", "input_embedding_scale")


class BlockDiffusionDrafter:
    """A DFlash drafter bound to the target whose embedding and head it uses.

    Any block size from 1 to twice the trained one; sizes differ in more than length, because attention inside the
    block is bidirectional.
    """

    kind = BLOCK_DIFFUSION
    provides = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})

    def __init__(self, model: DFlashModel, target: PreTrainedModel, *, name: str = "DFlash") -> None:
        config = model.config
        if config.hidden_size != target.config.get_text_config().hidden_size:
            raise ValueError(
                f"drafter {name} was made for hidden size {config.hidden_size}, but the target has "
                f"{target.config.get_text_config().hidden_size}: use the drafter that was trained for this target"
            )
        depth = target.config.get_text_config().num_hidden_layers
        if not all(0 <= layer < depth for layer in config.target_layer_ids or ()):
            raise ValueError(
                f"drafter {name} wants features of target layers {config.target_layer_ids}, but the target has "
                f"layers 0 to {depth - 1}: use the drafter that was trained for this target"
            )
        self.model, self.target, self.name = model.eval(), target, name
        self.trained_block_size = config.block_size
        self.max_block_size = 2 * config.block_size
        self.feature_layers = tuple(config.target_layer_ids or ())

    @classmethod
    def load(cls, path: str, target: PreTrainedModel, **options: Any) -> BlockDiffusionDrafter:
        """Load a checkpoint of the published DFlash layout, from a folder or the Hub; without a path, the shipped one.

        Raises:
            ValueError: its tensors are not those of a DFlash drafter; it would draft at random.
        """
        path = path or str(shipped("drafter"))
        model, info = DFlashModel.from_pretrained(path, dtype=target.dtype, output_loading_info=True, **options)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(what):
                names = ", ".join(sorted(map(str, info[what]))[:4])
                raise ValueError(
                    f"{path} is not a DFlash drafter of the known layout: {what.replace('_', ' ')} {names}"
                )
        given = {**model.config.to_dict(), **(model.config.dflash_config or {})}
        unknown = [name for name in _NOT_HONOURED if given.get(name) not in (None, 1.0)]
        if unknown:
            raise ValueError(f"{path} scales or caps its scores ({', '.join(unknown)}), which bpkit does not do yet")
        return cls(model.to(target.device), target, name=path)

    def begin(self) -> BlockDiffusionSession:
        return BlockDiffusionSession(self)


class BlockDiffusionSession:
    """Keys and values of the context features, and features that wait to enter them.

    While block size 1 is chosen the drafter is not called: features wait, and the next draft takes them all in. That
    draft costs one forward over (waiting positions + block) instead of (acceptance length + block).
    """

    def __init__(self, drafter: BlockDiffusionDrafter) -> None:
        self.drafter = drafter
        self.cache = DynamicCache()
        self.waiting = 0
        self.unread: list[Tensor] = []
        self.anchor: Tensor | None = None
        self.embed = drafter.target.get_input_embeddings()
        self.head = drafter.target.get_output_embeddings()

    def advance(self, tokens: Tensor, features: Tensor | None) -> None:
        assert features is not None
        self.anchor = tokens[:, -1:]
        self.unread.append(features)
        self.waiting += features.shape[1]

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        assert self.anchor is not None
        context = self.unread[0] if len(self.unread) == 1 else torch.cat(self.unread, dim=1)
        self.unread, self.waiting = [], 0
        masks = self.anchor.new_full((1, block_size - 1), self.drafter.model.config.mask_token_id)
        hidden = self.drafter.model(
            noise_embeds=self.embed(torch.cat([self.anchor, masks], dim=1)),
            context_hidden_states=context,
            past_key_values=self.cache,
        ).last_hidden_state[:, 1:]
        self.cache.crop(-block_size)
        tokens, scores = draw(self.head(hidden))
        return Proposal(tokens, scores, hidden)
