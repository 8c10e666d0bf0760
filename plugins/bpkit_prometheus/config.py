"""Options of `prometheus`. Imports no prometheus_client, so that they can be listed without it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from bpkit.decode.observers import ObserverConfig


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
