"""The *exportable* protocol: which decisions of a policy are one network each, and what goes in and comes out.

A core is everything that decides: networks, calibration, the table of sizes, comparisons. Whoever runs it needs no code
of the policy, only inputs by name:

- a feature (`bpkit.types.Feature`), float32, as in a `Context` or `Draft`;
- a count (`COUNTS`): int64 [batch];
- a cost curve: `step_seconds` [batch, 1 + sizes], `verify_seconds` [batch, largest size] and, of drafts that are trees,
  `draft_seconds` [batch, positions] at each row's context length,
  `typical_step_seconds` [1 + sizes] at a typical one (`bpkit.export.curves`); or, of all rows together,
  `joint_draft_seconds` and `joint_verify_seconds` [widths, positions], `catch_up_seconds` [2]
  (`bpkit.export.position_costs`);
- state by any other name, which an earlier output has: of another core by the same name, of the same core by the name
  with `next_` before it (ONNX has no output named like an input). Its first axis is `batch`, or it is shared: one for
  all requests, and the policy is `joint`. Both begin as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from bpkit.export.curves import Curves
from bpkit.types import CostModel, DecoderSpec, Feature

if TYPE_CHECKING:
    from torch import nn

    from bpkit.policy import Policy, State

Method = Literal["begin", "select", "extend", "truncate", "observe"]
DType = Literal["float32", "int64", "bool"]

DECIDES: dict[Method, str] = {
    "begin": "block_size",
    "select": "block_size",
    "extend": "go_on",
    "truncate": "verify_length",
}
"""The output that decides: int64 [batch], of `extend` bool [batch]. `observe` decides nothing and only keeps state."""
COUNTS = ("position", "block_size", "draft_length", "context_length", "verify_length", "num_accepted")
TREE = ("parents", "ranks")
"""Outputs of `select` that say which tree to draft, as `bpkit.types.Plan` has them: int64 [batch, nodes] both."""
JOINT_COSTS = ("joint_draft_seconds", "joint_verify_seconds", "catch_up_seconds")
"""Costs of all rows together."""
FEATURES = frozenset(map(str, Feature))
KNOWN = FEATURES | {*COUNTS, "step_seconds", "verify_seconds", "draft_seconds", "typical_step_seconds", *JOINT_COSTS}
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


_GIVEN: dict[str, tuple[str, str]] = {
    Feature.LAST_HIDDEN: ("batch size", "final-norm hidden state that predicted the anchor"),
    Feature.TARGET_FEATURES: ("batch size", "the layers that the drafter reads"),
    Feature.ANCHOR_EMBEDDING: ("batch size", "the target's embedding of the anchor"),
    Feature.ANCHOR_LOG_PROBABILITY: ("batch", "log-probability of the anchor by the raw logits, in nats"),
    Feature.ANCHOR_ENTROPY: ("batch", "entropy of that distribution, in nats"),
    Feature.PREFILL_LOGITS: ("batch size", "raw target logits after the last prompt token"),
    Feature.PREFILL_HIDDEN: ("batch size", "final-norm hidden state of the last prompt token"),
    Feature.DRAFT_PROBABILITY: ("batch width", "the drafter's probability of each drafted token"),
    Feature.DRAFT_ENTROPY: ("batch width", "entropy of its distribution at each, in nats"),
    Feature.DRAFT_HIDDEN: ("batch width size", "the drafter's last hidden state that predicted each drafted token"),
    "position": ("batch", "output tokens decided so far; 1 at a request's first draft"),
    "block_size": ("batch", "of the draft"),
    "draft_length": ("batch", "drafted tokens"),
    "context_length": ("batch", "prompt and output tokens so far"),
    "verify_length": ("batch", "drafted tokens that were verified"),
    "num_accepted": ("batch", "drafted tokens that stood"),
    "step_seconds": (
        "batch size",
        "seconds of a step without a draft, then of each block size, at this row's context length",
    ),
    "verify_seconds": ("batch size", "seconds of a target pass over 1, 2, ... positions, at this row's context length"),
    "draft_seconds": (
        "batch size",
        "seconds of a step without its target pass: without a draft, then with one whose longest path has 2, 3, ... "
        "positions, anchor included, at this row's context length",
    ),
    "typical_step_seconds": ("size", "the same at a typical context length; it sets what a second is worth"),
    "joint_draft_seconds": (
        "size positions",
        "seconds of drafting for these rows by padded width and by 0, 1, ... drafted tokens of all rows together, "
        "without what the drafter catches up with; 0 at width 1",
    ),
    "joint_verify_seconds": (
        "size positions",
        "seconds of the target's pass and the rest of the step, likewise",
    ),
    "catch_up_seconds": (
        "2",
        "seconds that a draft takes longer for positions that wait: of the row with most, and with few such as after a "
        "step",
    ),
}
"""Axes and meaning of inputs; `size` is a number. What has no axis `batch` is of all rows together."""


def given(name: str, size: int = 1) -> Port:
    """An input that the runtime gives, with its usual shape and meaning.

    Args:
        size: length of its last axis, where that is not the batch or the width of the draft. Of costs: how many block
            sizes there are, 1 included, or the largest; of joint ones, how many widths.
    """
    axes, meaning = _GIVEN[name]
    shape = tuple(size if axis == "size" else int(axis) if axis.isdigit() else axis for axis in axes.split())
    return Port(str(name), shape, "int64" if name in COUNTS else "float32", meaning)


def decision(method: Method) -> Port:
    """The output that decides."""
    meaning = {
        "begin": "positions to draft at every step, anchor included",
        "select": "positions to draft, anchor included; 1 means no draft",
        "extend": "whether to draft one token more",
        "truncate": "drafted tokens to verify",
    }
    return Port(DECIDES[method], ("batch",), "bool" if method == "extend" else "int64", meaning[method])


def tree(nodes: int) -> tuple[Port, Port]:
    """The outputs of `select` that say which tree to draft, of at most so many nodes."""
    axes, meanings = (
        ("batch", nodes),
        ("node that each follows, -1 the anchor", "candidate that each is after it, 0 the best"),
    )
    parents, ranks = (
        Port(name, axes, "int64", f"{meaning}; the first block_size - 1 count")
        for name, meaning in zip(TREE, meanings, strict=True)
    )
    return parents, ranks


def following(port: Port) -> Port:
    """The output that a core takes as `port` the next time."""
    return Port(f"next_{port.name}", port.shape, port.dtype, port.meaning)


def margin(meaning: str) -> Port:
    """The output that says how clear each row's decision was."""
    return Port("margin", ("batch",), "float32", meaning)


@dataclass(frozen=True)
class Core:
    """One decision as a network.

    Attributes:
        method: of `bpkit.Policy` that it stands for.
        module: float32, eval mode; `forward` takes the inputs in order and returns a tuple of the outputs in order.
        margin: the output that says how clear each row's decision was, float32 [batch]: the distance to the nearest
            other decision, in units of the compared scores. Rows with a smaller margin than `tolerance` may be decided
            otherwise by another runtime. "" of `observe`.
        tolerance: largest difference of compared scores that rounding explains.
    """

    method: Method
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    margin: str = "margin"
    tolerance: float = 1e-4


def features_of(cores: Iterable[Core]) -> frozenset[Feature]:
    """What the networks read."""
    return frozenset(Feature(port.name) for core in cores for port in core.inputs if port.name in FEATURES)


@dataclass(frozen=True)
class Export:
    """What of a policy is written to files.

    Attributes:
        cores: by file stem: `policy`, or one for each of its decisions.
        block_sizes: that it chooses among, ascending from 1.
        curves: what steps cost, if a core reads it.
        drafts: block size of every draft, if no core chooses it.
        branches: candidates that a drafter must have at each position, where a core chooses trees.
        slope: of joint costs, what a further position of a row costs without a cost model, in plain steps of that row.
        state: of policies with shared state: what the cores take besides what a runtime gives, from the policy's state
            of the rows and from what it knows itself.
    """

    cores: dict[str, Core]
    block_sizes: list[int]
    curves: Callable[[int], Curves] | None = None
    drafts: int | None = None
    branches: int = 1
    slope: float | None = None
    state: Callable[[State], State] | None = None


@runtime_checkable
class Exportable(Protocol):
    """A policy that `bpkit export` can write."""

    def export(self) -> Export:
        """Of the bound policy."""
        ...


@runtime_checkable
class Foldable(Protocol):
    """A policy on raw logits that can decide from the hidden state that they come from (`bpkit export --fold`)."""

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        """As of every policy; before it is folded."""
        ...

    def folded(self, lm_head: nn.Module, *, config: Any = None) -> Policy:
        """A policy with the target's head in its first layer.

        Args:
            config: of the target, to see what it does to the logits behind its head.

        Raises:
            PolicyError: what stands between hidden state and first layer is not affine, or not known to be.
        """
        ...
