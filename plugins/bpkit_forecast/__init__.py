"""`forecast`: tokens per second, planned ahead at every step."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "forecast",
        "bpkit_forecast.policy:Forecast",
        summary="Forecasts how far a draft would stand, and drafts what gains most time at the going speed; trained.",
        config="bpkit_forecast.policy:ForecastConfig",
    )
