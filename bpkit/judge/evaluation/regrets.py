"""Time over the test prompts that the best choices would not have taken, added up and said as shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bpkit.judge.evaluation.play import Array
from bpkit.judge.evaluation.survey import Indices
from bpkit.trace.oracle import Hindsight
from bpkit.trace.oracle.regret import KINDS, NotTraced, Taken, features_seconds, step_regret
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel

FEATURES, DECIDING, ORACLE, REASON = "features", "deciding", "oracle", "reason"
PARTS = (*KINDS, FEATURES)
Shares = Mapping[str, float | str]


@dataclass
class Regrets:
    """Of one contestant.

    Attributes:
        kind: of the drafter.
        seconds: of each prompt by `PARTS`, all orders together: float64 [parts] each.
        reason: why they are not known, or nothing.
    """

    kind: str
    cost: CostModel
    seconds: list[Array] = field(default_factory=list)
    reason: str = ""

    def add(self, prompt: PromptTrace, known: Hindsight, taken: Sequence[Taken]) -> None:
        """One prompt more, in one or more orders."""
        if self.reason:
            return
        try:
            found = [step_regret(prompt, self.kind, known, one).sum(axis=0) for one in taken]
        except NotTraced as error:
            self.reason, self.seconds = str(error), []
            return
        features = sum(features_seconds(prompt, self.kind, self.cost, one) for one in taken)
        self.seconds.append(np.append(np.sum(found, axis=0), features))

    def of(self, prompts: Indices) -> Regrets:
        """With some of the prompts."""
        kept = [] if self.reason else [self.seconds[i] for i in prompts]
        return Regrets(self.kind, self.cost, kept, self.reason)

    def shares(self, total: float, deciding: float) -> Shares:
        """Of the contestant's own time: `PARTS`, `deciding` and, the rest, what the oracle would have taken too.

        Args:
            total: seconds of all prompts in all orders. deciding: of them, for decisions.
        """
        if self.reason:
            return {REASON: self.reason}
        parts = np.append(np.sum(self.seconds, axis=0), deciding) / total
        return {**dict(zip((*PARTS, DECIDING), parts.tolist(), strict=True)), ORACLE: float(1 - parts.sum())}
