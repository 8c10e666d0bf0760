"""The target over a finished output: what decided each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bpkit.decode.features import anchor_statistics
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.pretrained import device_of, hidden_states_at, input_device
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
        return Positions(
            self.tokens.shape[1],
            self.vocab_size,
            lambda piece: self.scores(self.logits(piece), piece, processors).softmax(dim=-1),
        )

    def first_logits(self) -> Tensor:
        """Of the first output token, [vocab]."""
        return self.logits(next(self._pieces()))[0]

    def anchor_statistics(self) -> tuple[Tensor, Tensor]:
        """Log-probability of each output token and entropy of what it was drawn from, float32 [output length] each."""
        found = [anchor_statistics(self.logits(piece), self.tokens[0, piece]) for piece in self._pieces()]
        log_probabilities, entropies = zip(*found, strict=True)
        return torch.cat(log_probabilities), torch.cat(entropies)

    def near_ties(self, processors: Processors, noise: GumbelNoise | None) -> Tensor:
        """Output positions where the two best are close, or where this pass would choose otherwise: int64 [count]."""
        found = []
        for piece in self._pieces():
            logits = self.logits(piece)
            scores = self.scores(logits, piece, processors)
            tolerance = tie_tolerance(logits, scores)
            if noise is not None:
                scores = scores + noise.at(piece.start, piece.stop - piece.start)
            found.append(near_ties(scores, tolerance) | (scores.argmax(dim=-1) != self.tokens[0, piece]))
        return torch.cat(found).nonzero()[:, 0]

    def _pieces(self) -> Iterator[slice]:
        return pieces(self.tokens.shape[1], positions_at_once(self.vocab_size))


def target_pass(target: PreTrainedModel, feature_layers: tuple[int, ...], prompt: Tensor, tokens: Tensor) -> TargetPass:
    """Read prompt and output, int64 [1, length] each."""
    (one,) = target_passes(target, feature_layers, [(prompt, tokens)])
    return one


def target_passes(
    target: PreTrainedModel, feature_layers: tuple[int, ...], outputs: Sequence[tuple[Tensor, Tensor]]
) -> list[TargetPass]:
    """Read prompts and outputs, int64 [1, length] each, in one pass.

    All are padded on the right, where nothing that counts looks: rows of a target that may share passes (see
    `bpkit.decode.serving`). Others are handed over one at a time.
    """
    layers = [i + 1 for i in feature_layers]
    last = target.config.get_text_config().num_hidden_layers
    texts = [torch.cat(output, dim=1)[:, :-1] for output in outputs]
    output = target(
        input_ids=_side_by_side(texts),
        use_cache=False,
        logits_to_keep=1,
        output_hidden_states=hidden_states_at([*layers, last]),
    )
    states, head = output.hidden_states, _head(target)
    # A model may do something of its own after its head: then all logits of a text at once, as it makes them.
    plain = head is not None and head(states[last][:, -1:]).equal(output.logits[:, -1:])
    found = []
    for row, (text, (prompt, tokens)) in enumerate(zip(texts, outputs, strict=True)):
        length, count = text.shape[1], tokens.shape[1]
        hidden = states[last][row, length - count : length]
        found.append(
            TargetPass(
                prompt=prompt,
                tokens=tokens,
                last_hidden=hidden,
                features=torch.cat([states[i][row : row + 1, :length] for i in layers], dim=-1) if layers else None,
                vocab_size=output.logits.shape[-1],
                logits=partial(_of_piece, head, hidden)
                if head is not None and plain
                else target(input_ids=text, use_cache=False, logits_to_keep=count).logits[0].__getitem__,
            )
        )
    return found


def _side_by_side(texts: Sequence[Tensor]) -> Tensor:
    """Texts int64 [1, length] as rows, each padded with its own last token."""
    longest = max(text.shape[1] for text in texts)
    column = torch.arange(longest, device=texts[0].device)
    return torch.cat([text[:, column.clamp(max=text.shape[1] - 1)] for text in texts])


def _of_piece(head: Callable[[Tensor], Tensor], hidden: Tensor, piece: slice) -> Tensor:
    return head(hidden[piece])


def _head(target: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What makes logits [..., vocab] of final-norm states [..., hidden], as far as a model's configuration says."""
    module, back = target.get_output_embeddings(), input_device(target)
    if module is None:
        return None
    device, cap = device_of(module, target), getattr(target.config.get_text_config(), "final_logit_softcapping", None)

    def made(hidden: Tensor) -> Tensor:
        logits: Tensor = module(hidden.to(device)).to(back)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return made
