"""onnxruntime sessions over bytes that were checked: one thread, no telemetry, no silent change of device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bpkit.export.sandbox import MEMORY, bound_arena, plain, session_options
from bpkit.installation.distribution import ONNXRUNTIMES, install_command, onnxruntimes, requirement
from bpkit.policy import PolicyError

if TYPE_CHECKING:
    from torch import Tensor

# onnxruntime reads it when it is imported; from 1.29 on it would report its use otherwise.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

Array = NDArray[Any]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session:
    """One ONNX file, ready to run.

    Args:
        session: of onnxruntime. device: `cpu`, or `cuda:0` and so on.
        stream: of torch, that the session computes on; None on the CPU.
    """

    def __init__(self, session: Any, device: str = "cpu", stream: Any = None) -> None:
        self._session, self.device, self._stream = session, device, stream
        self.inputs: list[str] = [value.name for value in session.get_inputs()]
        self.outputs: list[str] = [value.name for value in session.get_outputs()]

    def run(self, given: dict[str, Array]) -> dict[str, Array]:
        """Outputs by name from inputs by name, in the memory of the host."""
        values = self._session.run(self.outputs, given)
        return {name: np.asarray(value) for name, value in zip(self.outputs, values, strict=True)}

    def run_torch(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with tensors, which stay on the device of the session and are not copied if they lie there.

        On CUDA it neither waits for the host nor makes it wait: it is one more piece of work of the current stream.
        """
        import torch

        if self._stream is not None:
            return self.run_bound(given)
        arrays = self.run({name: value.numpy() for name, value in self._placed(given).items()})
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def run_bound(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """`run_torch` by the addresses of the tensors; on the CPU it is slower than views of numpy."""
        binding, tensors = self._session.io_binding(), self._placed(given)
        kind, _, index = self.device.partition(":")
        for name, value in tensors.items():
            element = _numpy_types()[value.dtype]
            binding.bind_input(name, kind, int(index or 0), element, tuple(value.shape), value.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, kind, int(index or 0))
        options = _runtime().RunOptions()
        options.log_severity_level = 3
        if self._stream is not None:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with self._in_order():
            self._session.run_with_iobinding(binding, options)
        import torch

        values = zip(self.outputs, binding.get_outputs(), strict=True)
        # Tensors over the memory of the outputs, which lives as long as they do.
        if self.device == "cpu":
            return {name: torch.from_numpy(value.numpy()) for name, value in values}
        return {name: torch.as_tensor(_OnDevice(value), device=self.device) for name, value in values}

    def _placed(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous tensors on the device of the session."""
        placed, types = {}, _numpy_types()
        for name, value in given.items():
            if value.dtype not in types:
                raise PolicyError(f"input {name!r} is {value.dtype}: inputs are float32, int64 or bool")
            # Each call takes a microsecond, and a decision takes fifty.
            value = value.detach() if value.requires_grad else value
            value = value if value.device == self._device else value.to(self._device)
            placed[name] = value if value.is_contiguous() else value.contiguous()
        return placed

    @cached_property
    def _device(self) -> Any:
        import torch

        return torch.device(self.device)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """What runs inside starts after the work of torch's current stream, and later work of that stream after it.

        It keeps memory in order too: neither side reuses what the other still reads.
        """
        if self._stream is None:
            yield
            return
        import torch

        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            yield
        finally:
            current.wait_stream(self._stream)


def open_session(data: bytes, provider: str = "cpu") -> Session:
    """A session over the bytes of a model, on the CPU with one thread or on the current CUDA device.

    Raises:
        PolicyError: the provider is not there, or onnxruntime cannot open the model.
    """
    if provider not in PROVIDERS:
        raise PolicyError(f"there is no provider {provider!r}: choose {' or '.join(PROVIDERS)}")
    runtime = _runtime()
    device, stream, chosen = "cpu", None, [PROVIDERS["cpu"]]
    if provider == "cuda":
        device, stream, chosen = _cuda(runtime)
    try:
        session = runtime.InferenceSession(data, session_options(runtime), providers=chosen)
    except Exception as error:  # onnxruntime raises classes of its own, without a common public base
        raise PolicyError(f"onnxruntime cannot open the model ({plain(error)})") from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise PolicyError(
            f"onnxruntime could not start CUDA and would compute on the CPU ({_installed()}): install the CUDA and "
            f"cuDNN versions that it was built for (`{install_command('gpu')}`), or choose provider cpu"
        )
    session.disable_fallback()
    return Session(session, device, stream)


@cache
def _runtime() -> Any:
    """onnxruntime, imported with telemetry off."""
    try:
        import onnxruntime
    except ImportError as error:
        raise PolicyError(
            f"an exported policy needs onnxruntime ({error}): {install_command('onnx')}, or "
            f"'{requirement('gpu')}' on CUDA"
        ) from None
    onnxruntime.disable_telemetry_events()  # in case that someone else had imported it
    bound_arena(onnxruntime)
    return onnxruntime


def _cuda(runtime: Any) -> tuple[str, Any, list[Any]]:
    """Device, stream of its own, and provider with options."""
    if PROVIDERS["cuda"] not in runtime.get_available_providers():
        raise PolicyError(
            f"provider cuda is not in this onnxruntime ({_installed()}): pip uninstall {' '.join(ONNXRUNTIMES)}, then "
            f"{install_command('gpu')}"
        )
    import torch

    if not torch.cuda.is_available():
        raise PolicyError("torch sees no CUDA device: install torch for CUDA, or choose provider cpu")
    index = torch.cuda.current_device()
    # Of its own: onnxruntime takes the default stream for none, and then waits for the device around each run.
    stream: Any = torch.cuda.Stream(device=index)  # type: ignore[no-untyped-call]
    options = {
        "device_id": str(index),
        "user_compute_stream": str(stream.cuda_stream),
        "gpu_mem_limit": str(MEMORY),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
    }
    return f"cuda:{index}", stream, [(PROVIDERS["cuda"], options)]


def _installed() -> str:
    found = [f"{package} {version}" for package, version in onnxruntimes().items()]
    both = ", which overwrite each other" if len(found) > 1 else ""
    return f"installed: {' and '.join(found) or 'a build of unknown name'}{both}"


@cache
def _numpy_types() -> dict[Any, Any]:
    """By type of torch."""
    import torch

    return {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}


class _OnDevice:
    """Memory of onnxruntime on a CUDA device, as torch takes it over without a copy."""

    TYPES = {"tensor(float)": "<f4", "tensor(int64)": "<i8", "tensor(bool)": "|b1"}

    def __init__(self, value: Any) -> None:
        self._value = value
        self.__cuda_array_interface__ = {
            "shape": tuple(value.shape()),
            "typestr": self.TYPES[value.data_type()],
            "data": (value.data_ptr(), False),
            "version": 3,
        }
