"""Observers: they are handed the record of every step, for metrics and logs. Importing this imports no torch.

One that fails is warned of, left out and counted; it cannot end a generation.

>>> from bpkit.decode.observers import Observer
>>> class Count(Observer):
...     steps = 0
...
...     def record(self, request, record):
...         self.steps += 1
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from bpkit.policy import PolicyError, validated
from bpkit.registry.resolve import resolve
from bpkit.types import Record, Seconds, Step


class ObserverError(PolicyError):
    """An observer cannot be used as it was asked for; the message says what to change."""


class ObserverConfig(BaseModel):
    """Base of every `Observer.Config`: frozen, and unknown options are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """What an observer learns about a generation.

    Attributes:
        number: of the generation, from 1; no two of a process share one.
        policy: as it was written, such as `fixed:4`; the name of the class if an instance was given.
        policy_repr: the policy with all its options.
        target, drafter: names or paths. drafter_kind: `block-diffusion`, `autoregressive` or `n-gram`.
        trained_block_size, max_block_size: as in `DecoderSpec`.
        rule: `coupled` or `rejection`.
        clock: class of the clock that `seconds` go by, such as `WallClock`.
        prompt_length: tokens. max_new_tokens: output tokens at most.
        temperature: 0 for greedy decoding. seed: of the noise, None for greedy decoding.
        stream_id: tells apart prompts that share a seed.
    """

    number: int
    policy: str
    policy_repr: str
    target: str
    drafter: str
    drafter_kind: str
    trained_block_size: int
    max_block_size: int
    rule: str
    clock: str
    prompt_length: int
    max_new_tokens: int
    temperature: float
    seed: int | None
    stream_id: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How a generation ended.

    Attributes:
        complete: False if nobody read it to its end, or if it failed.
        num_tokens: output tokens so far. num_steps: turns of the loop so far.
        seconds: over prefill and steps, on the decoder's clock.
        fallbacks: policy faults that the runtime mended; more than those of the steps, if the last `observe` or `end`
            failed.
        near_ties: over prefill and steps.
    """

    complete: bool
    num_tokens: int
    num_steps: int
    seconds: Seconds
    fallbacks: int
    near_ties: int


class Observer:
    """Is handed the records of generations. All methods may be left out, and none can end a generation.

    An observer is called between steps, in the thread that decodes. Its time is in no step's seconds, but the text
    waits for it. Generations may overlap: tell them apart by `request.number`. Records are shared: do not write to
    their tensors.

    Class attributes:
        Config: an `ObserverConfig` with the options and their defaults.
        wants_trees: whether steps are to say which trees were drafted (`Step.tree`), which takes a read of the device.
    """

    Config: ClassVar[type[ObserverConfig]] = ObserverConfig
    wants_trees: ClassVar[bool] = False

    def __init__(self, config: ObserverConfig | None = None, **options: Any) -> None:
        """Take a ready config, or options to validate. Raises PolicyError; what cannot work is refused here."""
        name = type(self).__name__
        self.config = config if config is not None else validated(self.Config, options, owner=name, what="observer")

    def begin(self, request: ObservedRequest) -> None:
        """A generation starts: nothing was computed yet."""

    def record(self, request: ObservedRequest, record: Record) -> None:
        """A `bpkit.Prefill`, first, or a `bpkit.Step`."""

    def record_rows(self, requests: Sequence[ObservedRequest], record: Record) -> None:
        """One record of several generations that shared a pass: row *i* is of `requests[i]`.

        Engines that serve many rows call it in place of `record`, which it calls for each row unless it is replaced by
        something quicker. Seconds and fallbacks are of all rows together.
        """
        for place, request in enumerate(requests):
            self.record(request, record.row(place))

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        """A generation ended, or was given up."""

    def close(self) -> None:
        """There will be no more: let go of files, ports and threads."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.model_dump().items())})"


ObserverLike = Observer | str | Mapping[str, Any]


def resolve_observer(observer: ObserverLike) -> Observer:
    """Make an observer from an instance, `name`, `name:value`, `name:key=value,...`, `./file.py:Class` or a mapping.

    Raises:
        PolicyError: the name or an option is unknown, or the observer refuses them.
    """
    return resolve(observer, Observer, what="observer")


class ObserverFaultWarning(UserWarning):
    """An observer failed and is left out; text and speed are not affected."""


class Observers:
    """The observers of a decoder, and of those made from it with `with_policy`.

    Attributes:
        active: those that are told.
        left_out: how many failed.
    """

    def __init__(self, observers: Sequence[ObserverLike] = ()) -> None:
        self.active: list[Observer] = []
        self.left_out = 0
        self._failed: list[Observer] = []
        try:
            for observer in observers:
                self.active.append(resolve_observer(observer))
        except Exception:
            self.close()
            raise

    @property
    def want_trees(self) -> bool:
        """Whether any wants the trees that were drafted."""
        return any(observer.wants_trees for observer in self.active)

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method of all; one that fails is not told of anything again."""
        for observer in tuple(self.active):
            try:
                getattr(observer, method)(*arguments)
            except Exception as error:
                self.active.remove(observer)
                self._failed.append(observer)
                self.left_out += 1
                _warn(observer, method, error, "is left out from now on")

    def close(self) -> None:
        """Close all, also those that failed. Nobody is told anything afterwards."""
        closing, self.active, self._failed = [*self.active, *self._failed], [], []
        for observer in closing:
            try:
                observer.close()
            except Exception as error:
                _warn(observer, "close", error, "is closed as far as it went")


def _warn(observer: Observer, method: str, error: Exception, outcome: str) -> None:
    name = type(observer).__name__
    message = f"observer {name}.{method}: {type(error).__name__}: {error}; {name} {outcome}"
    warnings.warn(message, ObserverFaultWarning, stacklevel=3)


next_number = count(1).__next__
"""Numbers the generations of this process."""


class Watching:
    """One generation, as its observers see it.

    Attributes:
        seconds: wall-clock time that observers have taken.
    """

    def __init__(self, observers: Observers, request: ObservedRequest | None) -> None:
        self.observers, self.request, self.seconds = observers, request, 0.0
        self._begun = self._ended = False
        self._tokens = self._steps = self._near_ties = 0
        self._spent = Seconds()

    def begin(self) -> None:
        """Before the first record is asked for; later calls do nothing."""
        if not self._begun and self.request is not None:
            self._begun = True
            self._tell("begin")

    def record(self, record: Record, place: int = 0) -> None:
        """After each record, in which this generation has a place."""
        if self.request is not None:
            record = record.row(place)
            self._tokens += record.tokens.shape[1]
            self._near_ties += sum(record.near_ties)
            self._spent += record.seconds
            self._steps += isinstance(record, Step)
            self._tell("record", record)

    def end(self, *, complete: bool, fallbacks: int) -> None:
        """Once; later calls, and those of a generation that never began, do nothing."""
        if self._begun and not self._ended:
            self._ended = True
            self._tell("end", Ending(complete, self._tokens, self._steps, self._spent, fallbacks, self._near_ties))

    def _tell(self, method: str, *what: Any) -> None:
        started = time.perf_counter()
        self.observers.tell(method, self.request, *what)
        self.seconds += time.perf_counter() - started
