"""A device that is not there: its tensors compute on the host, and go wrong as those of an accelerator do.

Operands on two devices are an error, as on a GPU, and every point at which the host would wait for the device is
counted. Numbers are the host's own, so that a decoder does on it what it does on the host, step for step.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder

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
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0

    def __enter__(self) -> SimulatedDevice:
        # `torch.tensor(..., device=...)` then makes its tensor on the host and hands us the copy.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._initialise, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        torch.cuda._lazy_init = self._initialise

    def put(self, model: nn.Module) -> None:
        """Move a model here, in place: its parameters and buffers."""
        for module in model.modules():
            for kept in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers)):
                kept.update({name: self.tensor(value.detach()) for name, value in kept.items() if value is not None})

    def tensor(self, value: Tensor) -> Tensor:
        """A tensor here."""
        return value if isinstance(value, DeviceTensor) else DeviceTensor(value, self)

    def decoder(self, like: SpeculativeDecoder) -> SpeculativeDecoder:
        """A decoder with copies of another's models here, strict, under the policy `fixed:1`."""
        from bpkit.decode.decoder import SpeculativeDecoder
        from bpkit.decode.sources import sources_of

        memo: dict[int, Any] = {}
        target, drafter = copy.deepcopy(like.model, memo), copy.deepcopy(like.drafter, memo)
        parts = [value for source in sources_of(drafter) for value in vars(source).values()]
        for model in {id(value): value for value in (target, *parts)}.values():
            if isinstance(model, nn.Module):
                self.put(model)
        return SpeculativeDecoder(
            target,
            drafter,
            "fixed:1",
            tokenizer=like.tokenizer,
            rule=like.rule,
            clock=like.clock if like.cost is not None else None,
            strict=True,
            max_block_size=like.spec.max_block_size,
            cost=like.cost,
            # There are no graphs here. Where no real device is taken for this one, all but the capture can be run.
            capture="off" if torch.cuda.is_available() else "on" if like.capture.mode == "on" else "off",
        )

    def count(self, decoder: SpeculativeDecoder, prompt: str | Tensor, **options: Any) -> DeviceReads:
        """Generate with a decoder whose models are here, and count its reads."""
        tokens: list[int] = []
        totals: list[int] = []
        for record in decoder.run(prompt, **options):
            totals.append(self.reads)
            tokens += record.tokens[0].tolist()
        return DeviceReads(tuple(tokens), tuple(after - before for before, after in pairwise(totals)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        args, kwargs = _by_name(func, "device", args, kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        here = any(isinstance(value, DeviceTensor) for value in tensors)
        wanted = kwargs.get("device")
        if here and name not in _MAY_CROSS:
            _refuse_two_devices(name, tensors)
        if name == "aten::_fused_sdp_choice":
            return 0  # the plain products, which every device has
        stays = here if wanted is None else torch.device(wanted).type in (DEVICE.type, "meta")
        if name == "aten::copy_":
            stays = isinstance(args[0], DeviceTensor)
        if here and (name in _WAITS or not stays or _by_mask(name, args)):
            self.reads += 1
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*_on_host(args), **{key: _on_host(value) for key, value in kwargs.items()})
        if not stays:
            return result
        if func._schema.is_mutable and tensors and name.endswith("_"):
            return args[0] if func._schema.returns else None
        return tree_map_only(Tensor, self.tensor, result)


class DeviceReads(NamedTuple):
    """How often the host waited for the device in one generation: the tokens of the output, reads of each step."""

    tokens: tuple[int, ...]
    steps: tuple[int, ...]


class DeviceTensor(Tensor):
    """A tensor that says it is on `DEVICE`; `on_host` has its numbers."""

    on_host: Tensor
    simulated: SimulatedDevice

    @staticmethod
    def __new__(cls, inner: Tensor, simulated: SimulatedDevice) -> DeviceTensor:
        with torch.inference_mode(False):  # views of a tensor that was made outside must be as it is
            made: DeviceTensor = Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device("meta"),  # to torch's core, which has guards for the devices that it was built for
                requires_grad=False,
            )
        made.on_host, made.simulated = inner, simulated
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
        simulated = next(v.simulated for v in tree_leaves((args, kwargs)) if isinstance(v, DeviceTensor))
        return simulated.__torch_dispatch__(func, types, args, kwargs)

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


def _refuse_two_devices(name: str, tensors: list[Tensor]) -> None:
    for value in tensors:
        if not isinstance(value, DeviceTensor) and value.ndim > 0:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got one on {DEVICE} and one of shape "
                f"{list(value.shape)} on {value.device}"
            )


def _by_mask(name: str, args: Any) -> bool:
    """Whether places are chosen by a mask, so that their number must be read."""
    return name in ("aten::index", "aten::index_put_") and any(
        isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
    )


def _on_host(value: Any) -> Any:
    """Arguments with the numbers that they have. Not by torch's pytree, which takes several times as long."""
    if isinstance(value, list | tuple):
        return [_on_host(each) for each in value]
    return value.on_host if isinstance(value, DeviceTensor) else value
