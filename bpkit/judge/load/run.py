"""Policies and fixed sizes on a simulated server: every load, each with the same requests for all of them."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bpkit.judge.evaluation.candidate import Candidate
from bpkit.judge.evaluation.leak import find_leaks, leak_notes, refusal
from bpkit.judge.load.figures import CaseRuns, ServerRun
from bpkit.judge.load.report import load_report
from bpkit.judge.load.setup import BOUNDS, CLAIRVOYANT, DISTRIBUTIONS, FIXED, POLICIES, LoadSetup
from bpkit.policy import PolicyError
from bpkit.progress import NoProgress, Progress
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.collect.workers import uninterrupted
from bpkit.trace.load import ClosedLoop, Load
from bpkit.trace.oracle.clairvoyant import Known, clairvoyant, knows_distributions
from bpkit.trace.oracle.load_regret import split_of_regret
from bpkit.trace.oracle.regret import NotTraced
from bpkit.trace.records import PromptTrace
from bpkit.trace.server import ServerReplayer
from bpkit.trace.store.manifest import TraceError


class Job(NamedTuple):
    """One run: the load by its place, the seed by its number from 0, and who decides, by group and name."""

    case: int
    number: int
    group: str
    name: str


JobRuns = dict[str, ServerRun]
"""By name; one of a policy or a fixed size, all bounds together."""


class LoadRuns:
    """The runs of an evaluation, as far as they are done.

    Attributes:
        done: by job.
        candidates: the policies that are judged. left_out: why others are not. leak_notes: what some have seen before.

    Raises:
        PolicyError, TraceError: the trace cannot serve a policy, or holds what it was trained on.
        CostError: the cost model cannot price a step.
    """

    def __init__(self, setup: LoadSetup) -> None:
        self.setup = setup
        self.done: dict[Job, JobRuns] = {}
        self.candidates: dict[str, Candidate] = {}
        self.left_out: dict[str, str] = {}
        held = {"validation": (), "test": setup.prompts}
        leaks, silent = find_leaks(setup.policies, held, setup.spec, setup.cost)
        for name, policy in setup.policies.items():
            try:
                if name in leaks and not setup.allow_leaks:
                    raise PolicyError(refusal(name, leaks[name]))
                self.candidates[name] = self._checked(Candidate(policy).fitted(setup.traced))
            except (PolicyError, TraceError) as error:
                if not setup.leave_out:
                    raise
                self.left_out[name] = str(error)
        seen = {name: leak for name, leak in leaks.items() if name in self.candidates}
        self.leak_notes = leak_notes(seen, [name for name in silent if name in self.candidates])

    def _checked(self, candidate: Candidate) -> Candidate:
        """One that has served a request: what is wrong with it is told before anything long begins."""
        self._replayer(candidate.make()).serve(self.setup.prompts[:1], [0], ClosedLoop(1))
        return candidate

    def _replayer(self, policy: PolicyLike, *, charged: bool = False) -> ServerReplayer:
        setup = self.setup
        return ServerReplayer(setup.spec, policy, setup.cost, charges_decisions=charged, **setup.server)

    def jobs(self) -> list[Job]:
        """All of them, in the order in which they are done: load by load, and there seed by seed."""
        who = [(FIXED, name) for name in self.setup.fixed] + [(POLICIES, name) for name in self.candidates]
        known = [(BOUNDS, "all")] if self.setup.bounds else []
        return [
            Job(case, number, group, name)
            for case in range(len(self.setup.cases))
            for number in range(self.setup.seeds)
            for group, name in (who + known if number < self.setup.bound_seeds else who)
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
        for job, runs in self._each(left) if workers == 1 else self._in_processes(left, workers):
            self.done[job] = runs
            progress.tick()

    def _each(self, jobs: list[Job]) -> Iterator[tuple[Job, JobRuns]]:
        for job in jobs:
            yield job, self.one(job)

    def _in_processes(self, jobs: list[Job], workers: int) -> Iterator[tuple[Job, JobRuns]]:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        with uninterrupted():
            pool = context.Pool(workers, _begin, (self.setup,))
        with pool:
            yield from pool.imap_unordered(_work, jobs)

    def one(self, job: Job) -> JobRuns:
        """Do one."""
        setup, case = self.setup, self.setup.cases[job.case]
        prompts, places = setup.requests(case, job.number)
        load = setup.load(case, job.number)
        if job.group == BOUNDS:
            return self._bounds(prompts, places, load)
        started = time.perf_counter()
        replayer = self._replayer(self._policy(job), charged=setup.charged and job.group == POLICIES)
        served = replayer.serve(prompts, places, load)
        return {job.name: ServerRun(served, time.perf_counter() - started)}

    def _bounds(self, prompts: Sequence[PromptTrace], places: Sequence[int], load: Load) -> JobRuns:
        """Serve requests knowing what they are worth, and say where policies lose time against that."""
        setup = self.setup
        knowing = {DISTRIBUTIONS: knows_distributions, CLAIRVOYANT: clairvoyant}
        found: dict[str, tuple[Known, float]] = {}
        for name in setup.bounds:
            started = time.perf_counter()
            known = knowing[name](setup.spec, setup.cost, prompts, places, load, **setup.server)
            found[name] = known, time.perf_counter() - started
        first, *others = [known for known, _ in found.values()]
        knows_noise = others[0] if others else None
        regrets: dict[str, Mapping[str, float] | str] = {}
        for policy, candidate in self.candidates.items():
            try:
                replayer = self._replayer(candidate.make(), charged=setup.charged)
                regrets[policy] = split_of_regret(replayer, prompts, places, load, first, knows_noise)
            except NotTraced as error:
                regrets[policy] = str(error)
        return {
            name: ServerRun(known.served, seconds, known.least_seconds, regrets if known is first else {})
            for name, (known, seconds) in found.items()
        }

    def _policy(self, job: Job) -> PolicyLike:
        if job.group == POLICIES:
            return self.candidates[job.name].make()
        size, source = self.setup.fixed[job.name]
        return f"fixed:{size},source={source}" if source else f"fixed:{size}"

    def complete(self, case: int) -> CaseRuns:
        """The runs of a load, of the seeds in which all are done."""
        jobs = [job for job in self.jobs() if job.case == case]
        missing = {job.number for job in jobs if job not in self.done}
        found: CaseRuns = {}
        for job in jobs:
            for name, run in self.done[job].items() if job.number not in missing else ():
                found.setdefault(job.group, {}).setdefault(name, {})[job.number] = run
        return found

    def report(self) -> dict[str, Any]:
        """Plain JSON values of what is done, see `docs/load.md`; loads without a complete seed are left out."""
        report = load_report(self.setup, map(self.complete, range(len(self.setup.cases))))
        return {**report, "left_out": self.left_out, "notes": [*self.leak_notes, *report["notes"]]}


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


def _work(job: Job) -> tuple[Job, JobRuns]:
    return job, _held[0].one(job)
