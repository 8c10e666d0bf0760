"""The whole measurement: warm-up, thread counts, and prompt after prompt by all in turn."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bpkit.files import utc, write_json
from bpkit.installation.machine import available_cores, describe_machine
from bpkit.judge.wall_clock.threads import Rated, ThreadTable, best_counts, candidate_counts, try_thread_counts
from bpkit.progress import NoProgress, Progress
from recipes.peers.contestants import GENERATE, LOOP, Contestant
from recipes.peers.figures import PeerFigures, PeerRun
from recipes.peers.processes import Contest, contest

SCHEMA_VERSION = 1
WARM_UP_TOKENS, TRIAL_TOKENS, TRIAL_PROMPTS = 8, 32, 2


@dataclass(frozen=True)
class Task:
    """A prompt as all read it, in token ids. `stream` is its place among the prompts."""

    id: str
    domain: str
    ids: tuple[int, ...]
    stream: int


@dataclass
class Progressed:
    """What was measured so far: thread counts, and by prompt the reply of each contestant."""

    threads: dict[str, int] = field(default_factory=dict)
    tried: ThreadTable = field(default_factory=dict)
    replies: dict[str, dict[str, Any]] = field(default_factory=dict)


class Saved:
    """Replies of prompts in a file beside the figures, with which the same command goes on.

    Args:
        file: None keeps nothing.
        asked: what is measured; a file of something else is written anew.
    """

    def __init__(self, file: Path | None, asked: Any) -> None:
        self.file, self.key = file, hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def read(self) -> Progressed:
        if self.file is None or not self.file.is_file():
            return Progressed()
        found = json.loads(self.file.read_text(encoding="utf-8"))
        if found.pop("key") != self.key:
            return Progressed()
        found["tried"] = {name: {int(n): rate for n, rate in of.items()} for name, of in found["tried"].items()}
        return Progressed(**found)

    def write(self, progressed: Progressed) -> None:
        if self.file is not None:
            write_json(self.file, {"key": self.key, **vars(progressed)})

    def says(self) -> str:
        """What to tell whoever interrupts."""
        if self.file is None or not self.file.is_file():
            return "Nothing was written."
        return f"What was measured is in {self.file}; the same command goes on from there."

    def remove(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def measure(
    target: str,
    contestants: Sequence[Contestant],
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    saved: Saved,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and return the report as plain JSON values; `recipes.peers.report` says what is in it.

    Args:
        target: folder or Hub name of the target.
        threads: None: each contestant at its own best.
        seed: of the order of prompts and the bootstrap.

    Raises:
        RuntimeError: one of the two ways of plain decoding fails.
    """
    bar, machine, started = progress or NoProgress(), describe_machine(torch.device("cpu")), time.time()
    done = saved.read()
    bar.start("loading", 1)
    with contest(target, contestants) as running:
        warm_up(running, tasks[0], bar)
        if not done.threads.keys() >= set(running.names):
            done.threads, done.tried = choose_threads(running, tasks, max_new_tokens, threads, bar)
        bar.start("measuring", len(tasks))
        # A policy that learns must not meet one domain after the other.
        for place, task in enumerate(random.Random(seed).sample(tasks, len(tasks))):
            if not done.replies.get(task.id, {}).keys() >= set(running.names):
                done.replies[task.id] = one_prompt(running, place, task, max_new_tokens, done.threads)
                saved.write(done)
            bar.tick()
        refuse_without_plain(running)
        names, left_out, versions = running.names, dict(running.left_out), running.versions
    figures = PeerFigures(
        {name: {task.id: PeerRun(**done.replies[task.id][name]) for task in tasks} for name in names},
        {task.id: task.domain for task in tasks},
        seed,
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": {**machine, "threads": {n: done.threads[n] for n in names}, "threads_tried": done.tried},
        "versions": versions,
        "settings": {
            "max_new_tokens": max_new_tokens,
            "prompts": [task.id for task in tasks],
            "prompt_tokens": sum(len(task.ids) for task in tasks),
            "seed": seed,
            "started": utc(started),
            "seconds": time.time() - started,
        },
        "left_out": left_out,
        **figures.as_json(),
        "measurements": [
            {"contestant": name, "prompt": task.id, "tokens": len(reply["tokens"]), **without_tokens(reply)}
            for task in tasks
            for name, reply in done.replies[task.id].items()
        ],
    }


def warm_up(running: Contest, task: Task, bar: Progress) -> None:
    """First calls allocate, and whoever cannot decode is found out."""
    bar.start("warming up", len(running.names))
    for name in running.names:
        asked = {"ids": task.ids, "stream": task.stream, "threads": torch.get_num_threads()}
        running.ask(name, **asked, max_new_tokens=WARM_UP_TOKENS, trial=True)
        bar.tick()
    refuse_without_plain(running)


def refuse_without_plain(running: Contest) -> None:
    """Raise RuntimeError unless both ways of plain decoding are there."""
    for name in (GENERATE, LOOP):
        if name in running.left_out:
            raise RuntimeError(f"{name} cannot decode with this target: {running.left_out[name]}")


def choose_threads(
    running: Contest, tasks: Sequence[Task], max_new_tokens: int, given: int | None, bar: Progress
) -> tuple[dict[str, int], ThreadTable]:
    """Threads of each contestant, and tokens per second by contestant and count."""
    if given is not None:
        return dict.fromkeys(running.names, given), {}
    first_of_domain: dict[str, Task] = {}
    for task in tasks:
        first_of_domain.setdefault(task.domain, task)
    few = list(first_of_domain.values())[:TRIAL_PROMPTS]
    asked = partial(rated, running, tokens=min(max_new_tokens, TRIAL_TOKENS))
    ways = {name: partial(asked, name) for name in running.names}
    table = try_thread_counts(ways, few, candidate_counts(available_cores()), bar)
    return best_counts(table), table


def rated(running: Contest, name: str, task: Task, *, tokens: int) -> Rated:
    """Tokens and seconds with as many threads as torch has in this process; none in a second of one that failed."""
    if name in running.left_out:
        return 0, 1.0
    reply = running.ask(
        name, ids=task.ids, stream=task.stream, max_new_tokens=tokens, threads=torch.get_num_threads(), trial=True
    )
    return (len(reply["tokens"]), reply["seconds"]) if reply is not None else (0, 1.0)


def one_prompt(
    running: Contest, place: int, task: Task, max_new_tokens: int, threads: Mapping[str, int]
) -> dict[str, Any]:
    """The replies of all; at each place another one begins, so that drift of the machine meets all alike."""
    names = running.names
    shift = place % len(names)
    replies = {}
    for name in names[shift:] + names[:shift]:
        asked = {"ids": task.ids, "stream": task.stream, "threads": threads[name]}
        reply = running.ask(name, **asked, max_new_tokens=max_new_tokens, trial=False)
        if reply is not None:
            replies[name] = reply
    return replies


def without_tokens(reply: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a reply."""
    return {name: reply[name] for name in ("seconds", "steps", "step_tokens")}
