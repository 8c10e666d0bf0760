"""Acceptance length of trees over chains at equal numbers of verified nodes, by replay on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.statistics import Bootstrap, interval
from bpkit.trace.oracle.trees import fewest_steps, steps_taken
from recipes.trees.drafts import THRESHOLDS, KeptDrafts
from recipes.trees.replays import ReplayedSteps, Replays
from recipes.trees.rules import CHAIN, NodeRule, best_nodes, rules_of

NODES = (4, 8, 16, 32)
"""Verified in a step."""
Floats = NDArray[np.float64]


class ComparedSteps:
    """Steps of test prompts, compared with those of the best chain."""

    def __init__(self, test: Sequence[KeptDrafts], seed: int) -> None:
        self.tokens = np.array([one.tokens for one in test], np.float64)
        domains = [one.domain for one in test]
        self.groups = {"overall": np.arange(len(test))} | {
            domain: np.flatnonzero([other == domain for other in domains]) for domain in dict.fromkeys(domains)
        }
        self.seed = seed

    def length(self, steps: Floats) -> dict[str, Any]:
        """Tokens over steps, with its interval, and by domain."""
        bootstrap = Bootstrap(len(steps), self.seed)
        return {
            "acceptance_length": float(self.tokens.sum() / steps.sum()),
            "interval": interval(bootstrap.ratios(self.tokens, steps)),
            "by_domain": {
                name: float(self.tokens[own].sum() / steps[own].sum())
                for name, own in self.groups.items()
                if name != "overall"
            },
        }

    def gain(self, steps: Floats, chain: Floats) -> dict[str, Any]:
        """Per cent over the chain, paired over prompts: tokens are the same, so that steps say it."""
        bootstrap = Bootstrap(len(steps), self.seed)
        return {
            "value": float(100 * (chain.sum() / steps.sum() - 1)),
            "interval": interval(100 * (bootstrap.ratios(chain, steps) - 1)),
            "by_domain": {
                name: float(100 * (chain[own].sum() / steps[own].sum() - 1))
                for name, own in self.groups.items()
                if name != "overall"
            },
        }

    def share(self, steps: Floats, chain: Floats, oracle: Floats) -> float | None:
        """Of the gap in acceptance length between the best chain and the best nodes; None without a gap."""
        own, low, high = (float(self.tokens.sum() / each.sum()) for each in (steps, chain, oracle))
        return (own - low) / (high - low) if high > low else None


def at_most(
    validation: Sequence[KeptDrafts],
    test: Sequence[KeptDrafts],
    branches: int,
    *,
    nodes: Sequence[int],
    seed: int,
    replays: Replays | None = None,
) -> dict[str, Any]:
    """Rules that verify so many nodes in every step, at most: by number of nodes.

    What a rule leaves open, and which rule is the best, is chosen on validation prompts.

    Args:
        replays: of policies on trees that verify as many, which are rules with nothing open.
    """
    rules, held = rules_of(validation, branches), ComparedSteps(test, seed)
    oracles = {count: [fewest_steps(best_nodes(one, count, branches)) for one in test] for count in nodes}
    return {
        str(count): _at_most(
            rules, validation, test, count, (replays or {}).get(count, {}), np.array(oracles[count], np.float64), held
        )
        for count in nodes
    }


def _at_most(
    rules: Mapping[str, NodeRule],
    validation: Sequence[KeptDrafts],
    test: Sequence[KeptDrafts],
    nodes: int,
    replays: Mapping[str, ReplayedSteps],
    oracle: Floats,
    held: ComparedSteps,
) -> dict[str, Any]:
    chosen: dict[str, Any] = {name: one.policy for name, one in replays.items()}
    tuned = {name: float(one.validation.sum()) for name, one in replays.items()}
    taken = {name: one.test for name, one in replays.items()}
    for name, rule in rules.items():
        choices = rule.choices(nodes)
        steps = [float(_steps(validation, rule, one, nodes).sum()) for one in choices]
        chosen[name], tuned[name] = choices[steps.index(min(steps))], min(steps)
        taken[name] = _steps(test, rule, chosen[name], nodes)
    trees = [name for name in taken if name != CHAIN]
    return {
        "best": min(trees, key=tuned.__getitem__),
        CHAIN: {"chosen": chosen[CHAIN], **held.length(taken[CHAIN])},
        "trees": {
            name: {
                "chosen": chosen[name],
                **held.length(taken[name]),
                "gain_percent": held.gain(taken[name], taken[CHAIN]),
                "gap_share": held.share(taken[name], taken[CHAIN], oracle),
            }
            for name in trees
        },
        "best_nodes": {**held.length(oracle), "gain_percent": held.gain(oracle, taken[CHAIN])},
    }


def _steps(drafts: Sequence[KeptDrafts], rule: NodeRule, choice: Any, nodes: int) -> Floats:
    """Of each prompt, float64 [prompts]."""
    return np.array([steps_taken(rule.accepted(one, choice, nodes)) for one in drafts], np.float64)


def on_average(
    validation: Sequence[KeptDrafts], test: Sequence[KeptDrafts], *, nodes: Sequence[int], seed: int
) -> dict[str, Any]:
    """Nodes whose chance of standing, by the drafter, is above a threshold: by number of nodes of a step, on average.

    That is what verifying by confidence comes to, of chains drafted at any size and of trees drafted at the largest.
    Size and threshold are chosen on validation prompts.
    """
    held, found = ComparedSteps(test, seed), {}
    cut: dict[str, Callable[[KeptDrafts], NDArray[np.int64]]] = {
        CHAIN: lambda one: one.chains,
        "trees": lambda one: one.trees[:, None],
    }
    for count in nodes:
        entries, steps = {}, {}
        for name, of in cut.items():
            column, threshold = _most_accepted(validation, of, count)
            taken = np.array([of(one)[:, column, threshold] for one in test], np.float64)
            steps[name] = taken[:, 0]
            entries[name] = {
                "block_size": test[0].sizes[column if name == CHAIN else -1],
                "threshold": float(THRESHOLDS[threshold]),
                "verified_nodes": float(taken[:, 1].sum() / taken[:, 0].sum()),
                **held.length(taken[:, 0]),
            }
        found[str(count)] = {**entries, "gain_percent": held.gain(steps["trees"], steps[CHAIN])}
    return found


def _most_accepted(
    drafts: Sequence[KeptDrafts], of: Callable[[KeptDrafts], NDArray[np.int64]], nodes: int
) -> tuple[int, int]:
    """Column and threshold of the fewest steps with at most so many nodes on average."""
    steps, verified = np.sum([of(one) for one in drafts], axis=0)
    steps = np.where(verified <= nodes * steps, steps, np.iinfo(np.int64).max)
    column, threshold = np.unravel_index(steps.argmin(), steps.shape)  # of equals the first, which verifies least
    return int(column), int(threshold)
