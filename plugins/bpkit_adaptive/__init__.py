"""Policies by recent acceptance: `ema` by thresholds, `goodput` and `portfolio` by expected tokens over cost."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "ema",
        "bpkit_adaptive.ema:Ema",
        summary="Every few steps: a block size by the moving average of accepted tokens, as in SGLang.",
        config="bpkit_adaptive.ema:EmaConfig",
    )
    register(
        "goodput",
        "bpkit_adaptive.goodput:Goodput",
        summary="Before every draft: the block size with the most expected tokens per second, from recent acceptance.",
        config="bpkit_adaptive.goodput:GoodputConfig",
    )
    register(
        "portfolio",
        "bpkit_adaptive.portfolio:Portfolio",
        summary="Source and block size by expected tokens over cost, from what sources offer.",
        config="bpkit_adaptive.portfolio:PortfolioConfig",
    )
