"""A policy before the court: its options tuned on validation prompts, then the test prompts."""

from __future__ import annotations

import random

import numpy as np

from bpkit.judge.evaluation.court import Court
from bpkit.judge.evaluation.group import Performance
from bpkit.judge.evaluation.play import NOTHING, Decision, Player, Tally
from bpkit.judge.evaluation.recipe import Recipe
from bpkit.judge.evaluation.tune import Tuned, tune_options
from bpkit.registry.resolve import PolicyLike

TunedByCost = dict[str, Tuned]
PerformanceByCost = dict[str, Performance]


def tuned(court: Court, policy: PolicyLike) -> TunedByCost:
    """The options of a policy under each cost model, chosen on validation prompts."""
    recipe = Recipe(policy).fitted(court.survey.sizes)
    if not court.settings.tune:
        return {name: Tuned(recipe, 1, 0, "as given") for name in court.costs}
    return tune_options(
        recipe, court.stage, court.costs, court.validation, charged=court.charged, progress=court.progress
    )


def perform(court: Court, choices: TunedByCost, title: str) -> PerformanceByCost:
    """A policy on the test prompts: once, or in several orders if it has a memory."""
    count = len(court.test)
    remembers = next(iter(choices.values())).recipe.remembers
    seeds = [court.settings.seed + i for i in range(court.settings.orders)] if remembers else []
    orders = [random.Random(seed).sample(range(count), count) for seed in seeds] or [list(range(count))]
    groups = _by_recipe(choices)
    court.progress.start(f"replaying {title}", len(groups) * len(orders) * count)
    found: PerformanceByCost = {}
    for recipe, names in groups:
        costs = {name: court.costs[name] for name in names}
        players = []
        for order in orders:
            player = Player(court.stage, recipe, costs)
            for place in order:
                player.run(court.test[place])
                court.progress.tick()
            players.append(player)
        for name in names:
            found[name] = _performance(court, [p.tallies[name] for p in players], seeds, choices[name], name)
    return found


def _by_recipe(choices: TunedByCost) -> list[tuple[Recipe, list[str]]]:
    """Cost models under which the same options were chosen, together."""
    groups: list[tuple[Recipe, list[str]]] = []
    for name, choice in choices.items():
        for recipe, names in groups:
            if recipe == choice.recipe:
                names.append(name)
                break
        else:
            groups.append((choice.recipe, [name]))
    return groups


def _performance(court: Court, tallies: list[Tally], seeds: list[int], tuned: Tuned, cost: str) -> Performance:
    decision = Decision.measured(tallies)
    charge = decision if court.charged[cost] else NOTHING
    return Performance(
        runs=[tally.runs(charge) for tally in tallies],
        order_seeds=seeds,
        decision=decision,
        fallbacks=np.sum([tally.fallbacks_by_prompt() for tally in tallies], axis=0),
        tuned=tuned,
        charged=court.charged[cost],
        taken=[tally.taken_by_prompt() for tally in tallies],
    )
