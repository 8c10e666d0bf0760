"""One run at a time works on a trace folder: a lock file names it, and one that a dead process left is taken over."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from bpkit.trace.store.manifest import TraceError

LOCK = ".lock"
_ATTEMPTS = 20
_held: set[Path] = set()
"""Locks of this process: one with its id that it does not hold was left by an earlier process of that id."""


class Holder(BaseModel):
    """Who holds a lock.

    Attributes:
        born: when the process began, in the kernel's ticks, so that another one with its id is not taken for it; None
            where the system does not say.
        since: UTC, for people.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    host: str
    born: int | None = None
    since: str = ""

    @classmethod
    def here(cls) -> Holder:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(pid=os.getpid(), host=socket.gethostname(), born=_born(os.getpid()), since=now)

    def gone(self, lock: Path) -> bool:
        """Whether it is known to work no more. Of processes on other hosts nothing is known."""
        if self.host != socket.gethostname():
            return False
        if self.pid == os.getpid():
            return lock not in _held
        return not _alive(self.pid) or (self.born is not None and self.born != _born(self.pid))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, for as long as the context lasts.

    Raises:
        TraceError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder.resolve() / LOCK
    mine = Holder.here()
    _claim(lock, mine)
    _held.add(lock)
    try:
        yield
    finally:
        _held.discard(lock)
        if _read(lock) == mine:
            lock.unlink(missing_ok=True)


def _claim(lock: Path, mine: Holder) -> None:
    for _ in range(_ATTEMPTS):
        if _create(lock, mine):
            return
        found = _read(lock)
        if found is not None and not found.gone(lock):
            break
        _remove(lock, found)
    raise TraceError(_refusal(lock, _read(lock)))


def _create(lock: Path, mine: Holder) -> bool:
    """Create the lock with its content in one step. False if there is one."""
    partial = lock.with_name(f"{LOCK}.{os.getpid()}.tmp")
    try:
        partial.write_text(mine.model_dump_json() + "\n", encoding="utf-8")
        os.link(partial, lock)
    except (FileExistsError, FileNotFoundError):  # the second: whoever holds the folder cleared it
        return False
    except OSError:  # a file system without links
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(mine.model_dump_json() + "\n")
        except FileExistsError:
            return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _remove(lock: Path, stale: Holder | None) -> None:
    """Remove a stale lock. Of several that try, one gets it; one that meanwhile belongs to another run is put back."""
    aside = lock.with_name(f"{LOCK}.{os.getpid()}.stale.tmp")
    try:
        os.replace(lock, aside)
    except FileNotFoundError:
        return
    if _read(aside) != stale:
        with contextlib.suppress(OSError):
            os.link(aside, lock)
    aside.unlink(missing_ok=True)


def _read(lock: Path) -> Holder | None:
    """Who holds it; None if there is no lock, or it is no description of a process."""
    try:
        return Holder.model_validate_json(lock.read_bytes())
    except (OSError, ValidationError):
        return None


def _refusal(lock: Path, found: Holder | None) -> str:
    who = "another run" if found is None else f"process {found.pid} on {found.host}, since {found.since}"
    return (
        f"{lock.parent} is being traced by {who}: two runs on one folder would get in each other's way. Wait for it, "
        f"or name another folder; if that run is gone for certain, delete {lock}"
    )


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there, `kill` has no harmless signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is someone else's
        return True
    return True


def _born(pid: int) -> int | None:
    """When a process began, where Linux says so; -1 for one that has ended but was not waited for."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return -1 if after_name[0] == "Z" else int(after_name[19])
    except (OSError, ValueError, IndexError):
        return None
