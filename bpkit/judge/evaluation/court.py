"""What all parts of an evaluation share: the survey of the trace, its split, and the prompts that are held."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bpkit.judge.evaluation.play import Stage
from bpkit.judge.evaluation.splits import Split, split_prompts
from bpkit.judge.evaluation.survey import Survey, take_survey
from bpkit.judge.progress import Progress
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace


@dataclass(frozen=True)
class Settings:
    """How an evaluation is made.

    Attributes:
        seed: of split, orders, bootstrap and permutations.
        fractions: of train, validation and test prompts.
        orders: of the test prompts, for policies with a memory.
        tune: whether options that the user left open are chosen on validation prompts.
        permutations: of the test whether per-prompt choice is learnable; 0 leaves it out.
        second_test: judge on the prompts that were left for training, and leave the test prompts alone.
    """

    seed: int
    fractions: Sequence[float]
    orders: int
    tune: bool
    permutations: int
    second_test: bool = False


@dataclass(frozen=True)
class Court:
    """What all parts of an evaluation share.

    Attributes:
        costs: by name. charged: whether decision time can be added to a cost model's figures.
        validation, test: prompts in memory; the first in a mixed order, the second in the trace's.
    """

    survey: Survey
    split: Split
    stage: Stage
    costs: Mapping[str, CostTable]
    charged: Mapping[str, bool]
    settings: Settings
    progress: Progress
    validation: Sequence[PromptTrace]
    test: Sequence[PromptTrace]


def assemble(
    prompts: Sequence[PromptTrace],
    stage: Stage,
    cost_models: Sequence[CostTable],
    settings: Settings,
    progress: Progress,
    prepared: Callable[[PromptTrace], PromptTrace],
) -> Court:
    """Read the trace, split it, and hold what will be needed again, `prepared`. Raises ValueError, CostError."""
    costs = {cost.name: cost for cost in cost_models}
    if len(costs) < len(cost_models) or not costs:
        raise ValueError(f"cost models need names of their own: {', '.join(c.name for c in cost_models) or 'none'}")
    survey = take_survey(prompts, stage.spec.drafter_kind, costs, progress)
    split = split_prompts(survey.ids, survey.domains, seed=settings.seed, fractions=settings.fractions)
    if settings.second_test:
        split = split.exchanged()
    for part in ("validation", "test"):
        if not getattr(split, part):
            raise ValueError(
                f"no prompt is left for {part} ({len(survey.ids)} prompts, split "
                f"{','.join(f'{f:g}' for f in split.fractions)}): trace more prompts, or split otherwise"
            )
    mixed = list(split.validation)
    random.Random(settings.seed).shuffle(mixed)
    progress.start("reading prompts", len(mixed) + len(split.test))

    def read(indices: Sequence[int]) -> list[PromptTrace]:
        found = []
        for index in indices:
            found.append(prepared(prompts[int(survey.places[index])]))
            progress.tick()
        return found

    charged = {name: cost.unit == "seconds" for name, cost in costs.items()}
    return Court(survey, split, stage, costs, charged, settings, progress, read(mixed), read(split.test))
