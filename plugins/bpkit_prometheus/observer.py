"""Counts steps, and lets Prometheus read the counts. Importing this imports no prometheus_client."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from bpkit.decode.observers import Ending, ObservedRequest, Observer, ObserverConfig, ObserverError
from bpkit.installation.distribution import install_command
from bpkit.types import Prefill, Record, Step

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from bpkit_prometheus.metrics import Metrics

Labels = tuple[str, str]
Row = tuple[int, int, int, int]
"""Tokens that were drafted, verified and accepted, and the source."""
WAIT = 0.5
"""Seconds for which the tokens of many rows may wait until they are counted, while any of them runs."""
PHASES = ("draft", "verify", "policy", "rest")
"""Of a step's seconds."""


class PrometheusConfig(ObserverConfig):
    """Where the metrics can be read: at a port, in a file, or beside those of the program around it."""

    port: int | None = Field(default=None, ge=0, le=65535, description="serve them at this port; 0 takes a free one")
    address: str = Field(default="127.0.0.1", description="where to listen; 0.0.0.0 lets other machines read them")
    textfile: Path | None = Field(default=None, description="write them here after each generation: FILE.prom")

    shared: bool = Field(
        default=False, description="put them into the process's default registry, which the program around it serves"
    )

    @field_validator("textfile")
    @classmethod
    def _is_collected(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            raise ValueError(f"{str(path)!r} does not end in .prom, and the node exporter reads no other files")
        return path


@cache
def _shared_metrics() -> Metrics:
    """Those of the default registry, which all observers of the process share."""
    from prometheus_client import REGISTRY

    from bpkit_prometheus.metrics import Metrics

    return Metrics(REGISTRY)


class Prometheus(Observer):
    """Metrics of all generations that it is told of.

    Args:
        registry: where the metrics go, for programs that serve a registry of their own; by default a new one, or with
            `shared` the default one of prometheus_client. Where PROMETHEUS_MULTIPROC_DIR was set before that was
            imported, its files have the values of every process.

    Attributes:
        registry: that has the metrics.
        port: where they are served, or None.

    Raises:
        ObserverError: prometheus_client is not installed, or nobody could read the metrics.
    """

    Config = PrometheusConfig
    config: PrometheusConfig

    def __init__(
        self, config: ObserverConfig | None = None, *, registry: CollectorRegistry | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        try:
            from prometheus_client import REGISTRY, CollectorRegistry

            from bpkit_prometheus.metrics import Metrics
        except ImportError as error:
            raise ObserverError(
                f"observer 'prometheus' needs prometheus_client ({error}): {install_command('prometheus')}"
            ) from error
        shared = self.config.shared and registry is None
        if registry is None and not shared and self.config.port is None and self.config.textfile is None:
            raise ObserverError(
                "observer 'prometheus': say where to read it: port=9464, or textfile=bpkit.prom; in a program that "
                "serves prometheus_client's default registry, shared=true"
            )
        self.registry = registry or (REGISTRY if shared else CollectorRegistry())
        self.metrics = _shared_metrics() if shared else Metrics(self.registry)
        self._one: Callable[..., Any] = cache(lambda metric, *labels: metric.labels(*labels))
        """The series of a metric with these labels, found quickly."""
        self._fallbacks: dict[int, int] = {}
        """Of the generations that run."""
        self._waiting: dict[Labels, list[tuple[Step, Sequence[int]]]] = {}
        self._due = 0.0
        self._server: Any = None
        self._write()
        self.port = self._serve() if self.config.port is not None else None

    def begin(self, request: ObservedRequest) -> None:
        self._fallbacks[request.number] = 0
        self._one(self.metrics.prompt_tokens, request.policy, request.drafter).inc(request.prompt_length)

    def record(self, request: ObservedRequest, record: Record) -> None:
        self.record_rows([request], record)
        self._count_waiting()

    def record_rows(self, requests: Sequence[ObservedRequest], record: Record) -> None:
        rows: dict[Labels, list[int]] = {}
        for place, request in enumerate(requests):
            rows.setdefault((request.policy, request.drafter), []).append(place)
        for labels, places in rows.items():
            near_ties = sum(record.near_ties[place] for place in places) if record.near_ties else 0
            self._one(self.metrics.near_ties, *labels).inc(near_ties)
            if isinstance(record, Prefill):
                self._one(self.metrics.tokens, *labels).inc(len(places))
                self._one(self.metrics.prefill_seconds, *labels).inc(record.seconds.total)
            else:
                self._count_step(labels, record, places)
        if isinstance(record, Step) and record.fallbacks:
            for request in requests:
                self._fallbacks[request.number] += record.fallbacks
        if time.monotonic() >= self._due:
            self._count_waiting()

    def _count_step(self, labels: Labels, step: Step, places: Sequence[int]) -> None:
        metrics, seconds = self.metrics, step.seconds
        self._waiting.setdefault(labels, []).append((step, places))
        self._one(metrics.fallbacks, *labels).inc(step.fallbacks)
        self._one(metrics.decision, *labels).observe(seconds.policy)
        for phase in PHASES:
            self._one(metrics.step, *labels, phase).observe(getattr(seconds, phase))

    def _count_waiting(self) -> None:
        """Count the tokens of steps that wait: at once they would take as long as deciding does."""
        self._due = time.monotonic() + WAIT
        waiting, self._waiting = self._waiting, {}
        for labels, steps in waiting.items():
            alike = Counter[Row]()
            for step, places in steps:
                columns = (step.draft_length, step.verify_length, step.num_accepted, step.source)
                rows = list(zip(*(column.tolist() for column in columns), strict=True))
                alike.update(rows if len(places) == len(rows) else [rows[place] for place in places])
            self._count_tokens(labels, alike)

    def _count_tokens(self, labels: Labels, alike: Mapping[Row, int]) -> None:
        """Count rows of steps: how many there are of each kind."""
        metrics = self.metrics
        for place, total, by_position in (
            (0, metrics.drafted, metrics.drafted_at),
            (1, metrics.verified, metrics.verified_at),
            (2, metrics.accepted, metrics.accepted_at),
        ):
            lengths = Counter[int]()
            for row, count in alike.items():
                lengths[row[place]] += count
            self._one(total, *labels).inc(sum(length * count for length, count in lengths.items()))
            for position, count in enumerate(_reaching(lengths), start=1):
                self._one(by_position, *labels, position).inc(count)
        self._one(metrics.tokens, *labels).inc(
            sum((accepted + 1) * count for (_, _, accepted, _), count in alike.items())
        )
        self._one(metrics.steps, *labels).inc(sum(alike.values()))
        for (drafted, verified, accepted, source), count in alike.items():
            by = source if drafted else "none"
            self._one(metrics.steps_by, *labels, by).inc(count)
            self._one(metrics.verified_by, *labels, by).inc(verified * count)
            self._one(metrics.accepted_by, *labels, by).inc(accepted * count)

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        labels = (request.policy, request.drafter)
        # Faults of the last `observe` and of `end` are in no step.
        late = ending.fallbacks - self._fallbacks.pop(request.number)
        self._one(self.metrics.fallbacks, *labels).inc(late)
        if not self._fallbacks or time.monotonic() >= self._due:
            self._count_waiting()
        self._one(self.metrics.requests, *labels, "complete" if ending.complete else "given_up").inc()
        self._write()

    def close(self) -> None:
        self._count_waiting()
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def _write(self) -> None:
        """Write the file, whole or not at all. Raises ObserverError."""
        if self.config.textfile is None:
            return
        from prometheus_client import write_to_textfile

        try:
            write_to_textfile(os.fspath(self.config.textfile), self.registry)
        except OSError as error:
            path = str(self.config.textfile)
            raise ObserverError(f"observer 'prometheus': cannot write textfile {path!r}: {error}") from error

    def _serve(self) -> int:
        from prometheus_client import start_http_server

        assert self.config.port is not None
        try:
            self._server = start_http_server(self.config.port, self.config.address, self.registry)
        except OSError as error:
            at = f"{self.config.address}:{self.config.port}"
            raise ObserverError(f"observer 'prometheus': cannot listen at {at} ({error}): try another port") from error
        return int(self._server[0].server_port)


def _reaching(lengths: Mapping[int, int]) -> list[int]:
    """How many drafts have a token at each position, from the first to the last that any has.

    Args:
        lengths: how many drafts there are of each length.

    >>> _reaching({3: 1, 0: 5, 1: 2})
    [3, 1, 1]
    """
    ending = [lengths.get(length, 0) for length in range(max(lengths), 0, -1)]
    return list(accumulate(ending))[::-1]
