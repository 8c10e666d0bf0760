"""From replies to figures. Rates are ratios of sums, and intervals a paired bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpkit.judge.loops import ends_in_loop
from bpkit.judge.statistics import Bootstrap, Floats, interval
from bpkit.judge.wall_clock.figures import differences
from recipes.peers.contestants import GENERATE, LOOP, is_own


@dataclass(frozen=True)
class PeerRun:
    """What a contestant did with a prompt: see `recipes.peers.worker`. Lists come from JSON."""

    tokens: Sequence[int]
    seconds: float
    steps: int
    step_tokens: int
    near_ties: Sequence[int]


@dataclass(frozen=True)
class _Decoded:
    """As `differences` compares."""

    tokens: tuple[int, ...]
    near_ties: tuple[int, ...]


class PeerFigures:
    """What was measured.

    Args:
        runs: contestant -> prompt id -> what it did, all with the same prompts.
        domains: of the prompts, in their order.
        seed: of the bootstrap.
    """

    def __init__(self, runs: Mapping[str, Mapping[str, PeerRun]], domains: Mapping[str, str], seed: int) -> None:
        self.runs, self.domains, self.seed = runs, domains, seed
        self.loops = {prompt for prompt, run in runs[LOOP].items() if ends_in_loop(run.tokens)}

    def as_json(self) -> dict[str, Any]:
        """The groups `overall`, `domains`, and `without_loops`, which is None where no plain output loops or all do."""
        by_domain = {
            domain: self._group([prompt for prompt, its in self.domains.items() if its == domain])
            for domain in dict.fromkeys(self.domains.values())
        }
        rest = [prompt for prompt in self.domains if prompt not in self.loops]
        without = self._group(rest) if rest and self.loops else None
        overall = self._group(list(self.domains))
        groups = {"overall": overall, "domains": by_domain, "without_loops": without}
        return {"headline": self._headline(overall), **groups}

    def _headline(self, overall: dict[str, Any]) -> dict[str, Any]:
        """The fastest peer and the fastest policy, chosen on these very prompts, and the ratio of the two."""
        entries = overall["contestants"]
        speeds = {name: entry["tokens_per_second"] for name, entry in entries.items() if name not in (GENERATE, LOOP)}
        peer, policy = (
            max((name for name in speeds if is_own(name) == own), key=lambda name: speeds[name], default=None)
            for own in (False, True)
        )
        found: dict[str, Any] = {"fastest_peer": peer, "fastest_policy": policy}
        if peer is None or policy is None:
            return found
        prompts = list(self.domains)
        bootstrap = Bootstrap(len(prompts), self.seed)
        (ours, all_ours), (theirs, all_theirs) = (self._rates(name, prompts, bootstrap) for name in (policy, peer))
        return {
            **found,
            "policy_over_peer": ours / theirs,
            "policy_over_peer_interval": interval(all_ours / all_theirs),
        }

    def _group(self, prompts: Sequence[str]) -> dict[str, Any]:
        bootstrap = Bootstrap(len(prompts), self.seed)
        return {
            "prompts": len(prompts),
            "loops": sum(prompt in self.loops for prompt in prompts),
            "contestants": {name: self._entry(name, prompts, bootstrap) for name in self.runs},
        }

    def _entry(self, name: str, prompts: Sequence[str], bootstrap: Bootstrap) -> dict[str, Any]:
        """What is said of one contestant on some prompts."""
        runs = [self.runs[name][prompt] for prompt in prompts]
        rate, rates = self._rates(name, prompts, bootstrap)
        entry: dict[str, Any] = {"tokens_per_second": rate, "tokens_per_second_interval": interval(rates)}
        for key, plain in (("over_generate", GENERATE), ("over_plain", LOOP)):
            base, bases = self._rates(plain, prompts, bootstrap)
            entry |= {key: rate / base, f"{key}_interval": interval(rates / bases)}
        steps = sum(run.steps for run in runs)
        different = differences(*(self._decoded(one, prompts) for one in (name, LOOP, LOOP)))
        return {
            **entry,
            "acceptance_length": sum(run.step_tokens for run in runs) / steps if steps else None,
            "equal_texts": len(prompts) - len(different),
            "different_prompts": different,
            "loops": sum(ends_in_loop(run.tokens) for run in runs),
            "tokens": sum(len(run.tokens) for run in runs),
            "seconds": sum(run.seconds for run in runs),
            "steps": steps,
        }

    def _rates(self, name: str, prompts: Sequence[str], bootstrap: Bootstrap) -> tuple[float, Floats]:
        """Tokens per second, and the same in each resample."""
        tokens = np.array([len(self.runs[name][prompt].tokens) for prompt in prompts], np.float64)
        seconds = np.array([self.runs[name][prompt].seconds for prompt in prompts], np.float64)
        return float(tokens.sum() / seconds.sum()), bootstrap.ratios(tokens, seconds)

    def _decoded(self, name: str, prompts: Sequence[str]) -> dict[str, list[_Decoded]]:
        runs = {prompt: self.runs[name][prompt] for prompt in prompts}
        return {prompt: [_Decoded(tuple(run.tokens), tuple(run.near_ties))] for prompt, run in runs.items()}
