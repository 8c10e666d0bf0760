"""Whether a callable keeps state, as far as Python can see: its attributes, closures, defaults and globals."""

from __future__ import annotations

import dis
import enum
import functools
import logging
import marshal
import re
import struct
import sys
from collections import deque
from collections.abc import Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MOST = 20_000
"""Objects that are looked at; what holds more cannot be watched at every call."""

# Compared by identity. Loggers and tokenizers do keep state, none of which changes what a call returns.
_UNCHANGING = (
    type,
    ModuleType,
    enum.Enum,
    re.Pattern,
    range,
    slice,
    torch.dtype,
    torch.device,
    logging.Logger,
    logging.LoggerAdapter,
    PreTrainedTokenizerBase,
    Tokenizer,
)
_CONTAINERS = (list, tuple, set, frozenset, dict, deque)
_SCALARS = (type(None), bool, int, float, complex, str, bytes)
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "transformers", "numpy", "tokenizers"})
_POINTER = struct.calcsize("P")
_MANAGED_DICT = 1 << 4  # Py_TPFLAGS_MANAGED_DICT


class VisibleState:
    """The state of `subject` when this was made, to be compared with what it is later.

    Attributes:
        opaque: where something lies that cannot be looked into, such as an object of a compiled extension; else None.
    """

    def __init__(self, subject: object) -> None:
        self.subject = subject
        reader = _Reader()
        self._first = reader.read(subject, "")
        self.opaque = reader.opaque
        self._places, self._kept = reader.places, reader.kept

    def changed(self) -> str | None:
        """Where the state differs from what it was, or None."""
        reader = _Reader()
        if reader.read(self.subject, "") == self._first and reader.opaque is None:
            return None
        for place, value in reader.places.items():
            if self._places.get(place) != value:
                return place or "itself"
        return reader.opaque or "its attributes"


class _Reader:
    """One look at an object and all that it reaches."""

    def __init__(self) -> None:
        self.opaque: str | None = None
        self.places: dict[str, object] = {}
        self.kept: list[object] = []
        """What is compared by identity: kept alive, so that nothing new can take its place."""
        self._seen: dict[int, int] = {}

    def read(self, value: Any, place: str) -> object:
        """A value that equals that of another look if and only if nothing changed."""
        if type(value) in _SCALARS:
            return self._noted(place, value)
        if id(value) in self._seen:
            return ("seen", self._seen[id(value)])
        self.kept.append(value)
        if isinstance(value, _UNCHANGING):
            return self._noted(place, id(value))
        self._seen[id(value)] = len(self._seen)
        if len(self._seen) > MOST:
            return self._cannot(f"{place} (more than {MOST} objects)")
        return self._object(value, place)

    def _object(self, value: Any, place: str) -> object:
        if isinstance(value, Tensor):
            return self._noted(place, _tensor(value))
        if isinstance(value, (np.ndarray, np.generic)):
            return self._noted(place, (value.shape, value.dtype.str, hash(value.tobytes())))
        if isinstance(value, _CONTAINERS):
            return self._container(value, place)
        if isinstance(value, FunctionType):
            return self._function(value, place)
        if isinstance(value, MethodType):
            return self._all({"self": value.__self__, "function": value.__func__}, place)
        if isinstance(value, functools.partial):
            return self._all({"func": value.func, "args": value.args, "keywords": value.keywords}, place)
        if isinstance(value, functools._lru_cache_wrapper):
            return self.read(value.__wrapped__, place)
        if isinstance(value, (staticmethod, classmethod)):
            return self.read(value.__func__, place)
        if isinstance(value, property):
            return self._all({"get": value.fget, "set": value.fset}, place)
        if isinstance(value, BuiltinFunctionType):
            return self.read(value.__self__, place)  # a module, or the object whose method it is
        return self._instance(value, place)

    def _container(self, value: Any, place: str) -> object:
        try:  # plain data, at the speed of C
            return self._noted(place, hash(marshal.dumps(value, 2)))
        except ValueError:
            pass
        held: list[object] = [self._every(value, place)]
        if isinstance(value, dict):
            held.append(self._all({repr(key): item for key, item in value.items()}, place))
            held.append(self.read(getattr(value, "default_factory", None), place))
        return (*held, self._attributes(value, place))

    def _function(self, function: FunctionType, place: str) -> object:
        held: dict[str, object] = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                held[name] = cell.cell_contents
            except ValueError:  # not filled yet
                held[name] = None
        for name in _globals_of(function.__code__):
            known = function.__globals__.get(name)
            # Functions of libraries, and of other modules, are taken for pure.
            if not isinstance(known, FunctionType) or known.__globals__ is function.__globals__:
                held[name] = known
        return (
            id(function.__code__),
            self._all(held, place),
            self._every(function.__defaults__ or (), f"{place}.__defaults__"),
            self._all({**(function.__kwdefaults__ or {}), **vars(function)}, place),
        )

    def _instance(self, value: Any, place: str) -> object:
        kind = type(value)
        if _keeps_more_than_attributes(kind):
            return self._cannot(f"{place} ({kind.__name__})")
        return self._attributes(value, place)

    def _attributes(self, value: Any, place: str) -> object:
        kind = type(value)
        slots = {name: getattr(value, name) for name in _slots(kind) if hasattr(value, name)}
        own = self._all({**getattr(value, "__dict__", {}), **slots}, place)
        return (id(kind), own, *(self._class(base) for base in kind.__mro__))

    def _class(self, kind: type) -> object:
        """Attributes of a class, which methods may write to."""
        if kind.__module__.partition(".")[0] in _LIBRARIES or id(kind) in self._seen:
            return None
        self._seen[id(kind)] = len(self._seen)
        held = {name: value for name, value in vars(kind).items() if _may_change(name, value)}
        return self._all(held, kind.__name__)

    def _all(self, held: dict[str, Any], place: str) -> object:
        return tuple((name, self.read(value, f"{place}.{name}".lstrip("."))) for name, value in held.items())

    def _every(self, values: Iterable[Any], place: str) -> object:
        return tuple(self.read(value, f"{place}[{i}]") for i, value in enumerate(values))

    def _noted(self, place: str, value: object) -> object:
        self.places[place] = value
        return value

    def _cannot(self, place: str) -> object:
        self.opaque = self.opaque or place.strip() or "itself"
        return None


def _tensor(value: Tensor) -> object:
    """In-place operations count up a tensor's version; those made in inference mode have none."""
    return (id(value), value._version) if not value.is_inference() else hash(str(value.tolist()))


@functools.lru_cache(maxsize=1024)
def _globals_of(code: CodeType) -> tuple[str, ...]:
    """Global names that a function reads or writes, those of functions inside it included."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME")}
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _globals_of(const)]
    return tuple(sorted({*names, *inner}))


def _slots(kind: type) -> list[str]:
    names: list[str] = []
    for base in kind.__mro__:
        given = vars(base).get("__slots__", ())
        named = [given] if isinstance(given, str) else list(given)
        # Python mangles private names.
        names += [
            f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            for name in named
            if name not in ("__dict__", "__weakref__")
        ]
    return names


def _keeps_more_than_attributes(kind: type) -> bool:
    """Whether objects of a class are larger than their Python attributes need, as those of compiled extensions are."""
    size = object.__basicsize__ + _POINTER * len(_slots(kind))
    if kind.__dictoffset__ != 0 and not kind.__flags__ & _MANAGED_DICT:
        size += _POINTER
    if kind.__weakrefoffset__ > 0:
        size += _POINTER
    return kind.__basicsize__ > size or kind.__itemsize__ != 0


def _may_change(name: str, value: object) -> bool:
    """Whether an attribute of a class is one that a call may use or write to."""
    if isinstance(value, (FunctionType, staticmethod, classmethod, property)):
        return name not in ("__init__", "__new__")
    return not (name.startswith("__") or name == "_abc_impl" or hasattr(type(value), "__get__"))  # members of slots
