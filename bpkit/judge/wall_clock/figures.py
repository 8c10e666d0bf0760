"""From measurements to figures. Every rate is a ratio of sums, and every interval a paired bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Protocol

from bpkit.judge.loops import ends_in_loop
from bpkit.judge.sources import Counts
from bpkit.judge.sources import shares as shares_by_source
from bpkit.judge.statistics import Bootstrap, Totals, interval, totals_of
from bpkit.judge.wall_clock.decoders import LOOP, TRANSFORMERS, Measurement, Outcome
from bpkit.registry.resolve import parse_spec

OF_PLAIN = (
    "tokens_per_second tokens_per_second_interval tokens seconds identical_text different_prompts share near_ties"
).split()
"""What is said of plain decoding."""

Outcomes = Mapping[str, Sequence[Outcome]]
"""prompt id -> the outcomes of its repeats."""


class Timed(Protocol):
    """Wall clock and its known parts, None where they cannot be told apart."""

    @property
    def seconds(self) -> float: ...

    @property
    def target_seconds(self) -> float | None: ...

    @property
    def drafter_seconds(self) -> float | None: ...

    @property
    def policy_seconds(self) -> float | None: ...


class Decoded(Protocol):
    """An output, and the output positions of its near ties."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def near_ties(self) -> tuple[int, ...]: ...


class BenchFigures:
    """What was measured, by decoder and prompt.

    Args:
        plain: ways of plain decoding; the faster is `plain`.
        policies, against: names as typed.
        comparable: whether the texts of peers and plain decoding must be equal; not when sampling.
        seed: of the bootstrap.

    Attributes:
        domains: of the prompts, by id. loops: ids of prompts whose plain output ends in a loop.
        source: the faster way of plain decoding, over all prompts.
        reference: whose texts are right: those of transformers, which share no code with ours, where they take part.
    """

    def __init__(
        self,
        measurements: Sequence[Measurement],
        *,
        plain: Sequence[str],
        policies: Sequence[str],
        against: Sequence[str] = (),
        comparable: bool = True,
        seed: int,
    ) -> None:
        self.names, self.comparable, self.seed = (plain, policies, against), comparable, seed
        self.domains: dict[str, str] = {}
        self.outcomes: dict[str, dict[str, list[Outcome]]] = {}
        for one in measurements:
            self.outcomes.setdefault(one.decoder, {}).setdefault(one.prompt, []).append(one.outcome)
            self.domains[one.prompt] = one.domain
        self.reference = TRANSFORMERS if TRANSFORMERS in plain else plain[0]
        self.loops = {p for p, found in self.outcomes[self.reference].items() if ends_in_loop(found[0].tokens)}
        self.source = max(plain, key=lambda name: totals(self.outcomes[name]).rate)

    def as_json(self) -> dict[str, Any]:
        """All groups of the report: `overall`, `domains`, and both again `without_loops`."""
        rest = [prompt for prompt in self.domains if prompt not in self.loops]
        return {**self._groups(list(self.domains)), "without_loops": self._groups(rest)}

    def _groups(self, prompts: Sequence[str]) -> dict[str, Any]:
        by_domain = {
            domain: self._group([prompt for prompt in prompts if self.domains[prompt] == domain])
            for domain in dict.fromkeys(self.domains.values())
        }
        return {"overall": self._group(prompts), "domains": by_domain}

    def _group(self, prompts: Sequence[str]) -> dict[str, Any] | None:
        """The figures of some prompts, or None if there are none."""
        if not prompts:
            return None
        bootstrap = Bootstrap(len(prompts), self.seed)
        plain, policies, against = (
            {name: self._entry(name, prompts, bootstrap) for name in names} for names in self.names
        )
        if not self.comparable:
            for entry in against.values():
                entry.update(identical_text=None, different_prompts=[])
        short = {name: {"source": name, **{key: entry[key] for key in OF_PLAIN}} for name, entry in plain.items()}
        fixed = [name for name in policies if parse_spec(name)["name"] == "fixed"]
        return {
            "prompts": len(prompts),
            "loops": sum(p in self.loops for p in prompts),
            "plain": {**short.pop(self.source), "others": list(short.values())},
            "policies": policies,
            "against": against,
            "best_fixed": max(fixed, key=lambda name: policies[name]["tokens_per_second"], default=None),
        }

    def _of(self, decoder: str, prompts: Sequence[str]) -> Outcomes:
        return {prompt: self.outcomes[decoder][prompt] for prompt in prompts}

    def _entry(self, name: str, prompts: Sequence[str], bootstrap: Bootstrap) -> dict[str, Any]:
        """What is said of one decoder on some prompts."""
        outcomes, plain = self._of(name, prompts), totals(self._of(self.source, prompts))
        mine = totals(outcomes)
        rates = mine.rates(bootstrap)
        every = [outcome for repeats in outcomes.values() for outcome in repeats]
        different = differences(outcomes, self._of(self.reference, prompts), self._of(LOOP, prompts))
        # The first token of each output is no step's.
        of_steps = replace(mine, tokens=mine.tokens - [len(found) for found in outcomes.values()]).of(mine.steps > 0)
        return {
            "tokens_per_second": mine.rate,
            "tokens_per_second_interval": interval(rates),
            "speedup": mine.rate / plain.rate,
            "speedup_interval": interval(rates / plain.rates(bootstrap)),
            "acceptance_length": of_steps.acceptance_length if len(of_steps.steps) else None,
            "acceptance_length_per_prompt": of_steps.acceptance_length_per_prompt if len(of_steps.steps) else None,
            "identical_text": not different,
            "different_prompts": different,
            "share": shares(every),
            "fallbacks": sum(o.fallbacks for o in every),
            "near_ties": sum(len(o.near_ties) for o in every),
            "tokens": int(mine.tokens.sum()),
            "seconds": float(mine.seconds.sum()),
            "steps": int(mine.steps.sum()),
            **by_source([outcome.sources for outcome in every]),
        }


def by_source(counts: Sequence[Counts]) -> dict[str, Any]:
    """The entry `sources`, where there are several."""
    found = shares_by_source(counts)
    return {"sources": found} if found else {}


def totals(outcomes: Outcomes) -> Totals:
    """Sums over the repeats of each prompt."""
    return totals_of(
        [
            (sum(len(o.tokens) for o in found), sum(o.steps for o in found), sum(o.seconds for o in found))
            for found in outcomes.values()
        ]
    )


def shares(outcomes: Sequence[Timed]) -> dict[str, float] | None:
    """Shares of the wall-clock time; `other` is what no phase claims. None where phases cannot be told apart."""
    total = sum(o.seconds for o in outcomes)
    known: dict[str, float] = {}
    for phase in ("target", "drafter", "policy"):
        spent = [getattr(o, f"{phase}_seconds") for o in outcomes]
        if None in spent:
            return None
        known[phase] = sum(spent) / total
    return {**known, "other": 1 - sum(known.values())}


# Texts


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Output index of the first token that differs, also where one output ends early; None if they are equal.

    >>> first_difference([1, 2, 3], [1, 5, 3]), first_difference([1, 2], [1, 2, 3]), first_difference([1], [1])
    (1, 2, None)
    """
    return next((i for i, (ours, theirs) in enumerate(zip_longest(a, b)) if ours != theirs), None)


def differences(
    outcomes: Mapping[str, Sequence[Decoded]],
    reference: Mapping[str, Sequence[Decoded]],
    near_ties: Mapping[str, Sequence[Decoded]],
) -> list[dict[str, Any]]:
    """Prompts whose text is not that of `reference` in some repeat.

    Args:
        near_ties: outcomes of the plain loop, which knows the position of every near tie.

    Returns:
        `id`, `first_difference` (output index), and `near_tie`: whether a near tie stands there or earlier.
    """
    found = []
    for prompt, repeats in outcomes.items():
        expected = reference[prompt][0].tokens
        places = [i for o in repeats if (i := first_difference(o.tokens, expected)) is not None]
        if places:
            ties = (tie for outcome in near_ties[prompt] for tie in outcome.near_ties)
            place = min(places)
            found.append({"id": prompt, "first_difference": place, "near_tie": any(tie <= place for tie in ties)})
    return found
