"""A device that is not there: its tensors compute on the host, and go wrong as those of an accelerator do.

Operands on two devices are an error, as on a GPU, and every point at which the host would wait for the device is
counted. Numbers are the host's own, so that a decoder does on it what it does on the host, step for step.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.registry.resolve import PolicyLike

DEVICE = torch.device("cuda:0")
"""Its name, which libraries know."""

# Their result, or its shape, is known only once the device has computed it.
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::_unique2",
}
_MAY_CROSS = {"aten::_to_copy", "aten::copy_", "aten::to", "aten::index", "aten::index_put_", "aten::index_put"}


class SimulatedDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The device, inside a `with` block.

    Attributes:
        reads: points so far at which the host waited for the device.
        places: how many of them, by the line of code that is to blame.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0
        self.places: Counter[str] = Counter()

    def __enter__(self) -> SimulatedDevice:
        # `torch.tensor(..., device=...)` then makes its tensor on the host and hands us the copy.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._initialise, torch.cuda._lazy_init = torch.cuda._lazy_init, _nothing
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        torch.cuda._lazy_init = self._initialise

    def put(self, model: nn.Module) -> nn.Module:
        """Move a model here, in place: its parameters and buffers."""
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(self.tensor(parameter.detach()), requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = self.tensor(buffer)
        return model

    def tensor(self, value: Tensor) -> Tensor:
        """A tensor here."""
        return value if isinstance(value, _Away) else _Away(value, self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        args, kwargs = _by_name(func, "device", args, kwargs)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        away = [value for value in tensors if isinstance(value, _Away)]
        wanted = kwargs.get("device")
        if away and name not in _MAY_CROSS:
            self._refuse_two_devices(name, tensors)
        if name == "aten::_fused_sdp_choice":
            return 0  # the plain products, which every device has
        stays = bool(away) if wanted is None else torch.device(wanted).type in (DEVICE.type, "meta")
        if name == "aten::copy_":
            stays = isinstance(args[0], _Away)
        if away and (name in _WAITS or not stays or self._by_mask(name, args)):
            self._count(name)
        plain = tree_map(_inner, args), tree_map(_inner, kwargs)
        if wanted is not None:
            plain[1]["device"] = torch.device("cpu")
        result = func(*plain[0], **plain[1])
        if not stays:
            return result
        if func._schema.is_mutable and tensors and name.endswith("_"):
            return args[0] if func._schema.returns else None
        return tree_map(lambda value: _Away(value, self) if isinstance(value, Tensor) else value, result)

    @staticmethod
    def _refuse_two_devices(name: str, tensors: list[Tensor]) -> None:
        for value in tensors:
            if not isinstance(value, _Away) and value.ndim > 0:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {name} got one on {DEVICE} and one of shape "
                    f"{list(value.shape)} on {value.device}"
                )

    @staticmethod
    def _by_mask(name: str, args: Any) -> bool:
        """Whether places are chosen by a mask, so that their number must be read."""
        return name in ("aten::index", "aten::index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )

    def _count(self, name: str) -> None:
        self.reads += 1
        ours = [frame for frame in traceback.extract_stack() if "torch/" not in frame.filename.replace("\\", "/")]
        ours = [frame for frame in ours if frame.filename != __file__]
        self.places[f"{ours[-1].filename}:{ours[-1].lineno} {name}" if ours else name] += 1


class _Away(Tensor):
    """A tensor that says it is on `DEVICE`; `on_host` has its numbers."""

    on_host: Tensor
    device_of: SimulatedDevice

    @staticmethod
    def __new__(cls, inner: Tensor, device_of: SimulatedDevice) -> _Away:
        with torch.inference_mode(False):  # views of a tensor that was made outside must be as it is
            made: _Away = Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device("meta"),  # to torch's core, which has guards for the devices that it was built for
                requires_grad=False,
            )
        made.on_host, made.device_of = inner, device_of
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device = next(v for v in tree_flatten((args, kwargs))[0] if isinstance(v, _Away)).device_of
        return device._run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"simulated {self.on_host!r}"


def _by_name(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments from `name` on by their names."""
    names = [argument.name for argument in func._schema.arguments]
    if name not in names or names.index(name) >= len(args):
        return list(args), dict(kwargs)
    place = names.index(name)
    return list(args[:place]), {**dict(zip(names[place:], args[place:], strict=False)), **kwargs}


def _nothing() -> None:
    """There is no device to initialise."""


def _inner(value: Any) -> Any:
    return value.on_host if isinstance(value, _Away) else value


@dataclass(frozen=True)
class Reads:
    """How often the host waited for the device in one generation.

    Attributes:
        tokens: of the output.
        prefill: reads until the first token. steps: reads of each step.
        places: all of them by line of code.
    """

    tokens: tuple[int, ...]
    prefill: int
    steps: tuple[int, ...]
    places: Counter[str]


class MovedDecoder:
    """A copy of a decoder's models on a simulated device, for use inside a `with` block of it."""

    def __init__(self, device: SimulatedDevice, decoder: SpeculativeDecoder) -> None:
        self.device, self.decoder = device, decoder
        memo: dict[int, Any] = {}
        self.target = device.put(copy.deepcopy(decoder.model, memo))
        self.drafter = copy.deepcopy(decoder.drafter, memo)  # bound to the copy of the target
        for value in vars(self.drafter).values():
            if isinstance(value, nn.Module) and value is not self.target:
                device.put(value)

    def under(self, policy: PolicyLike, *, strict: bool = True) -> SpeculativeDecoder:
        """The moved models under a policy."""
        from bpkit.decode.decoder import SpeculativeDecoder

        like = self.decoder
        return SpeculativeDecoder(
            cast("PreTrainedModel", self.target),
            self.drafter,
            policy,
            tokenizer=like.tokenizer,
            rule=like.rule,
            clock=like.clock if like.cost is not None else None,
            strict=strict,
            max_block_size=like.spec.max_block_size,
            cost=like.cost,
        )

    def reads(self, decoder: SpeculativeDecoder, prompt: str | Tensor, **options: Any) -> Reads:
        """Generate and count."""
        run = decoder.run(prompt, **options)
        self.device.places.clear()
        tokens: list[int] = []
        counts: list[int] = []
        before = self.device.reads
        for record in run:
            counts.append(self.device.reads - before)
            before = self.device.reads
            tokens += record.tokens[0].tolist()
        return Reads(tuple(tokens), counts[0], tuple(counts[1:]), Counter(self.device.places))
