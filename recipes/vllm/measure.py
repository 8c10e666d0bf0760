"""Runs of all methods, block by block: the same prompts under the same load for each, in random order."""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bpkit.prompts import Prompt
from bpkit.trace.load import ChangingLoad
from recipes.vllm.engines import TABLE, EngineProcess, arguments, engine_of, pinned, policy_of

FIXED = ("fixed:1", "fixed:2", "fixed:4", "fixed:6", "fixed:8")
"""No draft, and drafts of 1, 3, 5 and 7 tokens."""
BATCH_TABLE = "batch_table"
"""The method whose table is tuned, as vLLM's own is."""
FEWEST_REQUESTS = 4
WARMING_UP = 12
"""New tokens of the first run of an engine."""
TUNE, MEASURE = "tune", "measure"
Run = dict[str, Any]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchPlan:
    """What is run.

    Attributes:
        methods: names of engines or policies; see `recipes.vllm.engines`. Fixed lengths are always among them.
        base: arguments that all engines share. cost: file of the cost model of policies.
        concurrency: of closed loops. changing: levels of the load that changes.
        per_row, changing_per_row: requests for each row of a closed loop, and of a level.
        options: of generation.
        minutes: after which no further block begins, though each load has one; None for no end.
        core: that all processes run on.
    """

    methods: tuple[str, ...]
    base: dict[str, Any]
    cost: str
    concurrency: tuple[int, ...]
    changing: tuple[int, ...]
    repetitions: int
    per_row: float = 2.0
    changing_per_row: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    minutes: float | None = None
    core: int | None = None

    @property
    def loads(self) -> dict[str, tuple[int, ...]]:
        """Levels of rows by the load's name."""
        closed = {f"concurrency:{rows}": (rows,) for rows in self.concurrency}
        return {**closed, **({f"changing:{'-'.join(map(str, self.changing))}": self.changing} if self.changing else {})}

    @property
    def all_methods(self) -> tuple[str, ...]:
        """With the fixed lengths."""
        return tuple(dict.fromkeys((*FIXED, *self.methods)))

    def requests(self, levels: Sequence[int]) -> int:
        """Of a run."""
        if len(levels) > 1:
            return ChangingLoad(tuple(levels), self.changing_per_row).requests
        return max(FEWEST_REQUESTS, math.ceil(self.per_row * levels[0]))

    def stated(self) -> dict[str, Any]:
        """What runs of a file must have in common, as plain JSON values."""
        told: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in told.items() if name not in ("minutes", "repetitions")}


class RunFile:
    """Runs as lines of JSON, so that an interrupted measurement goes on.

    Raises:
        ValueError: the file has runs of another plan.
    """

    def __init__(self, path: Path, stated: Mapping[str, Any]) -> None:
        self.path, self.runs = path, list[Run]()
        if not path.exists():
            self._write({"plan": stated})
            return
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != {"plan": stated}:
            raise ValueError(f"{path} holds runs with other settings: name another file, or remove it")
        self.runs = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> Run | None:
        """The run with these values."""
        return next((run for run in self.runs if all(run[name] == value for name, value in key.items())), None)

    def add(self, run: Run) -> None:
        """Keep a run."""
        self.runs.append(run)
        self._write(run)

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


class Bench:
    """All runs of a plan.

    Args:
        prompts: with splits `validation`, to tune tables on, and `test`.
    """

    def __init__(self, plan: BenchPlan, prompts: Sequence[Prompt], file: RunFile, report: Report) -> None:
        self.plan, self.file, self.report = plan, file, report
        self.prompts = {split: [p for p in prompts if p.split == split] for split in ("validation", "test")}
        self.table: dict[int, int] = {}
        self._engines: dict[str, EngineProcess] = {}
        self._done = 0

    def run(self) -> None:
        """Tune the tables, then run all blocks that time allows. Raises ValueError, RuntimeError."""
        started, plan = time.monotonic(), self.plan
        blocks = [(repetition, load) for repetition in range(plan.repetitions) for load in plan.loads]
        tuned = [f"concurrency:{rows}" for rows in plan.concurrency] if {TABLE, BATCH_TABLE} & {*plan.methods} else []
        self._all = len(tuned) * len(FIXED) + len(blocks) * len(plan.all_methods)
        with ExitStack() as self._resources:
            self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory()))
            self._resources.enter_context(pinned(plan.core))
            self._resources.callback(self._close_engines)
            for load in tuned:
                self._block(TUNE, 0, load, FIXED)
            self.table = best_table(self.file.runs)
            for repetition, load in blocks:
                if load == next(iter(plan.loads)):
                    self._restart(random.Random(f"{plan.seed} engines {repetition}"))
                over = plan.minutes is not None and time.monotonic() - started > 60 * plan.minutes
                if not over or repetition == 0:
                    self._block(MEASURE, repetition, load, plan.all_methods)

    def _restart(self, rng: random.Random) -> None:
        """Let all engines begin anew, in random order: the first to start may be slower, by some per cent, for good."""
        self._close_engines()
        names = sorted({engine_of(method) for method in self.plan.all_methods})
        for name in rng.sample(names, len(names)):
            self._engine(name)

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _block(self, phase: str, repetition: int, load: str, methods: Sequence[str]) -> None:
        rng = random.Random(f"{self.plan.seed} {phase} {repetition} {load}")
        levels = self.plan.loads[load]
        prompts = drawn(self.prompts["test" if phase == MEASURE else "validation"], self.plan.requests(levels), rng)
        for method in rng.sample(list(methods), len(methods)):
            key = {"phase": phase, "repetition": repetition, "load": load, "method": method}
            self._done += 1
            if self.file.find(**key) is None:
                self.report(f"{load}, {method}", self._done - 1, self._all)
                reply = self._ask(method, prompts, levels, self.plan.options)
                self.file.add({**key, "prompts": [prompt.id for prompt in prompts], **reply})

    def _ask(self, method: str, prompts: Sequence[Prompt], levels: Sequence[int], options: Mapping[str, Any]) -> Run:
        policy = policy_of(method)
        asked = {
            "policy": batch_table(self.table) if policy == BATCH_TABLE else policy,
            "prompts": [{"text": prompt.text, "chat": prompt.chat} for prompt in prompts],
            "levels": list(levels),
            "per_row": self.plan.changing_per_row,
            "options": dict(options),
        }
        return self._engine(engine_of(method)).ask(asked)

    def _engine(self, name: str) -> EngineProcess:
        """An engine, started and warm."""
        if name not in self._engines:
            plan = self.plan
            methods = [method for method in plan.all_methods if engine_of(method) == name]
            given = arguments(name, plan.base, methods, plan.cost, vllm_table(self.table) if name == TABLE else ())
            self._engines[name] = EngineProcess(given, self._folder / name.strip("@"))
            most = max(max(levels) for levels in plan.loads.values())
            prompts = (self.prompts["validation"] * most)[:most]
            for levels in ((1,), (most,)):
                self._ask(methods[-1], prompts[: levels[0]], levels, {**plan.options, "max_new_tokens": WARMING_UP})
        return self._engines[name]


def drawn(prompts: Sequence[Prompt], count: int, rng: random.Random) -> list[Prompt]:
    """Prompts in random order, each once more only after all were taken."""
    found: list[Prompt] = []
    while len(found) < count:
        found += rng.sample(list(prompts), min(len(prompts), count - len(found)))
    return found


def rate(run: Run) -> float:
    """Tokens per second: of a closed loop while all rows run, else of all."""
    return float(run["window"]["tokens"] / run["window"]["seconds"])


def best_table(runs: Sequence[Run]) -> dict[int, int]:
    """The block size of the best fixed length at each concurrency, by the runs that tuned."""
    best: dict[int, tuple[float, int]] = {}
    for run in runs:
        if run["phase"] == TUNE:
            rows, size = (int(run[key].rpartition(":")[2]) for key in ("load", "method"))
            best[rows] = max(best.get(rows, (0.0, 0)), (rate(run), size))
    return {rows: size for rows, (_, size) in sorted(best.items())}


def batch_table(table: Mapping[int, int]) -> str:
    """A table as a policy.

    >>> batch_table({1: 6, 8: 4})
    'batch_table:1:6+8:4'
    """
    return f"{BATCH_TABLE}:" + "+".join(f"{rows}:{size}" for rows, size in table.items())


def vllm_table(table: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """A table as vLLM takes it: first and last batch size, and draft length.

    >>> vllm_table({1: 6, 8: 4})
    [(1, 7, 5), (8, 8, 3)]
    """
    rows = [*table, max(table) + 1]
    return [(low, high - 1, size - 1) for low, high, size in zip(rows, rows[1:], table.values(), strict=False)]
