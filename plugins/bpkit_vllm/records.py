"""Tells observers what the scheduler did, and vLLM's log what decisions took. Importing this imports no vLLM.

The scheduler calls `begin` for each request, `record` once for all rows of a policy that shared a pass, `end` for each
request, `summary` after each step and `close`. A row is known by its number in `row_ids`, no two of a scheduler alike.

What `ObservedRequest` says, inside vLLM:

- `rule` is `rejection`, also of greedy requests, whose drafted tokens stand if they are the target's best.
- `seed` is the request's own; None if it gave none, so that its text cannot be drawn again, and for greedy decoding.
- `clock` is `WallClock`: seconds are those of the scheduler's process, and `policy` is the time of decisions in it.
- `stream_id` is 0. Near-ties are not counted.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bpkit.decode.observers import Ending, ObservedRequest, ObserverError, ObserverLike, Observers, next_number
from bpkit.policy import Policy
from bpkit.registry.resolve import parse_spec
from bpkit.types import DecoderSpec, Record, Seconds, Step

SUMMARY_SECONDS, FIRST_SUMMARY = 60.0, 10.0
"""Between two lines of a policy in the log, and before the first."""
_EPSILON = 1e-5
"""Temperatures below it are greedy decoding to vLLM."""
_FILES = "PROMETHEUS_MULTIPROC_DIR"
log = logging.getLogger("vllm.bpkit")


class Counters(Protocol):
    """Of one policy, since the engine started.

    Attributes:
        steps: decided. rows: of all steps together.
        seconds: that deciding took. fallbacks: faults that were mended.
    """

    steps: int
    rows: int
    seconds: float

    @property
    def fallbacks(self) -> int: ...


@dataclass(slots=True)
class _Row:
    """A running request, and what was recorded of it; seconds by phase."""

    request: ObservedRequest
    tokens: int = 0
    steps: int = 0
    near_ties: int = 0
    fallbacks: int = 0
    draft: float = 0.0
    verify: float = 0.0
    policy: float = 0.0
    rest: float = 0.0

    def spend(self, seconds: Seconds) -> None:
        self.draft += seconds.draft
        self.verify += seconds.verify
        self.policy += seconds.policy
        self.rest += seconds.rest


class Records:
    """The observers of an engine.

    Args:
        observers: as in `additional_config`. `prometheus` without a port and a file is served by vLLM's own `/metrics`.

    Raises:
        PolicyError: an observer is unknown, an option is wrong, or nobody could read its metrics.
    """

    def __init__(self, observers: Sequence[ObserverLike] = ()) -> None:
        self.observers = Observers([_beside_vllm(observer) for observer in observers])
        self._rows: dict[int, _Row] = {}
        self._said: dict[str, tuple[int, int, float, int]] = {}
        self._next_summary = time.monotonic() + FIRST_SUMMARY

    def begin(
        self,
        number: int,
        policy_text: str,
        policy: Policy,
        spec: DecoderSpec,
        prompt_length: int,
        max_new_tokens: int,
        sampling_params: Any,
    ) -> None:
        """A request's first token is about to be decided.

        Args:
            number: of its row. policy_text: the policy as it was written.
            sampling_params: vLLM's, of which temperature and seed are read.
        """
        if not self.observers.active:
            return
        greedy = sampling_params.temperature < _EPSILON
        request = ObservedRequest(
            number=next_number(),
            policy=policy_text,
            policy_repr=repr(policy),
            target=spec.target,
            drafter=spec.drafter,
            drafter_kind=spec.drafter_kind,
            trained_block_size=spec.trained_block_size,
            max_block_size=spec.max_block_size,
            rule=spec.verify_rule,
            clock="WallClock",
            prompt_length=prompt_length,
            max_new_tokens=max_new_tokens,
            temperature=0.0 if greedy else sampling_params.temperature,
            seed=None if greedy else sampling_params.seed,
            stream_id=0,
        )
        self._rows[number] = _Row(request)
        self.observers.tell("begin", request)

    def record(self, record: Record) -> None:
        """Rows that shared a pass, by `record.row_ids`, which began and did not end."""
        if not self.observers.active:
            return
        rows = [self._rows[number] for number in record.row_ids]
        if isinstance(record, Step):
            for row, accepted in zip(rows, record.num_accepted.tolist(), strict=True):
                row.tokens += accepted + 1
                row.steps += 1
                row.fallbacks += record.fallbacks
                row.spend(record.seconds)
        else:
            for row in rows:
                row.tokens += 1
                row.spend(record.seconds)
        for row, near_ties in zip(rows, record.near_ties, strict=False):
            row.near_ties += near_ties
        self.observers.tell("record_rows", [row.request for row in rows], record)

    def end(self, number: int, *, complete: bool, fallbacks: int = 0) -> None:
        """A request ended; one that never began is not told of.

        Args:
            complete: False if it was aborted.
            fallbacks: faults of its policy since the last record, such as that of `Policy.end`.
        """
        row = self._rows.pop(number, None)
        if row is not None:
            seconds = Seconds(row.draft, row.verify, row.policy, row.rest)
            faults = row.fallbacks + fallbacks
            ending = Ending(complete, row.tokens, row.steps, seconds, faults, row.near_ties)
            self.observers.tell("end", row.request, ending)

    def summary(self, counters: Mapping[str, Counters], *, last: bool = False) -> None:
        """Say what each policy decided since the last time, in vLLM's log, if it is time for that or the last time.

        Args:
            counters: by the policy as it was written.
        """
        now = time.monotonic()
        if now < self._next_summary and not last:
            return
        self._next_summary = now + SUMMARY_SECONDS
        for name, current in counters.items():
            steps, rows, seconds, fallbacks = self._said.get(name, (0, 0, 0.0, 0))
            self._said[name] = (current.steps, current.rows, current.seconds, current.fallbacks)
            count = current.steps - steps
            if count or current.fallbacks > fallbacks:
                log.info(
                    "bpkit policy %s: %d steps of %.1f rows, %.3f ms a decision, %d faults mended (%d since the start)",
                    name,
                    count,
                    (current.rows - rows) / max(count, 1),
                    1e3 * (current.seconds - seconds) / max(count, 1),
                    current.fallbacks - fallbacks,
                    current.fallbacks,
                )

    def close(self) -> None:
        """The engine stops: what still runs is given up."""
        for number in list(self._rows):
            self.end(number, complete=False)
        self.observers.close()


def _beside_vllm(observer: ObserverLike) -> ObserverLike:
    """`prometheus` without a port and a file, told to put its metrics where vLLM serves its own.

    Raises:
        ObserverError: they would be in another process than the server.
    """
    if not isinstance(observer, (str, Mapping)):
        return observer
    given = parse_spec(observer) if isinstance(observer, str) else dict(observer)
    if given.get("name") != "prometheus" or {"", "port", "textfile", "shared"} & set(given):
        return observer
    if multiprocessing.parent_process() is not None and not os.environ.get(_FILES):
        raise ObserverError(
            f"observer 'prometheus': the engine runs in a process of its own, so that vLLM's /metrics does not show "
            f"its metrics: set {_FILES} to an empty folder before vLLM starts, or give the observer a port of its own: "
            "prometheus:port=9464"
        )
    return {**given, "shared": True}
