"""Tokens per second of a policy on validation prompts, by replay: what training is steered by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bpkit.learn.trained import TrainedPolicy
from bpkit.trace.oracle.paths import fixed_path
from bpkit.trace.oracle.plan import array_cost
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.types import CostModel, DecoderSpec, Feature


@dataclass(frozen=True)
class Validation:
    """Replays policies over the same prompts, in the same order. A fault of the policy is an error.

    Attributes:
        prompts: held in memory.
    """

    spec: DecoderSpec
    cost: CostModel
    prompts: Sequence[PromptTrace]

    def __call__(self, policy: TrainedPolicy) -> float:
        """Tokens per second: a ratio of sums. Decision time is left out, so that it is the same on every machine."""
        replayer = Replayer(self.spec, policy, self.cost, strict=True)
        runs = [replayer.run(prompt) for prompt in self.prompts]
        return sum(run.tokens for run in runs) / sum(run.seconds(self.cost) for run in runs)


def spread(domains: Sequence[str], count: int) -> list[int]:
    """Places of `count` prompts, as even over the domains and within each as can be; ascending.

    >>> spread(["a", "a", "a", "a", "b"], 3)
    [0, 2, 4]
    """
    members = {domain: [i for i, other in enumerate(domains) if other == domain] for domain in dict.fromkeys(domains)}
    wanted = dict.fromkeys(members, 0)
    left = min(count, len(domains))
    while left:
        for domain in members:
            if left and wanted[domain] < len(members[domain]):
                wanted[domain] += 1
                left -= 1
    places = [
        members[domain][i * len(members[domain]) // number] for domain, number in wanted.items() for i in range(number)
    ]
    return sorted(places)


def trimmed(prompt: PromptTrace, features: frozenset[Feature]) -> PromptTrace:
    """A prompt without the features that no one wants: held prompts take little memory."""
    kept = {name: value for name, value in prompt.features.items() if name in features}
    of_drafts = {name: value for name, value in prompt.drafts.features.items() if name in features}
    return replace(prompt, features=kept, drafts=replace(prompt.drafts, features=of_drafts))


def judge(
    policy: TrainedPolicy, prompts: Iterable[PromptTrace], spec: DecoderSpec, cost: CostModel, tick: Any
) -> dict[str, Any]:
    """The policy and every fixed block size on prompts: plain JSON values. `tick` is called after each prompt."""
    replayer = Replayer(spec, policy, cost, strict=True)
    prices = array_cost(cost)
    tokens = steps = count = 0
    seconds = decided = 0.0
    decisions: list[float] = []
    fixed: dict[int, float] = {}
    for prompt in prompts:
        run = replayer.run(prompt)
        count, tokens, steps = count + 1, tokens + run.tokens, steps + run.steps
        seconds += run.seconds(cost)
        decided += run.begin_seconds
        decisions += run.step_seconds.tolist()
        for size in (1, *prompt.drafts.block_sizes.tolist()):
            fixed[size] = fixed.get(size, 0.0) + fixed_path(prompt, spec.work, prices, size).seconds
        tick()
    best = min(fixed, key=lambda size: (fixed[size], size))
    per_step = float(np.median(decisions)) if decisions else 0.0
    in_seconds = getattr(cost, "unit", "seconds") == "seconds"
    charged = seconds + (per_step * steps + decided if in_seconds else 0.0)
    return {
        "prompts": count,
        "tokens": tokens,
        "steps": steps,
        "acceptance_length": tokens / max(1, steps),
        "unit": getattr(cost, "unit", "seconds"),
        "tokens_per_second": tokens / charged,
        "tokens_per_second_without_decisions": tokens / seconds,
        "decision_seconds_per_step": per_step,
        "decision_seconds_per_prompt": decided / max(1, count),
        "best_fixed": {"block_size": best, "tokens_per_second": tokens / fixed[best]},
        "gain_over_best_fixed": fixed[best] / charged - 1,
    }
