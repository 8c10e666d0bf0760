"""Policies on trees that verify so many nodes in every step, replayed where time does not matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.progress import Progress
from bpkit.trace.cost import CostTable, flat
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.types import DecoderSpec

POLICIES = {"tree": "tree:nodes={nodes}"}
"""Specs by name, where `{nodes}` stands for their number."""
PLAIN = CostTable(name="a plain step", unit="plain steps", verify={1: 1.0, 4096: 1.0})


@dataclass(frozen=True)
class ReplayedSteps:
    """Steps of each prompt, float64 [prompts].

    Attributes:
        policy: its spec.
    """

    policy: str
    validation: NDArray[np.float64]
    test: NDArray[np.float64]


Replays = Mapping[int, Mapping[str, ReplayedSteps]]
"""By number of nodes, and by name."""


def replays_of(
    validation: Sequence[PromptTrace],
    test: Sequence[PromptTrace],
    spec: DecoderSpec,
    trace_seed: int | None,
    nodes: Sequence[int],
    progress: Progress,
) -> Replays:
    """Of all `POLICIES`; each begins validation and test prompts without a memory."""
    progress.start("replaying nodes", (len(validation) + len(test)) * len(nodes) * len(POLICIES))

    def steps(prompts: Sequence[PromptTrace], policy: str) -> NDArray[np.float64]:
        replayer, found = Replayer(spec, policy, flat(PLAIN), seed=trace_seed), []
        for prompt in prompts:
            if prompt.decided_by_steps:
                found.append(replayer.run(prompt).steps)
            progress.tick()
        return np.array(found, np.float64)

    return {
        count: {
            name: ReplayedSteps(
                policy.format(nodes=count), *(steps(part, policy.format(nodes=count)) for part in (validation, test))
            )
            for name, policy in POLICIES.items()
        }
        for count in nodes
    }
