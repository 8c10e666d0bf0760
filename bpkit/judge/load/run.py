"""Policies and fixed sizes on a simulated server: every load, each with the same requests for all of them."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from bpkit.judge.evaluation.candidate import Candidate
from bpkit.judge.load.figures import CaseRuns, ServerRun
from bpkit.judge.load.report import load_report
from bpkit.judge.load.setup import FIXED, POLICIES, LoadSetup
from bpkit.progress import NoProgress, Progress
from bpkit.trace.server import ServerReplayer


class Job(NamedTuple):
    """One run: the load by its place, the seed by its number from 0, and who decides, by group and name."""

    case: int
    number: int
    group: str
    name: str


class LoadRuns:
    """The runs of an evaluation, as far as they are done.

    Attributes:
        done: by job.
    """

    def __init__(self, setup: LoadSetup) -> None:
        self.setup = setup
        self.done: dict[Job, ServerRun] = {}
        self.candidates = {name: Candidate(policy).fitted(setup.traced) for name, policy in setup.policies.items()}

    def jobs(self) -> list[Job]:
        """All of them, in the order in which they are done: load by load, and there seed by seed."""
        who = [(FIXED, name) for name in self.setup.fixed] + [(POLICIES, name) for name in self.setup.policies]
        return [
            Job(case, number, group, name)
            for case in range(len(self.setup.cases))
            for number in range(self.setup.seeds)
            for group, name in who
        ]

    def run(self, progress: Progress | None = None, *, workers: int = 1) -> None:
        """Do what is not done yet; what was done when it is interrupted stays.

        Args:
            workers: processes. Decisions are charged as they are measured: take no more than there are idle cores.

        Raises:
            PolicyError, TraceError: the trace cannot serve a policy.
            CostError: the cost model cannot price a step.
        """
        progress, left = progress or NoProgress(), [job for job in self.jobs() if job not in self.done]
        progress.start("serving", len(left))
        for job, run in self._each(left) if workers == 1 else self._in_processes(left, workers):
            self.done[job] = run
            progress.tick()

    def _each(self, jobs: list[Job]) -> Iterator[tuple[Job, ServerRun]]:
        for job in jobs:
            yield job, self.one(job)

    def _in_processes(self, jobs: list[Job], workers: int) -> Iterator[tuple[Job, ServerRun]]:
        with multiprocessing.get_context("spawn").Pool(workers, _begin, (self.setup,)) as pool:
            yield from pool.imap_unordered(_work, jobs)

    def one(self, job: Job) -> ServerRun:
        """Do one."""
        setup, case = self.setup, self.setup.cases[job.case]
        prompts, places = setup.requests(case, job.number)
        load = case.load(setup.seed + job.number)
        started = time.perf_counter()
        replayer = ServerReplayer(
            setup.spec,
            self._policy(job),
            setup.cost,
            seed=setup.trace_seed,
            max_tokens=setup.max_tokens,
            charges_decisions=setup.charged and job.group == POLICIES,
        )
        served = replayer.serve(prompts, places, load)
        return ServerRun(served, time.perf_counter() - started)

    def _policy(self, job: Job) -> Any:
        if job.group == POLICIES:
            return self.candidates[job.name].make()
        size, source = self.setup.fixed[job.name]
        return f"fixed:{size},source={source}" if source else f"fixed:{size}"

    def complete(self, case: int) -> CaseRuns:
        """The runs of a load, seed by seed, of the seeds in which all are done."""
        jobs = [job for job in self.jobs() if job.case == case]
        missing = {job.number for job in jobs if job not in self.done}
        found: CaseRuns = {}
        for job in jobs:
            runs = found.setdefault(job.group, {}).setdefault(job.name, [])
            if job.number not in missing:
                runs.append(self.done[job])
        return found

    def report(self) -> dict[str, Any]:
        """Plain JSON values of what is done, see `docs/load.md`; loads without a complete seed are left out."""
        return load_report(self.setup, map(self.complete, range(len(self.setup.cases))))


def evaluate_load(setup: LoadSetup, progress: Progress | None = None, *, workers: int = 1) -> dict[str, Any]:
    """Run everything and report it. Raises as `LoadRuns.run`."""
    runs = LoadRuns(setup)
    runs.run(progress, workers=workers)
    return runs.report()


_held: list[LoadRuns] = []
"""Of a process that does jobs: the runs that they belong to."""


def _begin(setup: LoadSetup) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    _held.append(LoadRuns(setup))


def _work(job: Job) -> tuple[Job, ServerRun]:
    return job, _held[0].one(job)
