"""Policies judged by replay, on prompts that nothing was chosen on."""

from __future__ import annotations

from bpkit.judge.evaluation.run import evaluate

__all__ = ["evaluate"]
