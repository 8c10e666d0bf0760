"""What an evaluation under load is made of: prompts, policies, and the loads that a simulated server is put under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bpkit.judge.evaluation.fixed import label
from bpkit.judge.sources import source_names
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.cost import NamedCost
from bpkit.trace.load import ChangingLoad, ClosedLoop, Load, PoissonLoad
from bpkit.trace.oracle.paths import FixedChoice, fixed_choices
from bpkit.trace.records import PromptTrace
from bpkit.types import DecoderSpec

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
"""Fixed block sizes that are tried by default, as far as they were traced."""
FEWEST, PER_ROW = 64, 4
"""Requests of a run by default: so many, or so many for each row that runs, whichever is more."""
CONCURRENCY, RATE, CHANGING = "concurrency", "rate", "changing"
FIXED, POLICIES, BOUNDS = "fixed", "policies", "bounds"
"""Groups of those who decide."""
DISTRIBUTIONS, CLAIRVOYANT = "distributions", "clairvoyant"
"""Bounds: who knows the chances of drafted tokens, but not the noise; and who knows what stands."""


@dataclass(frozen=True)
class LoadCase:
    """A load by name, with the number of its requests.

    Attributes:
        kind: `concurrency`, `rate` or `changing`.
        rows: that run at most.
        rate: of arrivals, a second. levels: of a load that changes.
    """

    name: str
    kind: str
    rows: int
    requests: int
    rate: float | None = None
    levels: tuple[int, ...] = ()

    @classmethod
    def concurrency(cls, rows: int, requests: int | None = None) -> LoadCase:
        """A closed loop."""
        return cls(f"{CONCURRENCY}:{rows}", CONCURRENCY, rows, requests or _requests(rows))

    @classmethod
    def arrivals(cls, rate: float, max_rows: int, requests: int | None = None) -> LoadCase:
        """Poisson arrivals."""
        return cls(f"{RATE}:{rate:g}", RATE, max_rows, requests or _requests(max_rows), rate=rate)

    @classmethod
    def changing(cls, levels: Sequence[int]) -> LoadCase:
        """A closed loop whose concurrency changes."""
        load = ChangingLoad(tuple(levels))
        return cls(f"{CHANGING}:{'-'.join(map(str, levels))}", CHANGING, max(levels), load.requests, levels=load.levels)

    def load(self, seed: int, spread: float = 0.0) -> Load:
        """The load itself. Seed: of the arrivals. Spread: of a closed loop, see `ClosedLoop`."""
        if self.rate is not None:
            return PoissonLoad(self.rate, self.requests, max_rows=self.rows, seed=seed)
        return ChangingLoad(self.levels) if self.levels else ClosedLoop(self.rows, spread)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        named = {"kind": self.kind, "rows": self.rows, "requests": self.requests}
        if self.rate is not None:
            named["rate"] = self.rate
        return {**named, "levels": list(self.levels)} if self.levels else named


def _requests(rows: int) -> int:
    return max(FEWEST, PER_ROW * rows)


@dataclass(frozen=True)
class LoadSetup:
    """What all runs share.

    Args:
        prompts: of one trace, in memory. Each seed has its own share of them, the same mix of domains in each, so that
            seeds are independent and their spread is that of prompts and of order.
        spec: of the decoder that the trace stands for.
        cost: with tables for as many rows as the loads have.
        policies: by name, as specs: each run makes a fresh one.
        cases: the loads.
        block_sizes: fixed sizes that are run at each load, of each source; traced ones, and 1. None: those of `SIZES`
            that were traced.
        seeds: runs of each policy and load. seed: the first.
        max_tokens: positions of a step at most; see `ServerAdmission`. mixes_passes: see `ServerClock`;
            by default as the cost model's engine does (`mixes_prompts`).
        charges_decisions: whether policies' decision time takes time on the server. Fixed sizes decide nothing and are
            not charged; costs that are not in seconds charge nobody.
        slo_tpot: seconds an output token may take, of a request that counts for goodput.
        trace_seed: of the trace, for the policies' own random numbers.
        bound_seeds: seeds, the first ones, that are also served by who knows what every draft is worth; 0: none. Bounds
            take as long as a dozen policies.
        leave_out: a policy that the trace cannot serve is left out with a sentence; otherwise it is an error.
        allow_leaks: judge a trained policy also on prompts that it was trained or chosen on, and say so in `notes`;
            otherwise such a policy is one that the trace cannot serve.

    Raises:
        ValueError: fewer prompts than seeds, no load, or what was not traced or has no price.
    """

    prompts: Sequence[PromptTrace]
    spec: DecoderSpec
    cost: NamedCost
    policies: Mapping[str, PolicyLike]
    cases: Sequence[LoadCase]
    block_sizes: tuple[int, ...] | None = None
    seeds: int = 5
    seed: int = 0
    max_tokens: int | None = None
    mixes_passes: bool | None = None
    charges_decisions: bool = True
    slo_tpot: float | None = None
    trace_seed: int | None = None
    bound_seeds: int = 1
    leave_out: bool = False
    allow_leaks: bool = False
    shares: tuple[tuple[int, ...], ...] = field(init=False)
    fixed: Mapping[str, FixedChoice] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.prompts) < self.seeds:
            raise ValueError(
                f"{len(self.prompts)} prompts for {self.seeds} seeds, each of which needs prompts of its own: take "
                "more prompts, or fewer seeds"
            )
        if not self.cases:
            raise ValueError("no load was given: name numbers of rows, rates of arrivals, or levels of a load")
        most = max(case.rows for case in self.cases)
        if most > self.cost.largest_rows:
            raise ValueError(
                f"a load of {most} rows, but cost model {self.cost.name!r} prices up to {self.cost.largest_rows}: "
                "measure more with `bpkit calibrate --batch-sizes`, or take smaller loads"
            )
        object.__setattr__(self, "shares", self._shares())
        object.__setattr__(self, "fixed", self._fixed())

    def load(self, case: LoadCase, number: int) -> Load:
        """The load of a seed by its number; the clients of a closed loop begin within the time of a plain request."""
        lengths = [(prompt.prompt_length, prompt.output_length) for prompt in self.prompts]
        at, tokens = int(np.mean([sum(each) for each in lengths])), float(np.mean([output for _, output in lengths]))
        rows = case.rows
        step = self.cost.batch_seconds("verify", 1, at, rows, rows) + self.cost.batch_seconds("rest", 1, at, rows, rows)
        return case.load(self.seed + number, spread=tokens * step if rows > 1 else 0.0)

    def _shares(self) -> tuple[tuple[int, ...], ...]:
        shuffled = np.random.default_rng(self.seed).permutation(len(self.prompts)).tolist()
        by_domain = sorted(shuffled, key=lambda place: self.prompts[place].domain)
        return tuple(tuple(by_domain[number :: self.seeds]) for number in range(self.seeds))

    def _fixed(self) -> dict[str, FixedChoice]:
        names = source_names(self.spec)
        choices = fixed_choices(self.prompts[0], len(names))
        if self.spec.branches > 1:  # of candidates larger trees are made than blocks were traced
            choices += tuple(map(FixedChoice, range(max(self.traced) + 1, self.spec.max_block_size + 1)))
        traced = {choice.block_size for choice in choices}
        wanted = set(SIZES) & traced if self.block_sizes is None else set(self.block_sizes)
        if not wanted <= traced:
            lacking = ", ".join(map(str, sorted(wanted - traced)))
            raise ValueError(f"block sizes {lacking} were not traced; there are {', '.join(map(str, sorted(traced)))}")
        return {label(names, choice): choice for choice in choices if choice.block_size in wanted | {1}}

    @property
    def traced(self) -> list[int]:
        """Block sizes that were traced, of any source."""
        return sorted({size for drafts in self.prompts[0].sources for size in drafts.block_sizes.tolist()})

    @property
    def mixed(self) -> bool:
        """Whether prompts are read in the passes of rows that run."""
        return self.cost.mixes_prompts if self.mixes_passes is None else self.mixes_passes

    @property
    def server(self) -> dict[str, Any]:
        """Options of the server, whoever decides."""
        return {"seed": self.trace_seed, "max_tokens": self.max_tokens, "mixes_passes": self.mixed}

    @property
    def bounds(self) -> tuple[str, ...]:
        """That can be had, the one first that gaps are measured to; drafts of several sources, or trees, have none."""
        if self.spec.others or self.spec.branches > 1 or not self.bound_seeds:
            return ()
        sampled = all(prompt.drafts.match_probability is not None for prompt in self.prompts)
        return (DISTRIBUTIONS, CLAIRVOYANT) if sampled else (CLAIRVOYANT,)

    @property
    def charged(self) -> bool:
        """Whether decision time counts."""
        return self.charges_decisions and self.cost.unit == "seconds"

    def requests(self, case: LoadCase, number: int) -> tuple[list[PromptTrace], list[int]]:
        """The prompts of a seed, by its number from 0, and what its requests ask for: the same for all policies.

        Each prompt is asked for once before any is asked for again, in a new order each time.
        """
        prompts = [self.prompts[place] for place in self.shares[number]]
        rng = np.random.default_rng((self.seed, number, case.rows))
        rounds = [rng.permutation(len(prompts)) for _ in range(-(-case.requests // len(prompts)))]
        return prompts, np.concatenate(rounds)[: case.requests].tolist()
