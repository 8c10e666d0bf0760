"""Autoregressive drafting: any causal language model with the target's tokenizer, token after token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bpkit.assets import shipped
from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.pretrained import device_of, input_device, inside, load_causal_lm, move, position_limit
from bpkit.decode.sampling import Draw
from bpkit.decode.serving import served_by
from bpkit.decode.stateful import Snapshot, StatefulTarget, cache_argument, new_cache
from bpkit.decode.text import RunningText
from bpkit.draft.config import ASSISTANT_BLOCK_SIZE
from bpkit.draft.vocabulary import embedding_rows, fetch_tokenizer, refuse_another_tokenizer
from bpkit.types import AUTOREGRESSIVE, Feature, work_of


class AutoregressiveDrafter:
    """An assistant model (Leviathan et al. 2023, 2211.17192). A policy's `extend` may end a draft early."""

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
    ) -> None:
        refuse_another_tokenizer(model, target, name)
        served = served_by(inside(model))
        if isinstance(served, str) or cache_argument(inside(model)) != "past_key_values":
            why = served if isinstance(served, str) else "it has a cache of its own kind"
            raise ValueError(
                f"drafter {name} ({type(model).__name__}) cannot take back drafted tokens: {why}; use another assistant"
            )
        self.stateful = issubclass(served, StatefulTarget)
        self.model, self.name = model.eval(), name
        self.trained_block_size, self.max_block_size = block_size, max(32, 2 * block_size)
        self.last_index = model.config.get_text_config().num_hidden_layers
        self.positions = position_limit(model)
        self._ended = False
        self._rows, self._width = embedding_rows(model), target.config.get_text_config().vocab_size
        self._reads_all = self._rows >= embedding_rows(target)
        self.target = target
        self._embedding, self._target_embedding = model.get_input_embeddings(), target.get_input_embeddings()

    @classmethod
    def load(
        cls, path: str, target: PreTrainedModel, *, block_size: int = ASSISTANT_BLOCK_SIZE
    ) -> AutoregressiveDrafter:
        """Load a causal language model from a folder or the Hub; without a path, the one that ships with bpkit.

        It is put where the target takes its input.

        Raises:
            ValueError: a drafter of another layout, weights that are not the model's, or another tokenizer.
        """
        path = path or str(shipped("assistant"))
        model = load_causal_lm(path, dtype=target.dtype)
        fetch_tokenizer(path)
        return cls(move(model, input_device(target)), target, name=path, block_size=block_size)

    def begin(self, text: RunningText) -> AutoregressiveSession:
        return AutoregressiveSession(self, text)

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

    def nothing(self) -> Proposal:
        """A proposal of no tokens."""
        width, hidden = self._width, self.model.config.get_text_config().hidden_size
        of = partial(torch.empty, device=device_of(self._target_embedding, self.target))
        return Proposal(of((1, 0), dtype=torch.long), of((1, 0, width)), of((1, 0, hidden), dtype=self.model.dtype))


class AutoregressiveSession:
    """The assistant's KV cache and the decided tokens that it has not read yet (the anchor is the last)."""

    def __init__(self, drafter: AutoregressiveDrafter, text: RunningText) -> None:
        self.drafter, self.text = drafter, text
        self.snapshot: Snapshot | None = None
        """Of the states as they are before the tokens that are drafted, for an assistant that has states."""
        if drafter.stateful:
            self.cache = new_cache(drafter.model)
        else:
            self.cache = DynamicCache(config=drafter.model.config.get_text_config())
            self.cache.activate_past_recording()
        self.unread = text.newest
        self.drafted = 0

    def advance(self, features: Tensor | None) -> None:
        tokens = self.text.newest
        if self.drafted == 0:
            self.unread = torch.cat([self.unread, tokens], dim=1)
            return
        # The cache holds the drafted tokens but the last one: keep those that stand.
        held = self.drafted - 1
        stands = min(held, tokens.shape[1] - 1)
        if self.snapshot is None:
            self.cache.crop(-(held - stands))
        elif stands < held:  # those that stand are read again
            self.snapshot.restore(held)
            stands = 0
        self.unread, self.drafted = tokens[:, stands:], 0

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        count, waited = block_size[0] - 1, self.unread.shape[1]
        if self.drafter.positions is not None:
            count = self.drafter.room(self.cache.get_seq_length() + waited, count)
        if count == 0:
            return self.drafter.nothing()
        read = self.unread
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(count):
            output = self.drafter.model(
                input_ids=self.drafter.own(read),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                output_hidden_states=[self.drafter.last_index],
            )
            if not steps and self.drafter.stateful:
                self.snapshot = self.snapshot or Snapshot(self.cache)
                self.snapshot.keep()
                self.snapshot.take()
            # Some architectures have no `logits_to_keep`.
            read, scores = draw(self.drafter.score(output.logits[:, -1:]))
            steps.append((read, scores, output.hidden_states[self.drafter.last_index][:, -1:]))
            if go_on is not None and len(steps) < count and not go_on(Proposal(*steps[-1])):
                break
        self.drafted = len(steps)
        tokens, scores, hidden = (torch.cat(values, dim=1) for values in zip(*steps, strict=True))
        return Proposal(tokens, scores, hidden, waited)
