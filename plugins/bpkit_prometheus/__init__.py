"""`prometheus`: what drafting and verifying do, as metrics of Prometheus."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_observers(register: Register) -> None:
    register(
        "prometheus",
        "bpkit_prometheus.observer:Prometheus",
        summary="Metrics of Prometheus: to be scraped from a port, or in a file for the node exporter.",
        config="bpkit_prometheus.observer:PrometheusConfig",
    )
