"""Passes that are captured once and replayed: the kernels of a pass as one launch, without the host's time for each.

A captured pass (a CUDA graph) repeats its kernels at the addresses and in the shapes that they had. So there is one for
each of a few shapes, to which rows, positions and columns are padded; a pass's inputs are copied into buffers that
stay; and it runs over slots that stay, which are lent to one session after the other. Places, positions and masks are
computed inside, from the tokens that each row holds: a step copies tokens and counts, nothing else.

Columns are a part of the shape because attention with a mask costs by the columns that it is given, whether seen or
not: passes over the whole capacity would pay for the longest text at every step. With 256, 384, 512, 768, 1024 and so
on a pass is given at most one and a half times what it needs, and there are few of them. A sliding window is a part of
the mask: its layers are given all of these columns.

Without a GPU everything but the capture itself can be run: a replay then calls the function on the buffers.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from bpkit.decode.slots import STEP, SlotCache
from bpkit.decode.target import counts_positions

Mode = Literal["auto", "off", "on"]
WIDTHS = (1, 2, 4, 8, 16, 24, 32)
"""Positions of a row to which passes are padded. Wider ones are run as they are: the device's time counts there."""
COLUMNS = 256
"""The fewest columns that a captured pass is given."""

Outputs = tuple[Tensor | None, ...]
"""Of a pass, each [rows, positions, ...]."""
Function = Callable[..., Outputs]
"""A pass over its inputs."""


class CaptureWarning(UserWarning):
    """Passes are not captured; the text is the same and takes longer."""


@runtime_checkable
class Capturable(Protocol):
    """A session whose passes may be captured."""

    graphs: Graphs | None
    slot_cache: SlotCache

    @property
    def model(self) -> PreTrainedModel: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """To what a pass is padded.

    Attributes:
        rows: of its buffers. widths: positions of each row, of each input that has some.
        end: columns of the slots that it reads.
    """

    rows: int
    widths: tuple[int, ...]
    end: int


@dataclass(frozen=True, slots=True)
class Input:
    """What is copied into the first places of a buffer of a larger shape."""

    given: Tensor
    shape: tuple[int, ...]


class Capture:
    """What a decoder captures: passes of its target, and of each drafter that it meets.

    Args:
        target: as the decoder was given it. model: of transformers, inside of it.
        serves: the kind of session that serves the target.

    Raises:
        ValueError: mode `on`, and the passes of this target cannot be captured.
    """

    def __init__(self, mode: Mode, target: Any, model: PreTrainedModel, serves: type) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"capture={mode!r} is none of: {', '.join(get_args(Mode))}")
        self.mode, self.model = mode, model
        self.said = False
        device = model.device
        self.real = device.type == "cuda" and torch.cuda.is_available()
        self.wanted = mode == "on" or (mode == "auto" and self.real)
        self.target: Graphs | None = None
        self._drafters: weakref.WeakKeyDictionary[Any, Graphs | None] = weakref.WeakKeyDictionary()
        if self.wanted:
            cuda: Any = torch.cuda
            self._pool: Any = cuda.graph_pool_handle() if self.real else None
            self._side: Any = cuda.Stream(device) if self.real else None
            self.target = self._graphs(_why_not(target, model, serves), model)

    def attach(self, session: object, drafter: object, drafting: object) -> None:
        """Let sessions of the target and of a drafter, where they know of it, capture their passes.

        Args:
            drafting: the drafter's session, or one that reads with another session, its `reader`.
        """
        if self.target is not None and isinstance(session, Capturable):
            session.graphs = self.target
        reading = getattr(drafting, "reader", drafting)
        if self.wanted and isinstance(reading, Capturable) and getattr(reading, "wrapper", None) is None:
            if drafter not in self._drafters:
                self._drafters[drafter] = self._graphs(_unfit(reading.model, self.model), reading.model, must=False)
            reading.graphs = self._drafters[drafter]

    def refuse(self, reason: str, must: bool = True) -> None:
        """Say once why passes run plainly, or raise if they must not."""
        if must and self.mode == "on":
            raise ValueError(f"capture='on': passes cannot be captured, because {reason}; use capture='auto'")
        if not self.said:
            self.said = True
            warnings.warn(f"passes are not captured, because {reason} (said once)", CaptureWarning, stacklevel=3)

    def _graphs(self, reason: str | None, model: PreTrainedModel, must: bool = True) -> Graphs | None:
        if reason is None:
            return Graphs(self, model)
        self.refuse(reason, must)
        return None

    def record(self, run: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        """Capture what a function does on the device; it has no effect before a replay.

        All graphs share one pool of memory, so that a replay may overwrite what another has given.

        Raises:
            RuntimeError: it waits for the device or does something else that cannot be captured.
        """
        side, device, graph = self._side, self.model.device, torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(device)
        # The outer context restores the stream where the capture fails.
        with torch.cuda.device(device), torch.cuda.stream(current):
            side.wait_stream(current)
            with torch.cuda.stream(side), _NoWaiting():
                run()  # libraries initialise themselves; what would make a capture fail is found before one has begun
            current.wait_stream(side)
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                outputs = run()
        return graph, outputs


class Graphs:
    """Captured passes of one model over slots that stay, which the session that came last uses.

    A session moves into them when it first makes a pass that can be captured, and the one that was there before gets a
    copy of what it holds, and goes on plainly. Slots that become more or longer have other addresses: graphs are then
    captured again.
    """

    def __init__(self, capture: Capture, model: PreTrainedModel) -> None:
        self.capture, self.model = capture, model
        self.slots: SlotCache | None = None
        self.kept: dict[tuple[Any, ...], Graph] = {}
        self.stopped, self.compared = False, False
        self._session: Callable[[], Capturable | None] = lambda: None
        self._lent: weakref.WeakSet[Any] = weakref.WeakSet()
        self._addresses: tuple[Any, ...] = ()
        self._moving, self._thread = threading.Lock(), 0

    def lent_to(self, session: Capturable) -> bool:
        """Whether the session has the slots that stay."""
        return self._session() is session

    def shape(self, session: Capturable, *widths: int) -> Shape | None:
        """To what the session's next pass is padded, or None if it runs as it is.

        Args:
            widths: positions of its inputs, all of which are written one after the other.
        """
        buckets = tuple(next((bucket for bucket in WIDTHS if bucket >= width), 0) for width in widths)
        if self.stopped or 0 in buckets or not self._lend(session):
            return None
        slots = session.slot_cache
        rows, end = len(slots.held), max(slots.held) + sum(buckets)
        return Shape(min(_power_of_two(rows), slots.slots), buckets, min(_columns(end), slots.capacity + 1))

    def run(
        self,
        shape: Shape,
        wanted: tuple[int, ...],
        inputs: Sequence[Input],
        function: Function,
        size: tuple[int, int],
        plain: Callable[[], Tensor] | None = None,
    ) -> Outputs | None:
        """Replay a pass, after it was captured if it never was; None where that failed.

        Args:
            wanted: what else tells passes of one shape apart.
            function: the pass over buffers. It allocates nothing that stays, and reads nothing from the device.
            size: rows and positions of the outputs that count.
            plain: gives the first output without any padding, with which the first replay is compared.

        Returns:
            copies, which no later replay overwrites.
        """
        graph = self.kept.get((shape, wanted))
        if graph is None:
            try:
                graph = Graph(inputs, function, self.model.device, self.capture)
            except RuntimeError as error:
                said = str(error).splitlines()
                self._stop(
                    f"{type(self.model).__name__} cannot be captured: {said[0] if said else type(error).__name__}"
                )
                return None
            self.kept[shape, wanted] = graph
        rows, width = size
        outputs = graph.replay(inputs, function)
        found = tuple(None if output is None else output[:rows, :width].clone() for output in outputs)
        if plain is not None and not self.compared:
            self.compared = True
            if not _agree(found[0], plain()):
                self._stop(f"a captured pass of {type(self.model).__name__} gives other scores than the pass itself")
                return None
        return found

    def _stop(self, reason: str) -> None:
        self.stopped = True
        self.kept.clear()
        self.capture.refuse(reason)

    def _lend(self, session: Capturable) -> bool:
        """Whether the session has the slots that stay, once it was given them if it may have them."""
        if self._session() is not session and not self._may_move_in(session):
            return False
        weight = next(self.model.parameters())
        addresses = (session.slot_cache.room, weight.device, weight.data_ptr() if self.capture.real else 0)
        if addresses != self._addresses:
            self.kept.clear()
            self._addresses = addresses
        return True

    def _may_move_in(self, session: Capturable) -> bool:
        """Let a session in, once, unless another thread has one there, which may be in the middle of a pass."""
        if session in self._lent or not session.slot_cache.written:
            return False
        with self._moving:
            if self._session() is not None and self._thread != threading.get_ident():
                return False
            try:
                self._move_in(session)
            except torch.OutOfMemoryError:
                self._stop("there is no memory for slots that stay beside those of a generation that begins")
                return False
            self._thread = threading.get_ident()
            return True

    def _move_in(self, session: Capturable) -> None:
        before, slots, own = self._session(), self.slots, session.slot_cache
        if before is not None and slots is not None:
            copied = SlotCache(slots.config, rows=0, slots=len(slots.held), capacity=slots.capacity)
            copied.join(slots)
            before.slot_cache, self._session = copied, lambda: None
        room = own.room if slots is None else tuple(map(max, own.room, slots.room))
        if slots is None or room != slots.room:
            self.kept.clear()
            slots = self.slots = None  # its memory, before there is more of it
            columns = -(-(room[1] + 1) // STEP) * STEP
            slots = SlotCache(own.config, rows=0, slots=room[0], capacity=columns - 1)
        slots.held = []
        slots.join(own)
        self.slots, session.slot_cache, self._session = slots, slots, weakref.ref(session)
        self._lent.add(session)


class Graph:
    """A pass in buffers of its own.

    Raises:
        RuntimeError: it cannot be captured.
    """

    def __init__(self, inputs: Sequence[Input], function: Function, device: torch.device, capture: Capture) -> None:
        self.buffers = [torch.zeros(one.shape, dtype=one.given.dtype, device=device) for one in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs
        self._fill(inputs)
        if capture.real:
            self.graph, self.outputs = capture.record(lambda: function(*self.buffers))
        else:
            with _NoWaiting():
                self.outputs = function(*self.buffers)

    def replay(self, inputs: Sequence[Input], function: Function) -> Outputs:
        """The outputs, which the next replay overwrites."""
        self._fill(inputs)
        if self.graph is not None:
            self.graph.replay()
            return self.outputs
        for kept, new in zip(self.outputs, function(*self.buffers), strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        return self.outputs

    def _fill(self, inputs: Sequence[Input]) -> None:
        for buffer, one in zip(self.buffers, inputs, strict=True):
            given = one.given
            if given.device.type == "cpu" and buffer.device.type == "cuda" and torch.cuda.is_available():
                given = given.pin_memory()  # else the copy waits for the device
            buffer[tuple(map(slice, given.shape))].copy_(given, non_blocking=True)


class _NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises RuntimeError where the host waits for what the device has computed, inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func._schema.name.removeprefix("aten::"), func(*args, **(kwargs or {}))
        devices = {value.device for value in (*args, result) if isinstance(value, Tensor)}
        copies = name in ("_to_copy", "to", "copy_") and len(devices) > 1
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in _WAITS or copies or by_mask:
            raise RuntimeError(f"{name} waits for the device in the middle of a pass")
        return result


_WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_consecutive"}


def counts_of(numbers: Sequence[Sequence[int]], rows: int, fill: Sequence[int]) -> Input:
    """Counts of rows, on the host: int64 [kinds, rows], of which the rows that are padding have those of `fill`."""
    given = [[*row, *[more] * (rows - len(row))] for row, more in zip(numbers, fill, strict=True)]
    return Input(torch.tensor(given), (len(given), rows))


def _why_not(target: Any, model: PreTrainedModel, serves: type) -> str | None:
    """Why a target's passes cannot be captured."""
    if target is not model:
        return f"the target is wrapped ({type(target).__name__}), and its passes run through the wrapper"
    if not getattr(serves, "shares_passes", False):
        return f"each row of {type(model).__name__} has a cache of its own"
    return _unfit(model)


def _unfit(*models: PreTrainedModel) -> str | None:
    """Why passes of the first model, which may run through parts of the others, cannot be captured."""
    if not counts_positions(models[0]):
        return f"{type(models[0]).__name__} counts positions by itself"
    for model in models:
        name = type(model).__name__
        if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
            return f"{name} is quantised"
        if getattr(model, "_compiled_call_impl", None) is not None:
            return f"{name} is compiled"
        if len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1:
            return f"{name} is split over several devices"
        if model.device != models[0].device or model.device.type not in ("cuda", "cpu"):
            return f"{name} is on {model.device}"
        if found := {"dynamic", "longrope"} & {*_rope_types(model.config.get_text_config().to_dict())}:
            return f"the rotary frequencies of {name} ({', '.join(found)}) follow the longest text"
    return None


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Of all layers."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif name == "rope_type":
            yield str(value)


def _agree(found: Tensor | None, expected: Tensor) -> bool:
    """Whether scores differ by rounding alone."""
    assert found is not None
    difference, spread = (found - expected).float().abs().max(), expected.float().std()
    return bool(difference <= 8 * math.sqrt(torch.finfo(expected.dtype).eps) * spread)


def _columns(least: int) -> int:
    """The next of 256, 384, 512, 768, 1024 and so on."""
    power = max(COLUMNS, _power_of_two(least))
    return power * 3 // 4 if COLUMNS < least <= power * 3 // 4 else power


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
