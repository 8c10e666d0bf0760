"""A drafter on another device than its target: features go there once a step, and drafted tokens come back.

As in Dovetail (2412.18934), where a GPU drafts for a target on the CPU, and wherever a model too large for one device
leaves another one idle. The drafter works with copies of the target's embedding and head, and draws there, with the
same noise: only tokens come back. Under rule `rejection`, whose verification needs them, its scores do as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel

from bpkit.decode.drafter import Drafter, DrafterSession, GoOn, Proposal
from bpkit.decode.rollback import PREFIX_FREE, STATELESS
from bpkit.decode.sampling import Draw, Processors, Sampler, Samplers
from bpkit.decode.text import RunningText


class NotCopied(AttributeError, ValueError):
    """A drafter uses more of its target than there is on the drafter's device."""


class EmbeddingAndHead:
    """Stands for a target on another device: copies of its embedding and head, which is what drafters use of it.

    Raises:
        ValueError: embedding or head are not in memory.
    """

    def __init__(self, target: PreTrainedModel, device: torch.device) -> None:
        self.config, self.name_or_path, self.dtype, self.device = (
            target.config,
            target.name_or_path,
            target.dtype,
            device,
        )
        parts = target.get_input_embeddings(), target.get_output_embeddings()
        weights = [value for part in parts if part is not None for value in (*part.parameters(), *part.buffers())]
        if any(value.is_meta for value in weights):
            raise ValueError(
                "drafter_device: embedding and head of the target are offloaded and cannot be copied; leave them on a "
                "device, or leave drafter_device out"
            )
        # What both share is copied once.
        there: dict[int, Any] = {id(value): _weight(value, device) for value in weights}
        # What computes with the weights that are here, such as `products`, is left behind.
        there |= {id(vars(module)["forward"]): None for module in _modules(parts) if "forward" in vars(module)}
        copies: tuple[nn.Module, nn.Module | None] = copy.deepcopy(parts, there)
        self._embedding, self._head = copies
        for module in _modules(copies):
            vars(module).pop("forward", None)

    def get_input_embeddings(self) -> nn.Module:
        return self._embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self._head

    def __getattr__(self, name: str) -> Any:
        raise NotCopied(
            f"this drafter uses {name!r} of its target, of which only embedding and head are on drafter_device: leave "
            "drafter_device out"
        )


def _modules(parts: Iterable[nn.Module | None]) -> list[nn.Module]:
    return [module for part in parts if part is not None for module in part.modules()]


def _weight(value: Tensor, device: torch.device) -> Tensor:
    moved = value.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved


class OtherDevice:
    """A drafter that works on a device of its own, for a target elsewhere.

    Args:
        drafter: all of it on `device`, made for `EmbeddingAndHead` there.
    """

    def __init__(self, drafter: Drafter, device: torch.device) -> None:
        self.drafter, self.device = drafter, device
        self.name, self.kind, self.work = drafter.name, drafter.kind, drafter.work
        self.trained_block_size, self.max_block_size = drafter.trained_block_size, drafter.max_block_size
        self.feature_layers, self.provides = drafter.feature_layers, drafter.provides
        self.remembers_requests = bool(getattr(drafter, "remembers_requests", False))
        self.depends_on_steps = bool(getattr(drafter, "depends_on_steps", False))
        self.branches = int(getattr(drafter, "branches", 1))
        self.model: nn.Module | None = getattr(drafter, "model", None)

    def begin(self, text: RunningText) -> OtherDeviceSession:
        return OtherDeviceSession(self, text)


class OtherDeviceSession:
    """The drafter's session over a copy of the text on its device, which is made of what the host knows."""

    def __init__(self, drafter: OtherDevice, text: RunningText) -> None:
        self.device, self.text = drafter.device, text
        self.copy = RunningText([row.on(self.device) for row in text.rows], slots=text.slots)
        self.session: DrafterSession = drafter.drafter.begin(self.copy)
        self._processors: WeakKeyDictionary[Processors, Processors] = WeakKeyDictionary()

    def advance(self, features: Sequence[Tensor] | None) -> None:
        self.copy.follow(self.text)
        if features is not None:
            rows = torch.cat(list(features)).to(self.device, non_blocking=True)
            features = torch.split(rows, [len(row) for row in features])
        self.session.advance(features)

    def passed(self, chosen: Sequence[list[int]]) -> None:
        if hasattr(self.session, "passed"):
            self.session.passed(chosen)

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None, **shapes: Any) -> Proposal:
        return self.session.draft(block_size, self._there(draw), go_on, **shapes)

    def keep(self, rows: Sequence[int]) -> None:
        self.copy.keep(rows)
        self.session.keep(rows)

    def join(self, other: OtherDeviceSession) -> None:
        self.copy.join(other.copy)
        self.session.join(other.session)

    def _there(self, draw: Draw) -> Draw:
        """The same draw on the drafter's device."""
        return Draw(
            Samplers(
                [
                    Sampler(text, self._moved(row.processors), row.noise and row.noise.on(self.device))
                    for text, row in zip(self.copy.rows, draw.samplers.rows, strict=True)
                ]
            )
        )

    def _moved(self, processors: Processors) -> Processors:
        if processors not in self._processors:
            self._processors[processors] = moved(processors, self.device)
        return self._processors[processors]


def moved(processors: Processors, device: torch.device) -> Processors:
    """Logits processors for drafts on another device: those of transformers that keep no state, with their tensors.

    Others may hold anything; a draft that knows nothing of them is only rejected more often.
    """
    known = [p for p in processors.processors if type(p) in PREFIX_FREE | STATELESS]
    copies = [copy.copy(processor) for processor in known]
    for made in copies:
        vars(made).update({n: v.to(device) for n, v in vars(made).items() if isinstance(v, Tensor)})
    return Processors(LogitsProcessorList(copies), ends=processors.ends, prompt_length=processors.prompt_length)


def elsewhere(device: torch.device | str | None, here: torch.device) -> torch.device | None:
    """The device that was given, or None if that is the target's own, `here`."""
    given = None if device is None else torch.device(device)
    return None if given == here else given
