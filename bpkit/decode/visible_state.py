"""Whether a callable keeps state, as far as Python can see: its attributes, closures, defaults and globals."""

from __future__ import annotations

import enum
import functools
import io
import logging
import pickle
import re
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MOST = 20_000
"""Objects that are looked at, plain data aside; what holds more cannot be watched at every call."""

# Compared by identity. Loggers and tokenizers do keep state, none of which changes what a call returns.
_UNCHANGING = (
    ModuleType,
    enum.Enum,
    re.Pattern,
    torch.dtype,
    torch.device,
    logging.Logger,
    logging.LoggerAdapter,
    PreTrainedTokenizerBase,
    Tokenizer,
)
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "transformers", "numpy", "tokenizers"})
_REDUCERS = ("__getstate__", "__reduce__", "__reduce_ex__")


class VisibleState(pickle.Pickler):
    """The state of `subject` when this was made, to be compared with what it is later.

    The subject is pickled part by part, with all that the parts reach; nobody ever reads the bytes but to compare them.
    Pickling goes through containers and objects as they are, and fails for objects that are larger than their Python
    attributes need, as those of compiled extensions are. Functions and classes are pickled by what they hold. The
    pickler keeps alive what it saw, so that nothing new can take its place in memory.

    Attributes:
        opaque: where something lies that cannot be looked into, such as an object of a compiled extension; else None.
    """

    def __init__(self, subject: object) -> None:
        file = io.BytesIO()
        super().__init__(file, protocol=4)
        self.subject = self._last = subject
        self.opaque: str | None = None
        self._parts: dict[str, int] = {}
        self._seen = 0
        for name, part in _parts(subject).items():
            try:
                self.dump(part)
            except Exception:
                what = type(self._last).__name__ if self._seen <= MOST else f"more than {MOST} objects"
                self.opaque = f"{name} ({what})"
                return
            self._parts[name] = hash(file.getvalue())
            file.seek(0)
            file.truncate()

    def changed(self) -> str | None:
        """Where the state differs from what it was, or None."""
        now = VisibleState(self.subject)
        names = {**now._parts, **self._parts}
        return now.opaque or next((name for name in names if now._parts.get(name) != self._parts.get(name)), None)

    def reducer_override(self, value: Any) -> Any:
        """How a value is pickled that is no plain data: what identifies it, and what it holds."""
        self._seen, self._last = self._seen + 1, value
        if self._seen > MOST:
            raise pickle.PicklingError
        if value is id:  # stands for "the object at this address", below
            return NotImplemented
        if isinstance(value, Tensor):  # in-place operations count its version up; those of inference mode have none
            return id, (id(value), value.tolist() if value.is_inference() else value._version)
        if isinstance(value, type):
            return id, (id(value),), _held_by_class(value)
        if isinstance(value, FunctionType):
            return id, (id(value.__code__),), _held_by_function(value)
        if isinstance(value, (staticmethod, classmethod, functools._lru_cache_wrapper)):
            return id, (), value.__wrapped__
        if isinstance(value, property):
            return id, (), (value.fget, value.fset)
        of_module = isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, ModuleType | None)
        if of_module or isinstance(value, _UNCHANGING):
            return id, (id(value),)
        if isinstance(value, (Iterator, torch.Generator)) and _of_library(type(value)):
            raise pickle.PicklingError  # only using it up shows what is in it
        own = [base for base in type(value).__mro__ if not _of_library(base)]
        if any(name in vars(base) for base in own for name in _REDUCERS):  # it may leave something out
            return id, (type(value),), object.__getstate__(value)
        return NotImplemented


def _parts(subject: Any) -> dict[str, object]:
    """What a subject holds, by names to tell of; and the subject itself, for all that has no name."""
    if isinstance(subject, FunctionType):
        return {**_held_by_function(subject), "itself": subject}
    if isinstance(subject, MethodType):
        return {f"self.{name}": part for name, part in _parts(subject.__self__).items()} | {"itself": subject}
    of_classes = {
        f"{kind.__name__}.{name}": part for kind in type(subject).__mro__ for name, part in _held_by_class(kind).items()
    }
    return {**getattr(subject, "__dict__", {}), **of_classes, "itself": subject}


def _held_by_class(kind: type) -> dict[str, object]:
    """Attributes of a class that a call may use or write to."""
    return {} if _of_library(kind) else {name: value for name, value in vars(kind).items() if _may_change(name, value)}


def _held_by_function(function: FunctionType) -> dict[str, object]:
    """What a function can reach: its attributes, defaults and closure, and the globals that it names."""
    held: dict[str, object] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # not filled yet
            held[name] = None
    for name in _names_in(function.__code__):
        known = function.__globals__.get(name)
        # Functions of other modules are taken for pure.
        if not isinstance(known, FunctionType) or known.__globals__ is function.__globals__:
            held[name] = known
    return {**held, **vars(function), "__defaults__": (function.__defaults__, function.__kwdefaults__)}


@functools.lru_cache(maxsize=1024)
def _names_in(code: CodeType) -> tuple[str, ...]:
    """Names in a function that may be global, those of functions inside it included."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names_in(const)]
    return tuple(sorted({*code.co_names, *inner}))


def _of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _may_change(name: str, value: object) -> bool:
    """Whether an attribute of a class is one that a call may use or write to."""
    if isinstance(value, (FunctionType, staticmethod, classmethod, property)):
        return name not in ("__init__", "__new__")
    return not (name.startswith("__") or name == "_abc_impl" or hasattr(type(value), "__get__"))  # members of slots
