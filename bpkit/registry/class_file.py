"""Classes in files: `./my_policy.py:MyPolicy`, and `./my_policy.py` where the file has one class of the kind."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from bpkit.policy import PolicyError

MODULE = "bpkit_file_"
"""Modules of such files are called so, and after the file."""
Base = TypeVar("Base")


def names_file(name: str) -> bool:
    """Whether a name is that of a file, with or without a class in it and options after it."""
    first = name.partition(":")[0]
    # A path may have a colon of its own; a name has none before its options.
    return first.endswith(".py") or (first.startswith(("/", ".", "~")) and (".py:" in name or name.endswith(".py")))


def split_file(text: str) -> tuple[str, str]:
    """The file with its class, and what follows: options. A class is a word; anything else is taken for options.

    >>> split_file("./mine.py:Mine:runs/mine,width=32")
    ('./mine.py:Mine', 'runs/mine,width=32')
    >>> split_file("./mine.py:runs/mine")
    ('./mine.py', 'runs/mine')
    """
    path, dot, rest = text.partition(".py:")
    if not dot:
        return text, ""
    head, _, tail = rest.partition(":")
    if head.isidentifier():
        return f"{path}.py:{head}", tail
    return f"{path}.py", rest.removeprefix(":")


def class_of_file(spec: str, base: type[Base], *, what: str = "policy") -> type[Base]:
    """The class that `./file.py:ClassName` names, a subclass of `base`; of `./file.py`, the only one defined there.

    The file is read again each time. It may import modules that lie beside it.

    Raises:
        PolicyError: there is no such file or class, or the file cannot be imported.
    """
    path_text, _, class_name = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "")
    module = module_of_file(path_text, where=f" ({what} {spec!r})")
    if not class_name:
        return _only_one(module, base, path_text, what)
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, base):
        return found
    classes = ", ".join(_classes(module, base)) or "none"
    raise PolicyError(f"{path_text} has no {what} class {class_name!r}; it has: {classes}")


def module_of_file(path_text: str, *, where: str = "") -> ModuleType:
    """Import a file, anew each time. Raises PolicyError."""
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise PolicyError(f"there is no file {path_text!r}{where}; looked in {os.getcwd()}")
    path = path.resolve()
    # Two files may have one name: what a class says of its module must lead back to its own file.
    module_name = f"{MODULE}{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that what lies there hides nothing
    before = sys.modules.get(module_name)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        if before is None:
            del sys.modules[module_name]
        else:
            sys.modules[module_name] = before
        relative = isinstance(error, ImportError) and "relative import" in str(error)
        hint = "; import a module beside the file by its bare name, as in `import helpers`" if relative else ""
        raise PolicyError(f"{path_text} cannot be imported: {type(error).__name__}: {error}{hint}") from error
    return module


def file_of(kind: type) -> Path | None:
    """The file that `class_of_file` found a class in; None for one that was imported by the name of its module."""
    if not kind.__module__.startswith(MODULE):
        return None
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return Path(file) if file is not None else None


def _classes(module: ModuleType, base: type[Base]) -> dict[str, type[Base]]:
    """Subclasses of `base` in a module, defined or imported there."""
    return {n: v for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, base) and v is not base}


def _only_one(module: ModuleType, base: type[Base], path_text: str, what: str) -> type[Base]:
    classes = {name: found for name, found in _classes(module, base).items() if not name.startswith("_")}
    defined = {name: found for name, found in classes.items() if found.__module__ == module.__name__}
    strangers = {name: found for name, found in classes.items() if found.__module__.partition(".")[0] != "bpkit"}
    chosen = defined or strangers
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    if not chosen:
        raise PolicyError(f"{path_text} has no {what} class: define one in it")
    raise PolicyError(
        f"{path_text} has several {what} classes: name one of them, as in {path_text}:{next(iter(chosen))} "
        f"({', '.join(chosen)})"
    )
