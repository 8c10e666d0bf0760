"""Oracles: the least time that any choice of block sizes could have taken over a finished output, exactly.

The number of tokens of each prompt is given, so the least seconds of each are exactly the most tokens per second of any
set. (A best fixed size is one choice for all, so it is chosen by the sum.) All choose among the traced block sizes and
1, and among the sources of drafts; they know which drafted tokens match before they choose, and are charged neither for
deciding nor for features. Ties go to no draft, then to the first source, then to the smaller block size, then to the
smaller number of verified tokens. A policy that ends drafts early (`extend`) in effect drafts at a smaller block size:
the oracles bound it if that size was traced too. Of several sources at most one may be such that positions wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bpkit.trace.oracle.plan import (
    NO_DRAFT,
    Float64,
    Int64,
    Solution,
    StepChoice,
    Works,
    array_cost,
    solve,
    step_table,
    works_of,
)
from bpkit.trace.records import DraftTable, PromptTrace, Taken
from bpkit.types import CostModel, DraftWork, of_source


class FixedChoice(NamedTuple):
    """The same choice at every step. Block size 1 is plain decoding."""

    block_size: int
    source: int = 0


@dataclass(frozen=True, kw_only=True)
class Path(Taken):
    """The steps that decided one output, and their seconds; prefill is left out."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Hindsight(Path):
    """The best path for who knows which drafted tokens match, and the plan that it follows."""

    plan: Solution


@dataclass(frozen=True)
class Expectation:
    """What a plan takes on average over the noise.

    Attributes:
        seconds, steps: expected, prefill left out.
        tokens: that the steps yield: the output length less one.
        plan: what attains it.
    """

    seconds: float
    steps: float
    tokens: int
    plan: Solution


def fixed_path(prompt: PromptTrace, work: Works, cost: CostModel, block_size: int, source: int = 0) -> Path:
    """The steps of one block size and source throughout, all verified that the limit on new tokens allows.

    Args:
        block_size: 1 (plain decoding) or a traced size.

    Raises:
        ValueError: the size was not traced.
    """
    if block_size == 1:
        return walk(prompt, work, cost, lambda position, waiting: NO_DRAFT)
    drafts = prompt.sources[source]
    try:
        length = drafts.draft_length[:, drafts.column(block_size)].tolist()
    except KeyError:
        traced = ", ".join(map(str, drafts.block_sizes.tolist()))
        raise ValueError(f"block size {block_size} was not traced; 1 and these were: {traced}") from None

    def choose(position: int, waiting: Sequence[int]) -> StepChoice:
        return StepChoice(source, block_size, min(length[position - 1], prompt.most_verified(position)))

    return walk(prompt, work, cost, choose)


def fixed_choices(prompt: PromptTrace, sources: int = 1) -> tuple[FixedChoice, ...]:
    """Plain decoding, then every traced block size of the first so many sources."""
    tables = enumerate(prompt.sources[:sources])
    return (
        FixedChoice(1),
        *(FixedChoice(size, source) for source, drafts in tables for size in drafts.block_sizes.tolist()),
    )


def best_fixed(prompts: Sequence[PromptTrace], work: Works, cost: CostModel) -> FixedChoice:
    """The block size, 1 or a traced one, and the source with the most tokens per second over all prompts: sum / sum.

    What is best on the prompts it was chosen on is too good: choose on other prompts than you judge by.

    Raises:
        ValueError: there are no prompts, or they were traced at different sizes.
    """
    if not prompts:
        raise ValueError("best_fixed needs at least one prompt")
    among = {fixed_choices(prompt, len(works_of(work))) for prompt in prompts}
    if len(among) > 1:
        raise ValueError("the prompts were traced at different block sizes: no one size can be compared over them")
    prices = array_cost(cost)  # here, so that all prompts share the answers of a model that is asked pair by pair
    seconds = {
        fixed: math.fsum(fixed_path(prompt, work, prices, *fixed).seconds for prompt in prompts)
        for fixed in among.pop()
    }
    # Every size yields the same tokens, so that the least seconds are the most tokens per second.
    return min(seconds, key=lambda fixed: (seconds[fixed], fixed))


def oracle_step(prompt: PromptTrace, work: Works, cost: CostModel) -> Hindsight:
    """The best path with a source and block size for each step, verifying what the limit on new tokens allows."""
    return _hindsight(prompt, work, cost, truncate=False)


def oracle_step_truncate(prompt: PromptTrace, work: Works, cost: CostModel) -> Hindsight:
    """The best path with a source and block size for each step, and with any number of its drafted tokens verified.

    No policy can be faster on this output under this cost model.
    """
    return _hindsight(prompt, work, cost, truncate=True)


def _hindsight(prompt: PromptTrace, work: Works, cost: CostModel, *, truncate: bool) -> Hindsight:
    table = step_table(prompt, work, cost, truncate=truncate)
    stands = [
        np.arange(steps.draft.shape[2] - 1) < drafts.num_accepted[:, :, None]
        for steps, drafts in zip(table.sources, prompt.sources, strict=False)
    ]
    plan = solve(table, [each.astype(np.float64) for each in stands])
    return Hindsight(**vars(walk(prompt, work, cost, plan.choose)), plan=plan)


def oracle_distributions(prompt: PromptTrace, work: Works, cost: CostModel, *, truncate: bool = True) -> Expectation:
    """The least expected seconds if the distributions are known but the noise is not: sampled traces only.

    The clairvoyant oracles know which drafted tokens match. Here each choice is made knowing only the chance of it,
    `match_probability`, at this and every later position; how much was accepted is then drawn, the plan sees it and
    chooses again. Each noise value decides one step at most, so that draws are independent from step to step.

    docs/evaluation.md says which policies it bounds, and where it is an estimate.

    Args:
        truncate: whether fewer drafted tokens may be verified than there are.

    Raises:
        ValueError: the trace has no match probabilities, or lacks one of a drafted token.
    """
    table = step_table(prompt, work, cost, truncate=truncate)
    sources = zip(prompt.sources, works_of(work), table.sources, strict=False)
    chances = [
        match_chances(prompt, drafts, each, table.room, steps.draft.shape[2] - 1) for drafts, each, steps in sources
    ]
    plan = solve(table, chances)
    return Expectation(float(plan.seconds[0, 0]), float(plan.steps[0, 0]), prompt.decided_by_steps, plan)


def walk(prompt: PromptTrace, work: Works, cost: CostModel, choose: Callable[[int, Sequence[int]], StepChoice]) -> Path:
    """The path of `choose`.

    Args:
        choose: is asked with the position and what waits for each source, and answers what was traced or `NO_DRAFT`.
    """
    works, position = works_of(work), 1
    waiting = [each.first(prompt.prompt_length) for each in works]
    steps: list[tuple[int, int, int, int, int, int]] = []
    waited: list[int] = []
    while position < prompt.output_length:
        source, block_size, verify_length = choose(position, waiting)
        drafts, length, standing = prompt.sources[source], 0, 0
        if block_size > 1:
            at = position - 1, drafts.column(block_size)
            length, standing = int(drafts.draft_length[at]), int(drafts.num_accepted[at])
        accepted = min(standing, verify_length)
        waited.append(waiting[source])
        steps.append((position, block_size, length, verify_length, accepted, source))
        waiting = [
            each.after_draft(length, accepted)
            if length and place == source
            else each.after_no_draft(before, accepted + 1)
            for place, (each, before) in enumerate(zip(works, waiting, strict=True))
        ]
        position += accepted + 1
    names = ("position", "block_size", "draft_length", "verify_length", "num_accepted", "source")
    fields = dict(zip(names, np.ascontiguousarray(np.array(steps, np.int32).reshape(-1, 6).T), strict=True))
    taken = Taken(tokens=prompt.decided_by_steps, **fields)
    return Path(**vars(taken), seconds=math.fsum(_seconds(prompt, cost, taken, np.array(waited, np.int64))))


def _seconds(prompt: PromptTrace, cost: CostModel, taken: Taken, waited: Int64) -> Float64:
    """Of each step, as `bpkit.decode.clock.price` says, by what waited for its source: float64 [steps]."""
    prices, at = array_cost(cost), prompt.prompt_length + taken.position
    seconds = np.zeros(len(at))
    for source in np.unique(taken.source[taken.draft_length > 0]).tolist():
        drafted = (taken.draft_length > 0) & (taken.source == source)
        own = array_cost(of_source(prices, source))
        seconds[drafted] = own.array("draft", taken.draft_length[drafted] + 1, at[drafted])
        seconds[drafted] += own.array("catch_up", waited[drafted], at[drafted])
    seconds += prices.array("verify", taken.verify_length + 1, at)
    return seconds + prices.array("rest", np.ones_like(at), at)


def match_chances(prompt: PromptTrace, drafts: DraftTable, work: DraftWork, room: Int64, width: int) -> Float64:
    """Chance that a drafted token matches if those before it did: float64 [rows, sizes, width], 0 where there is none.

    Raises:
        ValueError: the trace has no match probabilities, or lacks one of a drafted token.
    """
    traced = drafts.match_probability
    if traced is None:
        raise ValueError(
            f"the trace of prompt {prompt.id!r} has no match probabilities, which oracle_distributions needs: they are "
            "traced at temperatures above 0, of drafters that have a distribution"
        )
    chance, k = traced[:, :, :width].astype(np.float64), np.arange(width)
    if work.may_end_early and width:
        # Once a token differs, the traced draft goes on from another text than the output. Had all matched, the drafter
        # would have stood where the draft at that later position begins, so that one's first token has the chance.
        rows = np.arange(len(chance))[:, None]
        chance = np.broadcast_to(chance[np.minimum(rows + k, len(chance) - 1), 0, 0][:, None, :], chance.shape)
    # The last token of the output is yielded whether a drafted token matches it or not.
    needed = (k < drafts.draft_length[:, :, None]) & (k < room[:, None, None])
    if not ((chance[needed] >= 0) & (chance[needed] <= 1)).all():
        raise ValueError(f"match probabilities of prompt {prompt.id!r} are not all between 0 and 1 where it drafted")
    return np.where(needed, chance, 0.0)
