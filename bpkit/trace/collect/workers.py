"""Tracing by several processes, here or on a Ray cluster. Workers trace; the one who asked writes.

A worker loads its models once and is handed the next prompts when it has given the last ones back, so that what is in
flight is a batch of prompts for each worker, however many prompts there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.trace.collect.tracer import GENERATE_WITH, IndexedPrompt, TraceOptions, Tracer, Traces
from bpkit.trace.fingerprint import fingerprint_models
from bpkit.trace.records import PromptTrace

GO_ON = "What was traced is kept: the same command goes on from there"


Task = Sequence[IndexedPrompt]
"""Prompts that a worker traces together."""


class WorkerError(ChildProcessError):
    """A worker failed or is gone; the message names the prompt and says what to do."""


def tasks_of(prompts: Sequence[IndexedPrompt], batch_size: int, workers: int) -> list[Task]:
    """Tasks of at most `batch_size` prompts each, fewer where some of the workers would have none.

    >>> [len(task) for task in tasks_of([(i, None) for i in range(10)], 8, 2)]
    [5, 5]
    """
    size = max(1, min(batch_size, -(-len(prompts) // workers)))
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


def named(task: Task) -> str:
    """
    >>> from bpkit.prompts import Prompt
    >>> named([(0, Prompt("a", "x", "")), (1, Prompt("b", "x", ""))])
    "one of the prompts 'a', 'b'"
    """
    names = ", ".join(repr(prompt.id) for _, prompt in task)
    return f"prompt {names}" if len(task) == 1 else f"one of the prompts {names}"


def gone(worker: str, task: Task | None, said: str) -> WorkerError:
    """What is raised for a worker that is gone with a task, or while it loaded the models."""
    at = "while it loaded the models" if task is None else f"with {named(task)}"
    return WorkerError(f"{worker} is gone {at} ({said}). {GO_ON}")


class Remote(Protocol):
    """A worker somewhere else."""

    def give(self, task: Task | None) -> Any:
        """Hand it a task, or none, to load its models; returns what to wait for."""
        ...

    def take(self, given: Any, task: Task | None) -> list[PromptTrace]:
        """What became of it. Raises WorkerError."""
        ...


def share_out(workers: Iterable[Remote], tasks: Sequence[Task], wait: Callable[[list[Any]], Iterable[Any]]) -> Traces:
    """Hand out the tasks one by one; `wait` returns some of what is ready, once it is.

    A worker that does not get to loading its models has no task, and holds nobody up.
    """
    left, missing = iter(tasks), len(tasks)
    busy: dict[Any, tuple[Remote, Task | None]] = {worker.give(None): (worker, None) for worker in workers}
    while missing:
        for given in wait(list(busy)):
            worker, task = busy.pop(given)
            traces = worker.take(given, task)
            following = next(left, None)
            if following is not None:
                busy[worker.give(following)] = worker, following
            if task is not None:
                missing -= 1
                yield from traces
            del traces, given  # Ray keeps a result as long as somebody refers to it


@dataclass(frozen=True)
class Models:
    """What a worker loads; it can be sent to another process or machine.

    Attributes:
        target, drafter, device, dtype: as `SpeculativeDecoder.from_pretrained` takes them.
        weights: fingerprints of target and drafter that must be found, so that all workers have the same; None
            accepts any.
    """

    target: str | None
    drafter: str | dict[str, Any] | list[str | dict[str, Any]] | None
    device: str | None
    dtype: str | None
    weights: tuple[str, str | None] | None = None

    def load(self) -> SpeculativeDecoder:
        """Load them. Raises ValueError if the weights are others."""
        decoder = SpeculativeDecoder.from_pretrained(
            self.target, self.drafter, f"fixed:{GENERATE_WITH}", dtype=self.dtype, device=self.device
        )
        if self.weights is not None and fingerprint_models(decoder) != self.weights:
            raise ValueError(
                f"the weights of {self.target or 'the shipped target'} or its drafter are others here, or of another "
                "dtype: give every machine the same files, and name --device and --dtype"
            )
        return decoder


@dataclass
class Worker:
    """Traces prompts with models of its own, on one thread."""

    models: Models
    options: TraceOptions
    batch_size: int = 1

    @cached_property
    def _tracer(self) -> Tracer:
        from transformers.utils import logging

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_num_threads(1)
        return Tracer(self.models.load(), self.options, batch_size=self.batch_size)

    def run(self, task: Task | None) -> list[PromptTrace]:
        """Trace prompts, or only load the models. Raises WorkerError, whatever fails, which any process can read."""
        try:
            tracer = self._tracer
        except Exception as error:
            raise WorkerError(f"a worker cannot load the models: {type(error).__name__}: {error}") from error
        if task is None:
            return []
        try:
            return list(tracer.traces(task))
        except Exception as error:
            raise WorkerError(f"{named(task)} cannot be traced: {type(error).__name__}: {error}. {GO_ON}") from error


@dataclass(frozen=True)
class Processes:
    """Traces in `count` processes of this machine.

    They are daemons on pipes of their own, rather than those of a pool: it is known which prompt was lost with a
    process, they can be ended in the middle of a prompt, and they end by themselves when this process is gone.
    """

    models: Models
    options: TraceOptions
    count: int
    batch_size: int = 1

    def traces(self, prompts: Sequence[IndexedPrompt]) -> Traces:
        """Trace each (index, prompt), as they come. Raises WorkerError."""
        processes: list[_Process] = []
        tasks = tasks_of(prompts, self.batch_size, self.count)
        worker = Worker(self.models, self.options, self.batch_size)
        try:
            with uninterrupted():
                processes += [_Process(worker) for _ in tasks[: self.count]]
            yield from share_out(processes, tasks, wait)
        finally:
            for process in processes:
                process.end()


class _Process:
    """A worker in a process of its own."""

    def __init__(self, worker: Worker) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, worker), daemon=True)
        self.process.start()
        theirs.close()  # ours to close: only then is the end of theirs the end of the pipe

    def give(self, task: Task | None) -> Any:
        """Hand it over. The process waits in `recv`, so that this never blocks."""
        try:
            self.pipe.send(task)
        except OSError:
            raise self._gone(task) from None
        return self.pipe

    def take(self, given: Any, task: Task | None) -> list[PromptTrace]:
        try:
            found: list[PromptTrace] | WorkerError = self.pipe.recv()
        except (EOFError, OSError):
            raise self._gone(task) from None
        if isinstance(found, WorkerError):
            raise found
        return found

    def end(self) -> None:
        """End it, whatever it is at."""
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def _gone(self, task: Task | None) -> WorkerError:
        self.process.join(timeout=5)
        code = self.process.exitcode
        said = f"exit code {code}"
        if code is not None and code < 0:
            said = f"{signal.Signals(-code).name}; short of memory, the system kills processes"
        return gone("a worker process", task, said)


def _work(pipe: Any, worker: Worker) -> None:
    """The whole life of a process: prompts in, traces or a WorkerError out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            task = pipe.recv()
            try:
                pipe.send(worker.run(task))
            except WorkerError as error:
                pipe.send(error)
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """Without this, a process whose parent was killed would first finish its prompt."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that start here are deaf to Ctrl-C, which reaches all of a terminal's: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # comes with the first process, and would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
