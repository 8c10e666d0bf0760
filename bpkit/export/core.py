"""The *exportable* protocol: which decisions of a policy are one network each, and what goes in and comes out.

A core is everything that decides: networks, calibration, the table of sizes, comparisons. Whoever runs it needs no code
of the policy, only inputs by name:

- a feature (`bpkit.types.Feature`), float32, as in a `Context` or `Draft`;
- `block_size`, `draft_length`, `context_length`: int64 [batch];
- a cost curve: `step_seconds` [batch, 1 + sizes], `verify_seconds` [batch, largest size] at each row's context length,
  `typical_step_seconds` [1 + sizes] at a typical one (`bpkit.learn.curves`);
- per-request state by any other name, which an earlier output has: of another core by the same name, of the same core
  by the name with `next_` before it (ONNX has no output named like an input).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from bpkit.learn.curves import Curves
from bpkit.types import Feature

if TYPE_CHECKING:
    from torch import nn

Method = Literal["begin", "select", "extend", "truncate"]
DType = Literal["float32", "int64", "bool"]

DECIDES: dict[Method, str] = {
    "begin": "block_size",
    "select": "block_size",
    "extend": "go_on",
    "truncate": "verify_length",
}
"""The output that decides: int64 [batch], of `extend` bool [batch]."""
CURVES = ("step_seconds", "verify_seconds", "typical_step_seconds")
COUNTS = ("block_size", "draft_length", "context_length")
FEATURES = frozenset(map(str, Feature))
KNOWN = FEATURES | {*CURVES, *COUNTS}
"""Inputs that the runtime gives; every other one is state."""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        shape: names of the axes that vary, such as `batch` and `width`, and numbers.
        meaning: a sentence without a full stop, with the unit.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: DType
    meaning: str


@dataclass(frozen=True)
class Core:
    """One decision as a network.

    Attributes:
        method: of `bpkit.Policy` that it stands for.
        module: float32, eval mode; `forward` takes the inputs in order and returns a tuple of the outputs in order.
        margin: the output that says how clear each row's decision was, float32 [batch]: the distance to the nearest
            other decision, in units of the compared scores. Rows with a smaller margin than `tolerance` may be decided
            otherwise by another runtime.
        tolerance: largest difference of compared scores that rounding explains.
    """

    method: Method
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    margin: str = "margin"
    tolerance: float = 1e-4

    @property
    def state(self) -> frozenset[str]:
        """Inputs that earlier outputs give."""
        return frozenset(port.name for port in self.inputs) - KNOWN


@dataclass(frozen=True)
class Export:
    """What of a policy is written to files.

    Attributes:
        cores: by file stem: `policy`, or one for each of its decisions.
        block_sizes: that it chooses among, ascending from 1.
        curves: what steps cost, if a core reads it.
        drafts: block size of every draft, if no core chooses it.
    """

    cores: dict[str, Core]
    block_sizes: list[int]
    curves: Callable[[int], Curves] | None = None
    drafts: int | None = None


@runtime_checkable
class Exportable(Protocol):
    """A policy that `bpkit export` can write."""

    def export(self) -> Export:
        """Of the bound policy."""
        ...
