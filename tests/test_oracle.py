"""Oracles against exhaustive search: every sequence of choices, priced step by step as the runtime prices it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from bpkit.decode.clock import price
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.oracle.paths import (
    Path,
    best_fixed,
    fixed_path,
    oracle_distributions,
    oracle_step,
    oracle_step_truncate,
)
from bpkit.trace.oracle.plan import CachedCost
from bpkit.trace.records import DraftTable, PromptTrace
from bpkit.types import PHASES, CostModel, DraftWork, Work, work_of

NAMES = ("block-diffusion", "autoregressive", "n-gram")
BLOCK_DIFFUSION, AUTOREGRESSIVE, NGRAM = KINDS = tuple(map(work_of, NAMES))
every_kind = pytest.mark.parametrize("work", KINDS, ids=NAMES)
PROMPT_LENGTH = 3


# Cost models and prompts to search


class RandomCost:
    """A price drawn for every phase, size and context length: staircases up and down, no order at all."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.known: dict[tuple[str, int, int], float] = {}

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        key = (phase, size, context_length)
        if key not in self.known:
            least, most = {"draft": (0, 0.6), "catch_up": (0, 1.5), "verify": (0.3, 2), "rest": (0, 0.2)}[phase]
            rng = np.random.default_rng((self.seed, PHASES.index(phase), size, context_length))
            self.known[key] = float(rng.uniform(least, most))
        return self.known[key]


@dataclass
class TableCost:
    """Prices by phase and size; context length does not matter, what is not given is free."""

    draft: Callable[[int], float] = lambda size: 0.0
    catch_up: Callable[[int], float] = lambda waiting: 0.0
    verify: Callable[[int], float] = lambda width: 1.0
    rest: float = 0.0

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return self.rest if phase == "rest" else float(getattr(self, phase)(size))


def prompt_of(
    accepted: ArrayLike,
    sizes: tuple[int, ...],
    max_new_tokens: int,
    length: ArrayLike | None = None,
    match: ArrayLike | None = None,
) -> PromptTrace:
    """A prompt with these tables: [rows, sizes], and `match` [rows, sizes, width]."""
    stands = np.asarray(accepted, np.int32).reshape(-1, len(sizes))
    drafted = np.broadcast_to(np.array(sizes) - 1 if length is None else np.asarray(length), stands.shape)
    shape = (*stands.shape, max(sizes) - 1)
    table = DraftTable(
        block_sizes=np.array(sizes, np.int32),
        draft_length=drafted.astype(np.int32),
        num_accepted=stands,
        tokens=np.zeros(shape, np.int32),
        match_probability=None if match is None else np.asarray(match, np.float32).reshape(shape),
    )
    output_length = len(stands) + 1
    made_up = synthetic_prompt(
        0, output_length=output_length, max_new_tokens=max_new_tokens, prompt_length=PROMPT_LENGTH, block_sizes=sizes
    )
    return replace(made_up, drafts=table)


def random_prompt(seed: int, work: DraftWork, output_length: int, sizes: tuple[int, ...], spare: int) -> PromptTrace:
    """Any drafts that this kind could have made; `spare` tokens were left when the output ended."""
    rng = np.random.default_rng(seed)
    rows, width = output_length - 1, max(sizes) - 1
    length = np.tile(np.array(sizes) - 1, (rows, 1))
    if work == NGRAM:
        length = rng.integers(0, length + 1)
    room = (output_length - 1 - np.arange(1, rows + 1))[:, None]
    match = rng.choice([0.0, 0.3, 0.8, 1.0], size=(rows, len(sizes), width)) * rng.uniform(0.7, 1, (rows, 1, 1))
    k = np.arange(width)
    if work == AUTOREGRESSIVE:  # what it drafts goes by the text so far, wherever the draft began
        match = np.tile(rng.uniform(0, 1, rows + width)[np.arange(rows)[:, None, None] + k], (1, len(sizes), 1))
    match[(k >= length[:, :, None]) | (k > room[:, :, None])] = np.nan
    accepted = rng.integers(0, np.minimum(length, room) + 1)
    return prompt_of(accepted, sizes, output_length + spare, length, match)


def fixed_for_prompt(prompt: PromptTrace, work: DraftWork, cost: CostModel) -> Path:
    """The path of the block size that is best for this prompt."""
    return fixed_path(prompt, work, cost, *best_fixed([prompt], work, cost))


# Exhaustive search, sharing nothing with the oracles but the runtime's `price`


@dataclass(frozen=True)
class State:
    """Position, and the last draft as (position, draft length, accepted), which is what a drafter's cache holds."""

    position: int = 1
    last: tuple[int, int, int] | None = None


def waiting(work: DraftWork, state: State) -> int:
    """Positions that the drafter has not read."""
    decided = PROMPT_LENGTH + state.position
    if work == NGRAM:
        return 0
    if work == BLOCK_DIFFUSION:  # everything before the anchor of the last draft was read by it
        return decided - 1 if state.last is None else state.position - state.last[0]
    if state.last is None:
        return decided
    at, length, accepted = state.last  # the anchor was read, and of the drafted tokens all but the last
    return decided - (PROMPT_LENGTH + at) - min(length - 1, accepted)


def choices(prompt: PromptTrace, position: int, truncate: bool) -> Iterator[tuple[int, int]]:
    """(block size, drafted tokens verified) that are possible."""
    yield 1, 0
    for column, size in enumerate(prompt.drafts.block_sizes.tolist()):
        most = min(int(prompt.drafts.draft_length[position - 1, column]), prompt.max_new_tokens - position - 1)
        for verified in range(0 if truncate else most, most + 1):
            yield size, verified


def length_of(prompt: PromptTrace, position: int, size: int) -> int:
    return 0 if size == 1 else int(prompt.drafts.draft_length[position - 1, prompt.drafts.column(size)])


def step_seconds(
    prompt: PromptTrace, work: DraftWork, cost: CostModel, state: State, size: int, verified: int
) -> float:
    length = length_of(prompt, state.position, size)
    draft_size = size if work == BLOCK_DIFFUSION else length + 1
    drafted = size > 1 and draft_size > 1
    done = Work(
        draft_size=draft_size if drafted else 0,
        waiting=waiting(work, state) if drafted else 0,
        verify_width=verified + 1,
        context_length=prompt.prompt_length + state.position,
    )
    return price(cost, done).total


def after(prompt: PromptTrace, work: DraftWork, state: State, size: int, accepted: int) -> State:
    """The state after a step."""
    length = length_of(prompt, state.position, size)
    drafted = size > 1 and (work == BLOCK_DIFFUSION or length > 0)
    last = (state.position, length, accepted) if drafted else state.last
    return State(state.position + accepted + 1, last)


def accepted_of(prompt: PromptTrace, position: int, size: int, verified: int) -> int:
    if size == 1:
        return 0
    return min(int(prompt.drafts.num_accepted[position - 1, prompt.drafts.column(size)]), verified)


def exhaustive(prompt: PromptTrace, work: DraftWork, cost: CostModel, truncate: bool, state: State = State()) -> float:
    """Least seconds over every sequence of choices."""
    if state.position >= prompt.output_length:
        assert state.position == prompt.output_length
        return 0.0
    least = math.inf
    for size, verified in choices(prompt, state.position, truncate):
        then = after(prompt, work, state, size, accepted_of(prompt, state.position, size, verified))
        spent = step_seconds(prompt, work, cost, state, size, verified)
        least = min(least, spent + exhaustive(prompt, work, cost, truncate, then))
    return least


def repriced(prompt: PromptTrace, work: DraftWork, cost: CostModel, path: Path) -> float:
    """Seconds of a path, after checking that the runtime could have walked it."""
    state, seconds = State(), 0.0
    fields = (path.position, path.block_size, path.verify_length, path.num_accepted)
    for position, size, verified, accepted in zip(*(field.tolist() for field in fields), strict=True):
        assert position == state.position
        assert (size, verified) in choices(prompt, position, truncate=True)
        assert accepted == accepted_of(prompt, position, size, verified)
        seconds += step_seconds(prompt, work, cost, state, size, verified)
        state = after(prompt, work, state, size, accepted)
    assert state.position == prompt.output_length
    assert path.tokens == prompt.output_length - 1 == int((path.num_accepted + 1).sum())
    assert path.steps == len(path.position)
    return seconds


def stepwise_fixed(prompt: PromptTrace, work: DraftWork, cost: CostModel, size: int) -> float:
    """Seconds of `fixed(size)`, walked as the loop does."""
    state, seconds = State(), 0.0
    while state.position < prompt.output_length:
        remaining = prompt.max_new_tokens - state.position
        verified = min(length_of(prompt, state.position, size), remaining - 1)
        seconds += step_seconds(prompt, work, cost, state, size, verified)
        accepted = accepted_of(prompt, state.position, size, verified)
        state = after(prompt, work, state, size, accepted)
    return seconds


# The clairvoyant oracles

seeds = st.integers(0, 2**32 - 1)
some_sizes = st.sampled_from([(2, 3), (2, 4), (3,), (4, 6), (7,)])


@every_kind
@settings(max_examples=60, deadline=None)
@given(seed=seeds, output_length=st.integers(1, 6), sizes=some_sizes, spare=st.integers(0, 5))
def test_exhaustive_search_finds_nothing_faster(
    work: DraftWork, seed: int, output_length: int, sizes: tuple[int, ...], spare: int
) -> None:
    prompt, cost = random_prompt(seed, work, output_length, sizes, spare), RandomCost(seed)
    for oracle, truncate in ((oracle_step, False), (oracle_step_truncate, True)):
        path = oracle(prompt, work, cost)
        assert path.seconds == pytest.approx(exhaustive(prompt, work, cost, truncate), rel=1e-12, abs=1e-12)
        assert path.seconds == pytest.approx(repriced(prompt, work, cost, path), rel=1e-12, abs=1e-12)


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_exhaustive_search_of_longer_outputs(work: DraftWork, seed: int) -> None:
    cost = RandomCost(seed)
    prompt = random_prompt(seed, work, 7, (2, 3), seed)
    assert oracle_step_truncate(prompt, work, cost).seconds == pytest.approx(exhaustive(prompt, work, cost, True))
    prompt = random_prompt(seed, work, 8, (2, 3, 5), seed)
    assert oracle_step(prompt, work, cost).seconds == pytest.approx(exhaustive(prompt, work, cost, False))


@every_kind
@settings(max_examples=40, deadline=None)
@given(seed=seeds, output_length=st.integers(1, 20), spare=st.integers(0, 9))
def test_fixed_sizes_are_walked_as_the_loop_does(work: DraftWork, seed: int, output_length: int, spare: int) -> None:
    sizes, cost = (2, 3, 5, 8), RandomCost(seed)
    prompt = random_prompt(seed, work, output_length, sizes, spare)
    walked = {size: stepwise_fixed(prompt, work, cost, size) for size in (1, *sizes)}
    for size, seconds in walked.items():
        path = fixed_path(prompt, work, cost, size)
        assert path.seconds == pytest.approx(seconds, rel=1e-12)
        assert path.seconds == pytest.approx(repriced(prompt, work, cost, path), rel=1e-12)
        assert set(path.block_size.tolist()) <= {size}
    assert fixed_for_prompt(prompt, work, cost).seconds == pytest.approx(min(walked.values()), rel=1e-12)


@every_kind
def test_best_fixed_has_the_most_tokens_per_second_of_the_set(work: DraftWork) -> None:
    sizes, chosen = (2, 3, 5), set()
    for seed in range(12):
        cost = RandomCost(seed)
        prompts = [random_prompt(seed * 100 + i, work, 3 + 2 * i, sizes, 2) for i in range(4)]
        tokens = sum(prompt.output_length - 1 for prompt in prompts)
        rate = {size: tokens / sum(stepwise_fixed(p, work, cost, size) for p in prompts) for size in (1, *sizes)}
        best = best_fixed(prompts, work, cost)
        assert rate[best.block_size] == pytest.approx(max(rate.values()), rel=1e-12)
        chosen.add(best)
    assert len(chosen) > 1


@every_kind
@pytest.mark.parametrize("seed", range(4))
def test_more_freedom_is_never_slower(work: DraftWork, seed: int) -> None:
    cost = CachedCost(RandomCost(seed))
    prompts = [synthetic_prompt(i, output_length=40, max_new_tokens=40 + seed, seed=seed) for i in range(6)]
    best = best_fixed(prompts, work, cost)
    seconds = np.array(
        [
            [oracle(p, work, cost).seconds for oracle in (oracle_step_truncate, oracle_step, fixed_for_prompt)]
            + [fixed_path(p, work, cost, *best).seconds]
            for p in prompts
        ]
    )
    assert (np.diff(seconds, axis=1) > -1e-9).all()
    assert (np.diff(seconds.sum(axis=0))[:2] > 0).all()


@every_kind
def test_models_that_price_arrays_are_asked_for_arrays(work: DraftWork) -> None:
    plain = RandomCost(5)

    class InArrays:
        def seconds(self, phase: str, size: int, context_length: int) -> float:
            raise AssertionError("asked pair by pair")

        def array(self, phase: str, sizes: ArrayLike, context_lengths: ArrayLike) -> NDArray[np.float64]:
            pairs = np.broadcast(np.asarray(sizes), np.asarray(context_lengths))
            return np.array([plain.seconds(phase, *pair) for pair in pairs], np.float64).reshape(pairs.shape)

    prompt = synthetic_prompt(1, output_length=20, max_new_tokens=22)
    for oracle in (fixed_for_prompt, oracle_step, oracle_step_truncate, oracle_distributions):
        assert oracle(prompt, work, InArrays()).seconds == oracle(prompt, work, plain).seconds
    assert best_fixed([prompt], work, InArrays()) == best_fixed([prompt], work, plain)


# What the choices look like


def test_an_output_that_ended_by_itself_is_verified_past_its_end() -> None:
    cost = TableCost(verify=lambda width: float(width))
    ended = prompt_of([[1], [0]], (8,), 20)
    assert fixed_path(ended, BLOCK_DIFFUSION, cost, 8).verify_length.tolist() == [7]
    assert fixed_path(ended, BLOCK_DIFFUSION, cost, 8).seconds == 8
    assert oracle_step(ended, BLOCK_DIFFUSION, cost).seconds == 2  # two steps without a draft beat eight positions
    cut_off = prompt_of([[1], [0]], (8,), 3)
    assert fixed_path(cut_off, BLOCK_DIFFUSION, cost, 8).verify_length.tolist() == [1]
    assert fixed_path(cut_off, BLOCK_DIFFUSION, cost, 8).seconds == 2
    one_more = prompt_of([[1], [0]], (8,), 4)
    assert fixed_path(one_more, BLOCK_DIFFUSION, cost, 8).seconds == 3


@every_kind
def test_drafts_that_never_match_are_not_made(work: DraftWork) -> None:
    prompt = prompt_of(np.zeros((9, 2)), (2, 4), 10)
    for oracle in (fixed_for_prompt, oracle_step, oracle_step_truncate):
        path = oracle(prompt, work, TableCost(draft=lambda size: 0.01))
        assert path.block_size.tolist() == [1] * 9
        assert path.verify_length.tolist() == [0] * 9


@every_kind
def test_at_equal_cost_the_smallest_draft_and_the_fewest_verified(work: DraftWork) -> None:
    stands = np.tile([0, 2, 2], (9, 1))
    stands = np.minimum(stands, (9 - np.arange(1, 10))[:, None])
    path = oracle_step_truncate(prompt_of(stands, (2, 4, 6), 30), work, TableCost())
    assert path.seconds == path.steps == 3
    assert path.block_size.tolist() == [4, 4, 4]
    assert path.verify_length.tolist() == [2, 2, 2]
    nothing = oracle_step_truncate(prompt_of(np.zeros((9, 3)), (2, 4, 6), 30), work, TableCost())
    assert nothing.block_size.tolist() == [1] * 9
    assert best_fixed([prompt_of(np.zeros((9, 3)), (2, 4, 6), 30)], work, TableCost()) == (1, 0)


def test_reading_the_prompt_is_paid_by_the_first_draft() -> None:
    def reading(waiting: int) -> float:
        return 10.0 if waiting >= PROMPT_LENGTH else 0.0

    prompt = prompt_of([[1], [0]], (2,), 3)
    for work in (BLOCK_DIFFUSION, AUTOREGRESSIVE):
        assert oracle_step_truncate(prompt, work, TableCost(catch_up=reading)).block_size.tolist() == [1, 1]
    assert oracle_step_truncate(prompt, NGRAM, TableCost(catch_up=reading)).block_size.tolist() == [2]


def test_a_draft_may_be_worth_making_for_the_positions_that_it_reads() -> None:
    # Nothing of the first draft stands, but it reads the prompt while that is cheap.
    cost = TableCost(catch_up=lambda waiting: 100.0 if waiting > PROMPT_LENGTH else 0.1)
    prompt = prompt_of([[0], [3], [0], [0], [0]], (5,), 6)
    path = oracle_step_truncate(prompt, BLOCK_DIFFUSION, cost)
    assert (path.block_size.tolist(), path.verify_length.tolist()) == ([5, 5], [0, 3])
    assert path.seconds == pytest.approx(2.2)


def test_an_autoregressive_drafter_has_one_position_less_to_read_if_not_all_stands() -> None:
    cost = TableCost(catch_up=lambda waiting: 5.0 if waiting in (2, 3) else 0.0)
    prompt = prompt_of([[2], [2], [2], [1], [0]], (3,), 9)
    assert oracle_step(prompt, AUTOREGRESSIVE, cost).seconds == 3
    path = oracle_step_truncate(prompt, AUTOREGRESSIVE, cost)
    assert (path.seconds, path.block_size.tolist(), path.verify_length.tolist()) == (2, [3, 3], [1, 2])


@every_kind
def test_one_token_takes_no_steps(work: DraftWork) -> None:
    prompt = random_prompt(0, work, 1, (2, 4), 3)
    for path in (
        fixed_path(prompt, work, TableCost(), 4),
        fixed_for_prompt(prompt, work, TableCost()),
        oracle_step(prompt, work, TableCost()),
        oracle_step_truncate(prompt, work, TableCost()),
    ):
        assert (path.seconds, path.tokens, path.steps) == (0.0, 0, 0)
    assert best_fixed([prompt], work, TableCost()) == (1, 0)
    expected = oracle_distributions(prompt, work, TableCost())
    assert (expected.seconds, expected.tokens, expected.steps) == (0.0, 0, 0.0)


def test_an_ngram_drafter_that_finds_nothing_costs_nothing() -> None:
    dear = TableCost(draft=lambda size: 7.0, catch_up=lambda waiting: 7.0, verify=lambda width: float(width))
    prompt = prompt_of(np.zeros((4, 2)), (2, 6), 9, length=np.zeros((4, 2)))
    assert fixed_path(prompt, NGRAM, dear, 6).seconds == 4
    assert fixed_path(prompt, NGRAM, dear, 6).block_size.tolist() == [6] * 4
    assert oracle_step_truncate(prompt, NGRAM, dear).block_size.tolist() == [1] * 4
    assert oracle_step_truncate(prompt, NGRAM, dear).seconds == 4


def test_widths_that_cannot_occur_need_no_price() -> None:
    def up_to_three(width: int) -> float:
        assert 1 <= width <= 3
        return 1.0

    prompt = prompt_of([[2], [1], [0]], (9,), 4)
    assert oracle_step_truncate(prompt, BLOCK_DIFFUSION, TableCost(verify=up_to_three)).seconds == 1


def test_errors_say_what_to_do() -> None:
    prompt = prompt_of([[0], [0]], (4,), 3)
    with pytest.raises(ValueError, match="block size 5 was not traced; 1 and these were: 4"):
        fixed_path(prompt, NGRAM, TableCost(), 5)
    with pytest.raises(ValueError, match="at least one prompt"):
        best_fixed([], NGRAM, TableCost())
    with pytest.raises(ValueError, match="different block sizes"):
        best_fixed([prompt, prompt_of([[0]], (5,), 3)], NGRAM, TableCost())
    with pytest.raises(ValueError, match="temperatures above 0"):
        oracle_distributions(prompt, NGRAM, TableCost())
    with pytest.raises(ValueError, match="between 0 and 1"):
        oracle_distributions(prompt_of([[0], [0]], (2,), 3, match=[np.nan, np.nan]), BLOCK_DIFFUSION, TableCost())


# Distributions known, noise not


def outcomes(prompt: PromptTrace, position: int, size: int, verified: int) -> list[tuple[int, float]]:
    """(accepted, chance): token after token, until one does not match, none is left, or the output is complete."""
    if size == 1:
        return [(0, 1.0)]
    assert prompt.drafts.match_probability is not None
    chance = prompt.drafts.match_probability[position - 1, prompt.drafts.column(size)].astype(float)
    found: list[tuple[int, float]] = []
    reached = 1.0
    for accepted in range(verified):
        if position + accepted + 1 == prompt.output_length:
            return [*found, (accepted, reached)]
        found.append((accepted, reached * (1 - chance[accepted])))
        reached *= chance[accepted]
    return [*found, (verified, reached)]


Decide = Callable[[State], tuple[int, int]]


def expected_of(
    prompt: PromptTrace, work: DraftWork, cost: CostModel, decide: Decide, state: State = State()
) -> tuple[float, float]:
    """Expected seconds and steps of a policy."""
    if state.position == prompt.output_length:
        return 0.0, 0.0
    size, verified = decide(state)
    seconds, steps = step_seconds(prompt, work, cost, state, size, verified), 1.0
    for accepted, chance in outcomes(prompt, state.position, size, verified):
        then = expected_of(prompt, work, cost, decide, after(prompt, work, state, size, accepted))
        seconds, steps = seconds + chance * then[0], steps + chance * then[1]
    return seconds, steps


def least_expected(
    prompt: PromptTrace, work: DraftWork, cost: CostModel, truncate: bool, state: State = State()
) -> float:
    """Least expected seconds; what was done may depend on all that happened before."""
    if state.position == prompt.output_length:
        return 0.0
    least = math.inf
    for size, verified in choices(prompt, state.position, truncate):
        seconds = step_seconds(prompt, work, cost, state, size, verified)
        for accepted, chance in outcomes(prompt, state.position, size, verified):
            then = after(prompt, work, state, size, accepted)
            seconds += chance * least_expected(prompt, work, cost, truncate, then)
        least = min(least, seconds)
    return least


@every_kind
@pytest.mark.parametrize("truncate", [True, False])
@settings(max_examples=30, deadline=None)
@given(seed=seeds, output_length=st.integers(1, 5), sizes=some_sizes, spare=st.integers(0, 4))
def test_no_choice_expects_less(
    work: DraftWork, truncate: bool, seed: int, output_length: int, sizes: tuple[int, ...], spare: int
) -> None:
    prompt, cost = random_prompt(seed, work, output_length, sizes, spare), RandomCost(seed)
    found = oracle_distributions(prompt, work, cost, truncate=truncate)
    assert found.seconds == pytest.approx(least_expected(prompt, work, cost, truncate), rel=1e-6, abs=1e-9)

    def planned(state: State) -> tuple[int, int]:
        return found.plan.choose(state.position, [waiting(work, state)])[1:]

    assert (found.seconds, found.steps) == pytest.approx(expected_of(prompt, work, cost, planned), rel=1e-9, abs=1e-9)
    assert found.tokens == output_length - 1


@pytest.mark.parametrize("work", [BLOCK_DIFFUSION, AUTOREGRESSIVE])
@pytest.mark.parametrize("seed", range(3))
def test_every_policy_of_a_tiny_case(work: DraftWork, seed: int) -> None:
    """All maps from (position, waiting) to a choice."""
    prompt, cost = random_prompt(seed, work, 4, (3,), 1), RandomCost(seed)
    first = waiting(work, State())
    states = [(1, first), (2, first + 1), (2, 1), (3, first + 2), (3, 2), (3, 1)]
    options = [list(choices(prompt, position, truncate=True)) for position, _ in states]
    least = math.inf
    for chosen in itertools.product(*options):
        policy = dict(zip(states, chosen, strict=True))

        def decide(state: State, policy: dict[tuple[int, int], tuple[int, int]] = policy) -> tuple[int, int]:
            return policy[state.position, min(waiting(work, state), first + state.position - 1)]

        least = min(least, expected_of(prompt, work, cost, decide)[0])
    assert oracle_distributions(prompt, work, cost).seconds == pytest.approx(least, rel=1e-9)


@every_kind
def test_certain_matches_leave_nothing_to_expect(work: DraftWork) -> None:
    for seed in range(10):
        prompt, cost = random_prompt(seed, work, 12, (2, 3, 6), 3), CachedCost(RandomCost(seed))
        certain = np.arange(5) < prompt.drafts.num_accepted[:, :, None]
        if work == AUTOREGRESSIVE:  # the token of an output position matches from wherever it was drafted, or never
            right = np.append(np.random.default_rng(seed).uniform(size=11) < 0.7, np.zeros(5, np.bool_))
            certain = np.tile(right[np.arange(11)[:, None, None] + np.arange(5)], (1, 3, 1))
        run = np.cumprod(certain, axis=2).sum(axis=2)
        room = 10 - np.arange(11)[:, None]
        accepted = np.minimum(np.minimum(run, prompt.drafts.draft_length), room).astype(np.int32)
        table = replace(prompt.drafts, num_accepted=accepted, match_probability=certain.astype(np.float32))
        known = replace(prompt, drafts=table)
        for truncate, oracle in ((True, oracle_step_truncate), (False, oracle_step)):
            path, found = oracle(known, work, cost), oracle_distributions(known, work, cost, truncate=truncate)
            assert (found.seconds, found.steps) == pytest.approx((path.seconds, path.steps), rel=1e-12)


def test_what_an_autoregressive_drafter_went_on_with_after_a_mismatch_does_not_count() -> None:
    for seed in range(10):
        prompt, cost = random_prompt(seed, AUTOREGRESSIVE, 12, (2, 3, 6), 3), CachedCost(RandomCost(seed))
        match = prompt.drafts.match_probability
        assert match is not None
        astray = np.arange(match.shape[2]) > prompt.drafts.num_accepted[:, :, None]
        other = np.where(astray & ~np.isnan(match), np.float32(0.5), match)
        assert not np.array_equal(other, match, equal_nan=True)
        went_astray = replace(prompt, drafts=replace(prompt.drafts, match_probability=other))
        seconds = oracle_distributions(prompt, AUTOREGRESSIVE, cost).seconds
        assert oracle_distributions(went_astray, AUTOREGRESSIVE, cost).seconds == seconds
        assert oracle_distributions(went_astray, BLOCK_DIFFUSION, cost).seconds != (
            oracle_distributions(prompt, BLOCK_DIFFUSION, cost).seconds
        )


@every_kind
def test_drawing_the_matches_takes_what_was_expected(work: DraftWork) -> None:
    prompt, cost = random_prompt(1, work, 14, (2, 3, 6), 2), RandomCost(3)
    found = oracle_distributions(prompt, work, cost)
    assert prompt.drafts.match_probability is not None
    rng, taken = np.random.default_rng(0), []
    for _ in range(2000):
        state, seconds = State(), 0.0
        while state.position < prompt.output_length:
            _, size, verified = found.plan.choose(state.position, [waiting(work, state)])
            seconds += step_seconds(prompt, work, cost, state, size, verified)
            accepted = 0
            if verified:
                chance = prompt.drafts.match_probability[state.position - 1, prompt.drafts.column(size), :verified]
                accepted = int(np.cumprod(rng.uniform(size=verified) < chance).sum())
            accepted = min(accepted, prompt.output_length - state.position - 1)
            state = after(prompt, work, state, size, accepted)
        taken.append(seconds)
    error = np.std(taken) / math.sqrt(len(taken))
    assert error > 0
    assert abs(np.mean(taken) - found.seconds) < 4 * error


def test_on_average_knowing_the_noise_is_faster_and_a_fixed_size_slower() -> None:
    cost = CachedCost(TableCost(draft=lambda size: 0.3, verify=lambda width: 1 + 0.05 * width))
    prompts = [synthetic_prompt(i, output_length=32, max_new_tokens=32) for i in range(60)]
    knowing = np.mean([oracle_step_truncate(p, BLOCK_DIFFUSION, cost).seconds for p in prompts])
    expecting = np.mean([oracle_distributions(p, BLOCK_DIFFUSION, cost).seconds for p in prompts])
    best = best_fixed(prompts, BLOCK_DIFFUSION, cost)
    fixed = np.mean([fixed_path(p, BLOCK_DIFFUSION, cost, *best).seconds for p in prompts])
    assert knowing < expecting < fixed
    whole = [oracle_distributions(p, BLOCK_DIFFUSION, cost, truncate=False).seconds for p in prompts]
    assert expecting <= np.mean(whole)
