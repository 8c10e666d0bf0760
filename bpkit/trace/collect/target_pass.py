"""The target over a finished output: what decided each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpkit.decode.features import anchor_statistics
from bpkit.decode.placement import device_of, input_device
from bpkit.decode.sampling import Processors
from bpkit.decode.verify import near_ties, tie_tolerance
from bpkit.trace.collect.pieces import Positions, pieces, positions_at_once


@dataclass(frozen=True)
class TargetPass:
    """One pass over all but the last token. Logits are made from its states in pieces, where that is exact.

    Attributes:
        prompt, tokens: int64 [1, prompt length], [1, output length].
        last_hidden: final-norm hidden states that decided each output token, [output length, hidden].
        features: of the drafter's layers at every position but the last, [1, length - 1, layers * hidden], or None.
        vocab_size: width of the logits.
        logits: that decided some of the output tokens, [positions, vocab].
    """

    prompt: Tensor
    tokens: Tensor
    last_hidden: Tensor
    features: Tensor | None
    vocab_size: int
    logits: Callable[[slice], Tensor]

    def scores(self, logits: Tensor, piece: slice, processors: Processors) -> Tensor:
        """The logits of a piece after the processors, float32 [positions, vocab]."""
        prefix = torch.cat([self.prompt, self.tokens[:, : piece.start]], dim=1)
        return processors(logits[None], prefix, self.tokens[:, piece.start :])[0]

    def probabilities(self, processors: Processors) -> Positions:
        """The processed distribution at each output position."""

        def make(piece: slice) -> Tensor:
            return self.scores(self.logits(piece), piece, processors).softmax(dim=-1)

        return Positions(self.tokens.shape[1], self.vocab_size, make)

    def first_logits(self) -> Tensor:
        """Of the first output token, [vocab]."""
        return self.logits(next(self._pieces()))[0]

    def anchor_statistics(self) -> tuple[Tensor, Tensor]:
        """Log-probability of each output token and entropy of what it was drawn from, float32 [output length] each."""
        found = [anchor_statistics(self.logits(piece), self.tokens[0, piece]) for piece in self._pieces()]
        log_probabilities, entropies = zip(*found, strict=True)
        return torch.cat(log_probabilities), torch.cat(entropies)

    def near_ties(self, processors: Processors, noise: Positions | None) -> Tensor:
        """Output positions where the two best are close, or where this pass would choose otherwise: int64 [count]."""
        found = [self._near_ties(piece, processors, noise) for piece in self._pieces()]
        return torch.cat(found).nonzero()[:, 0]

    def _near_ties(self, piece: slice, processors: Processors, noise: Positions | None) -> Tensor:
        logits = self.logits(piece)
        scores = self.scores(logits, piece, processors)
        tolerance = tie_tolerance(logits, scores)
        if noise is not None:
            scores = scores + noise[torch.arange(piece.start, piece.stop, device=scores.device)]
        return near_ties(scores, tolerance) | (scores.argmax(dim=-1) != self.tokens[0, piece])

    def _pieces(self) -> Iterator[slice]:
        return pieces(self.tokens.shape[1], positions_at_once(self.vocab_size))


def target_pass(target: PreTrainedModel, feature_layers: tuple[int, ...], prompt: Tensor, tokens: Tensor) -> TargetPass:
    """Read prompt and output, int64 [1, length] each."""
    layers = [i + 1 for i in feature_layers]
    last, count = target.config.get_text_config().num_hidden_layers, tokens.shape[1]
    read = partial(target, input_ids=torch.cat([prompt, tokens], dim=1)[:, :-1], use_cache=False)
    output = read(logits_to_keep=1, output_hidden_states=[*layers, last])
    states, hidden = output.hidden_states, output.hidden_states[last][0, -count:]
    head = _head(target, hidden[-1:], output.logits[0])
    if head is None:  # the model does something of its own after its head: all logits at once, as it makes them
        whole = read(logits_to_keep=count).logits[0]
        logits = whole.__getitem__
    else:
        logits = partial(_headed, head, hidden)
    return TargetPass(
        prompt=prompt,
        tokens=tokens,
        last_hidden=hidden,
        features=torch.cat([states[i] for i in layers], dim=-1) if layers else None,
        vocab_size=output.logits.shape[-1],
        logits=logits,
    )


Head = Callable[[Tensor], Tensor]
"""From final-norm states [positions, hidden] to logits [positions, vocab]."""


def _headed(head: Head, hidden: Tensor, piece: slice) -> Tensor:
    return head(hidden[piece])


def _head(target: PreTrainedModel, hidden: Tensor, logits: Tensor) -> Head | None:
    """What makes `logits`, [1, vocab], of `hidden`, [1, hidden], to the bit; None if it is neither of those known."""
    module = target.get_output_embeddings()
    if module is None:
        return None
    plain = partial(_plain, module, device_of(module, target), input_device(target))
    cap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)
    known: list[Head] = [plain] if cap is None else [partial(_capped, plain, cap)]
    return next((head for head in known if head(hidden).equal(logits.to(input_device(target)))), None)


def _plain(module: nn.Module, device: torch.device, back: torch.device, states: Tensor) -> Tensor:
    logits: Tensor = module(states.to(device))
    return logits.to(back)


def _capped(plain: Head, cap: float, states: Tensor) -> Tensor:
    return torch.tanh(plain(states) / cap) * cap
