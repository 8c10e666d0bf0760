"""From rows to figures. Every rate is a ratio of sums, and every interval a bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.wall_clock.contestants import LOOP, TRANSFORMERS, Outcome
from bpkit.judge.wall_clock.measure import Measurement
from bpkit.judge.wall_clock.texts import differences, ends_in_loop
from bpkit.registry.resolve import parse_spec

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Roles:
    """Which contestant is what.

    Attributes:
        plain: ways of plain decoding; the faster is `plain`.
        policies, against: names as typed.
        comparable: whether the texts of peers and plain decoding must be equal; not when sampling.
    """

    plain: tuple[str, ...]
    policies: tuple[str, ...]
    against: tuple[str, ...] = ()
    comparable: bool = True

    @property
    def reference(self) -> str:
        """Whose texts are right: those of transformers, which share no code with ours, where they take part."""
        return TRANSFORMERS if TRANSFORMERS in self.plain else self.plain[0]


@dataclass(frozen=True)
class Totals:
    """Sums over the repeats of each prompt of a group: float64 [prompts]."""

    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return float(self.tokens.sum() / self.seconds.sum())

    def rates(self, picks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens per second of each resample: float64 [resamples]."""
        rates: NDArray[np.float64] = self.tokens[picks].sum(axis=1) / self.seconds[picks].sum(axis=1)
        return rates


ByPrompt = dict[str, list[Outcome]]


class Table:
    """Rows by contestant and prompt."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        self.outcomes: dict[str, ByPrompt] = {}
        self.domains: dict[str, str] = {}
        for row in rows:
            self.outcomes.setdefault(row.contestant, {}).setdefault(row.prompt, []).append(row.outcome)
            self.domains[row.prompt] = row.domain

    def of(self, contestant: str, prompts: Sequence[str]) -> ByPrompt:
        """The outcomes of a contestant, in the order of `prompts`."""
        return {prompt: self.outcomes[contestant][prompt] for prompt in prompts}


def totals(outputs: Mapping[str, Sequence[Outcome]]) -> Totals:
    """Tokens and wall-clock seconds of each prompt, summed over its repeats."""
    tokens = [sum(len(o.tokens) for o in outcomes) for outcomes in outputs.values()]
    seconds = [sum(o.seconds for o in outcomes) for outcomes in outputs.values()]
    return Totals(np.array(tokens, dtype=np.float64), np.array(seconds, dtype=np.float64))


def resample(count: int, seed: int) -> NDArray[np.int64]:
    """Indices of prompts drawn with replacement, the same for all contestants: int64 [RESAMPLES, count]."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def interval(values: NDArray[np.float64]) -> list[float]:
    """The central 95% of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def summarise(rows: Sequence[Measurement], roles: Roles, seed: int) -> dict[str, Any]:
    """All groups of the report: `overall`, `domains`, and both again `without_loops`."""
    table = Table(rows)
    prompts = list(table.domains)
    source = max(roles.plain, key=lambda name: totals(table.of(name, prompts)).rate)
    loops = {p for p in prompts if ends_in_loop(table.outcomes[roles.reference][p][0].tokens)}

    def groups(kept: Sequence[str]) -> dict[str, Any]:
        domains = dict.fromkeys(table.domains.values())
        return {
            "overall": group(table, kept, roles, source, loops, seed),
            "domains": {
                d: group(table, [p for p in kept if table.domains[p] == d], roles, source, loops, seed) for d in domains
            },
        }

    return {**groups(prompts), "without_loops": groups([p for p in prompts if p not in loops])}


def group(
    table: Table, prompts: Sequence[str], roles: Roles, source: str, loops: set[str], seed: int
) -> dict[str, Any] | None:
    """The figures of one group of prompts, or None if it is empty."""
    if not prompts:
        return None
    picks = resample(len(prompts), seed)
    policies = {name: _entry(table, name, prompts, roles, source, picks) for name in roles.policies}
    against = {name: _entry(table, name, prompts, roles, source, picks) for name in roles.against}
    if not roles.comparable:
        for entry in against.values():
            entry.update(identical_text=None, different_prompts=[])
    fixed = [name for name in policies if parse_spec(name)["name"] == "fixed"]
    return {
        "prompts": len(prompts),
        "loops": sum(p in loops for p in prompts),
        "plain": _plain(table, prompts, roles, source, picks),
        "policies": policies,
        "against": against,
        "best_fixed": max(fixed, key=lambda name: policies[name]["tokens_per_second"], default=None),
    }


def _plain(table: Table, prompts: Sequence[str], roles: Roles, source: str, picks: NDArray[np.int64]) -> dict[str, Any]:
    entries = {name: _entry(table, name, prompts, roles, source, picks) for name in roles.plain}
    kept = (
        "tokens_per_second",
        "tokens_per_second_interval",
        "tokens",
        "seconds",
        "identical_text",
        "different_prompts",
        "share",
        "near_ties",
    )
    short = {name: {"source": name, **{key: entry[key] for key in kept}} for name, entry in entries.items()}
    return {**short[source], "others": [entry for name, entry in short.items() if name != source]}


def _entry(
    table: Table, name: str, prompts: Sequence[str], roles: Roles, source: str, picks: NDArray[np.int64]
) -> dict[str, Any]:
    """What is said of one contestant in one group."""
    outputs, plain = table.of(name, prompts), totals(table.of(source, prompts))
    mine = totals(outputs)
    rates = mine.rates(picks)
    every = [outcome for outcomes in outputs.values() for outcome in outcomes]
    different = differences(outputs, table.of(roles.reference, prompts), table.of(LOOP, prompts))
    overall, per_prompt = acceptance_lengths(outputs)
    return {
        "tokens_per_second": mine.rate,
        "tokens_per_second_interval": interval(rates),
        "speedup": mine.rate / plain.rate,
        "speedup_interval": interval(rates / plain.rates(picks)),
        "acceptance_length": overall,
        "acceptance_length_per_prompt": per_prompt,
        "identical_text": not different,
        "different_prompts": different,
        "share": shares(every),
        "fallbacks": sum(o.fallbacks for o in every),
        "near_ties": sum(len(o.near_ties) for o in every),
        "tokens": int(mine.tokens.sum()),
        "seconds": float(mine.seconds.sum()),
        "steps": sum(o.steps for o in every),
    }


def acceptance_lengths(outputs: Mapping[str, Sequence[Outcome]]) -> tuple[float | None, float | None]:
    """Tokens of steps over steps, and the mean over prompts of the same; None without steps.

    The token that prefill decides is no step's.
    """
    pairs = [
        (sum(len(o.tokens) - 1 for o in outcomes), sum(o.steps for o in outcomes)) for outcomes in outputs.values()
    ]
    counted = [(tokens, steps) for tokens, steps in pairs if steps]
    if not counted:
        return None, None
    overall = sum(tokens for tokens, _ in counted) / sum(steps for _, steps in counted)
    return overall, sum(tokens / steps for tokens, steps in counted) / len(counted)


def shares(outcomes: Sequence[Outcome]) -> dict[str, float] | None:
    """Shares of the wall-clock time; `other` is what no phase claims. None where phases cannot be told apart."""
    total = sum(o.seconds for o in outcomes)
    known: dict[str, float] = {}
    for phase in ("target", "drafter", "policy"):
        spent = [getattr(o, f"{phase}_seconds") for o in outcomes]
        if None in spent:
            return None
        known[phase] = sum(spent) / total
    return {**known, "other": 1 - sum(known.values())}
