"""Options of `onnx`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bpkit.installation.distribution import requirement
from bpkit.policy import PolicyConfig


class OnnxConfig(PolicyConfig):
    """Options of `onnx`."""

    path: str | None = Field(
        default=None, description="folder that `bpkit export` wrote, or the name of one that ships, as in onnx:forecast"
    )
    provider: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description=f"where it runs; cuda needs {requirement('gpu')}, and is never exchanged for the CPU silently",
    )
    allow_other_models: bool = Field(
        default=False, description="run it for models of other names than those that it was trained for"
    )
