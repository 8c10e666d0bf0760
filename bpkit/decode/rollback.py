"""Logits processors under speculation: they are called for positions that are then taken back.

A processor says itself that its calls do not depend on earlier ones (`stateless = True`), or can be taken back to the
state that it had at a position, more than once (`snapshot()` and `restore(state)`). One that says neither is served if
all that Python sees of it is plain and no call changes it, and otherwise refused. The function of
`prefix_allowed_tokens_fn` is treated alike; docs/generate.md tells users.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.generation import logits_process

from bpkit.decode.visible_state import VisibleState


def _known(*names: str) -> frozenset[type]:
    """Classes of transformers by name, those that this version has."""
    return frozenset(getattr(logits_process, name) for name in names if hasattr(logits_process, name))


# All are matched by exact type: a subclass may do anything.
PREFIX_FREE = _known(
    "BarkEosPrioritizerLogitsProcessor",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)
"""They look at one position's scores only, so that all positions of a block can pass in one call."""

STATELESS = _known(
    "AlternatingCodebooksLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",  # its generator is seeded anew by the tokens before each position
    "WhisperTimeStampLogitsProcessor",
)
"""They look at the tokens before a position as well."""

STATEFUL = _known(
    "DiaEOSDelayPatternLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WhisperNoSpeechDetection",
)
"""They keep something from call to call, and cannot give it back."""

PREFIX_CONSTRAINED = logits_process.PrefixConstrainedLogitsProcessor
"""It does what a function of the user's says."""


class Rollback:
    """What the processors of one request remember, position by position.

    Args:
        processors: of the request, before the first call.

    Attributes:
        foreign: whether one is not of transformers.

    Raises:
        ValueError: one keeps state and cannot be rolled back.
    """

    def __init__(self, processors: Iterable[Any]) -> None:
        self._rolling: list[Any] = []
        self._watched: list[VisibleState] = []
        self.foreign = False
        for processor in processors:
            if type(processor) not in PREFIX_FREE | STATELESS:
                self._admit(processor)
        self._first = self._now()
        self._before: dict[int, list[Any]] = {}
        """States before the call at a position, by the tokens before that position."""

    def _admit(self, processor: Any) -> None:
        if type(processor) in STATEFUL:
            raise ValueError(
                f"logits processor {type(processor).__name__} keeps state from token to token, and cannot go back "
                "where drafted tokens are rejected; leave it out"
            )
        self.foreign = True
        subject = processor._prefix_allowed_tokens_fn if type(processor) is PREFIX_CONSTRAINED else processor
        for declares in (subject, getattr(subject, "__self__", subject)):  # a method, or its object
            if getattr(declares, "stateless", None) is True:
                return
            if callable(getattr(declares, "snapshot", None)) and callable(getattr(declares, "restore", None)):
                self._rolling.append(declares)
                return
        state = VisibleState(subject)
        if state.opaque is not None:
            raise ValueError(_refusal(subject, f"holds {state.opaque}, which may keep state that Python cannot see"))
        self._watched.append(state)

    def enter(self, length: int) -> None:
        """Before the calls at the position after `length` tokens. Raises RuntimeError if that was never reached."""
        if not self._rolling:
            return
        if not self._before:
            self._before[length] = self._first
        if length not in self._before:
            raise RuntimeError(f"logits processors cannot go to position {length}: the one before was not called")
        for processor, state in zip(self._rolling, self._before[length], strict=True):
            processor.restore(state)

    def leave(self, length: int) -> None:
        """After the calls at the position after `length` tokens."""
        if self._rolling:
            self._before[length + 1] = self._now()

    def _now(self) -> list[Any]:
        return [processor.snapshot() for processor in self._rolling]

    def check(self) -> None:
        """Raise ValueError if a processor that is watched changed: what it returned may be wrong."""
        for state in self._watched:
            if (place := state.changed()) is not None:
                raise ValueError(_refusal(state.subject, f"keeps state: a call changed {place}"))

    def settle(self, length: int) -> None:
        """`length` tokens are decided: forget states that cannot come back."""
        if self._rolling:
            self._before = {at: states for at, states in self._before.items() if at >= length}

    def finish(self, length: int) -> None:
        """The text ended with `length` tokens: restore the state after them, where that is known."""
        if length in self._before:
            self.enter(length)


def _refusal(subject: Any, why: str) -> str:
    name = getattr(subject, "__qualname__", None) or type(subject).__qualname__
    return (
        f"logits processor {name} {why}; speculative decoding calls processors for drafted tokens that it then takes "
        "back. If a call does not depend on earlier ones, set `stateless = True` on it; otherwise give it methods "
        "snapshot() and restore(state), or leave it out"
    )
