"""Autoregressive drafting: any causal language model with the target's tokenizer, token after token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bpkit.assets import shipped
from bpkit.drafters.base import GoOn, Proposal
from bpkit.drafters.config import ASSISTANT_BLOCK_SIZE
from bpkit.runtime.sampling import Draw
from bpkit.types import AUTOREGRESSIVE, Feature


class AutoregressiveDrafter:
    """An assistant model (Leviathan et al. 2023, 2211.17192). A policy's `extend` may end a draft early."""

    kind = AUTOREGRESSIVE
    provides = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})
    feature_layers: tuple[int, ...] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        target: PreTrainedModel,
        *,
        name: str = "assistant",
        block_size: int = ASSISTANT_BLOCK_SIZE,
    ) -> None:
        ours, theirs = model.config.get_text_config().vocab_size, target.config.get_text_config().vocab_size
        if ours != theirs:
            raise ValueError(
                f"drafter {name} has a vocabulary of {ours}, the target of {theirs}: an autoregressive drafter "
                "must share the target's tokenizer"
            )
        self.model, self.name = model.eval(), name
        self.trained_block_size, self.max_block_size = block_size, max(32, 2 * block_size)
        self.last_index = model.config.get_text_config().num_hidden_layers

    @classmethod
    def load(
        cls, path: str, target: PreTrainedModel, *, block_size: int = ASSISTANT_BLOCK_SIZE
    ) -> AutoregressiveDrafter:
        """Load a causal language model from a folder or the Hub; without a path, the one that ships with bpkit."""
        path = path or str(shipped("assistant"))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=target.dtype).to(target.device)
        return cls(model, target, name=path, block_size=block_size)

    def begin(self) -> AutoregressiveSession:
        return AutoregressiveSession(self)


class AutoregressiveSession:
    """The assistant's KV cache and the decided tokens that it has not read yet (the anchor is the last)."""

    def __init__(self, drafter: AutoregressiveDrafter) -> None:
        self.drafter = drafter
        self.cache = DynamicCache(config=drafter.model.config.get_text_config())
        self.cache.activate_past_recording()
        self.unread: Tensor | None = None
        self.drafted: Tensor | None = None

    @property
    def waiting(self) -> int:
        return 0 if self.unread is None else self.unread.shape[1]

    def advance(self, tokens: Tensor, features: Tensor | None) -> None:
        if self.drafted is None:
            self.unread = tokens if self.unread is None else torch.cat([self.unread, tokens], dim=1)
            return
        # The cache holds the drafted tokens but the last one: keep those that stand.
        held = self.drafted[:, :-1]
        same = min(held.shape[1], tokens.shape[1] - 1)
        stands = int((held[:, :same] == tokens[:, :same]).cumprod(dim=1).sum())
        self.cache.crop(-(held.shape[1] - stands))
        self.unread, self.drafted = tokens[:, stands:], None

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        assert self.unread is not None
        read, self.unread = self.unread, None
        parts: list[Proposal] = []
        for _ in range(block_size - 1):
            output = self.drafter.model(
                input_ids=read,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                output_hidden_states=[self.drafter.last_index],
            )
            read, scores = draw(output.logits)
            parts.append(Proposal(read, scores, output.hidden_states[self.drafter.last_index][:, -1:]))
            if go_on is not None and len(parts) < block_size - 1 and not go_on(_joined(parts)):
                break
        proposal = _joined(parts)
        self.drafted = proposal.tokens
        return proposal


def _joined(parts: list[Proposal]) -> Proposal:
    tokens = torch.cat([p.tokens for p in parts], dim=1)
    scores = torch.cat([p.scores for p in parts if p.scores is not None], dim=1)
    return Proposal(tokens, scores, torch.cat([p.hidden for p in parts if p.hidden is not None], dim=1))
