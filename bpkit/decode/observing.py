"""Hands records to observers. One that fails is warned of, left out and counted; it cannot end a generation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from itertools import count

from bpkit.decode.observers import Ending, ObservedRequest, Observer, ObserverLike, resolve_observer
from bpkit.types import Record, Seconds, Step

next_number = count(1).__next__
"""Numbers the generations of this process."""


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

    def begin(self, request: ObservedRequest) -> None:
        """Tell that a generation starts."""
        for observer in tuple(self.active):
            try:
                observer.begin(request)
            except Exception as error:
                self._leave_out(observer, "begin", error)

    def record(self, request: ObservedRequest, record: Record) -> None:
        """Tell of a record."""
        for observer in tuple(self.active):
            try:
                observer.record(request, record)
            except Exception as error:
                self._leave_out(observer, "record", error)

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        """Tell that a generation ended."""
        for observer in tuple(self.active):
            try:
                observer.end(request, ending)
            except Exception as error:
                self._leave_out(observer, "end", error)

    def close(self) -> None:
        """Close all, also those that failed. Nobody is told anything afterwards."""
        closing, self.active, self._failed = [*self.active, *self._failed], [], []
        for observer in closing:
            try:
                observer.close()
            except Exception as error:
                _warn(observer, "close", error, "is closed as far as it went")

    def _leave_out(self, observer: Observer, method: str, error: Exception) -> None:
        self.active.remove(observer)
        self._failed.append(observer)
        self.left_out += 1
        _warn(observer, method, error, "is left out from now on")


def _warn(observer: Observer, method: str, error: Exception, outcome: str) -> None:
    name = type(observer).__name__
    message = f"observer {name}.{method}: {type(error).__name__}: {error}; {name} {outcome}"
    warnings.warn(message, ObserverFaultWarning, stacklevel=3)


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
        if self._begun or self.request is None:
            return
        self._begun, started = True, time.perf_counter()
        self.observers.begin(self.request)
        self.seconds += time.perf_counter() - started

    def record(self, record: Record) -> None:
        """After each record."""
        if self.request is None:
            return
        started = time.perf_counter()
        self._tokens += record.tokens.shape[1]
        self._near_ties += sum(record.near_ties)
        self._spent += record.seconds
        self._steps += isinstance(record, Step)
        self.observers.record(self.request, record)
        self.seconds += time.perf_counter() - started

    def end(self, *, complete: bool, fallbacks: int) -> None:
        """Once; later calls, and those of a generation that never began, do nothing."""
        if self._ended or not self._begun or self.request is None:
            return
        self._ended, started = True, time.perf_counter()
        ending = Ending(complete, self._tokens, self._steps, self._spent, fallbacks, self._near_ties)
        self.observers.end(self.request, ending)
        self.seconds += time.perf_counter() - started
