"""Counts steps, and lets Prometheus read the counts. Importing this imports no prometheus_client."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from bpkit.decode.observers import Ending, ObservedRequest, Observer, ObserverConfig, ObserverError
from bpkit.installation.distribution import install_command
from bpkit.types import Prefill, Record, Step

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class PrometheusConfig(ObserverConfig):
    """Where the metrics can be read: at a port, in a file, or both."""

    port: int | None = Field(default=None, ge=0, le=65535, description="serve them at this port; 0 takes a free one")
    address: str = Field(default="127.0.0.1", description="where to listen; 0.0.0.0 lets other machines read them")
    textfile: Path | None = Field(default=None, description="write them here after each generation: FILE.prom")

    @field_validator("textfile")
    @classmethod
    def _is_collected(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            raise ValueError(f"{str(path)!r} does not end in .prom, and the node exporter reads no other files")
        return path


class Prometheus(Observer):
    """Metrics of all generations that it is told of.

    Args:
        registry: where the metrics go, for programs that serve a registry of their own; by default a new one.

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
            from prometheus_client import CollectorRegistry

            from bpkit_prometheus.metrics import Metrics
        except ImportError as error:
            raise ObserverError(
                f"observer 'prometheus' needs prometheus_client ({error}): {install_command('prometheus')}"
            ) from error
        if registry is None and self.config.port is None and self.config.textfile is None:
            raise ObserverError("observer 'prometheus': say where to read it: port=9464, or textfile=bpkit.prom")
        self.registry = registry or CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self._one: Callable[..., Any] = cache(lambda metric, *labels: metric.labels(*labels))
        """The series of a metric with these labels, found quickly."""
        self._fallbacks: dict[int, int] = {}
        self._server: Any = None
        self._write()
        self.port = self._serve() if self.config.port is not None else None

    def begin(self, request: ObservedRequest) -> None:
        self._fallbacks[request.number] = 0
        self._one(self.metrics.prompt_tokens, request.policy, request.drafter).inc(request.prompt_length)

    def record(self, request: ObservedRequest, record: Record) -> None:
        labels, metrics = (request.policy, request.drafter), self.metrics
        self._one(metrics.tokens, *labels).inc(record.tokens.numel())
        self._one(metrics.near_ties, *labels).inc(sum(record.near_ties))
        if isinstance(record, Prefill):
            self._one(metrics.prefill_seconds, *labels).inc(record.seconds.total)
            return
        self._count_tokens(labels, record)
        self._one(metrics.steps, *labels).inc()
        self._one(metrics.fallbacks, *labels).inc(record.fallbacks)
        self._fallbacks[request.number] += record.fallbacks
        self._one(metrics.decision, *labels).observe(record.seconds.policy)
        for phase, seconds in dataclasses.asdict(record.seconds).items():
            self._one(metrics.step, *labels, phase).observe(seconds)

    def _count_tokens(self, labels: tuple[str, str], step: Step) -> None:
        metrics = self.metrics
        for lengths, total, by_position in (
            (step.draft_length, metrics.drafted, metrics.drafted_at),
            (step.verify_length, metrics.verified, metrics.verified_at),
            (step.num_accepted, metrics.accepted, metrics.accepted_at),
        ):
            for length in lengths.tolist():  # of each row
                self._one(total, *labels).inc(length)
                for position in range(1, length + 1):
                    self._one(by_position, *labels, position).inc()

        columns = (step.source, step.draft_length, step.verify_length, step.num_accepted)
        for source, drafted, verified, accepted in zip(*(column.tolist() for column in columns), strict=True):
            by = source if drafted else "none"
            self._one(metrics.steps_by, *labels, by).inc()
            self._one(metrics.verified_by, *labels, by).inc(verified)
            self._one(metrics.accepted_by, *labels, by).inc(accepted)

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        labels = (request.policy, request.drafter)
        # Faults of the last `observe` and of `end` are in no step.
        late = ending.fallbacks - self._fallbacks.pop(request.number)
        self._one(self.metrics.fallbacks, *labels).inc(late)
        self._one(self.metrics.requests, *labels, "complete" if ending.complete else "given_up").inc()
        self._write()

    def close(self) -> None:
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
