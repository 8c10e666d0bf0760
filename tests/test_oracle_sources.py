"""Oracles of decoders with several sources of drafts, against exhaustive search; regret; fixed choices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from bpkit.trace.oracle.plan import StepChoice
from bpkit.trace.oracle.regret import KINDS, OTHER_SOURCE, kinds, step_regret
from bpkit.trace.records import DraftTable, PromptTrace
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION, NGRAM, PHASES, CostModel, DraftWork, Work, work_of

PROMPT_LENGTH = 3
STORE, MODEL, ASSISTANT = work_of(NGRAM), work_of(BLOCK_DIFFUSION), work_of(AUTOREGRESSIVE)
FREE_BUT_SLOW = DraftWork("nothing", "one")  # an early exit that shares the target's keys, say
together = pytest.mark.parametrize(
    "works",
    [(MODEL, STORE), (STORE, MODEL), (STORE, ASSISTANT), (STORE, FREE_BUT_SLOW), (STORE, MODEL, FREE_BUT_SLOW)],
    ids=["model+store", "store+model", "store+assistant", "store+exit", "three"],
)


class Priced:
    """A price drawn for every source, phase, size and context length, without any order."""

    def __init__(self, seed: int, source: int = 0) -> None:
        self.seed, self.source = seed, source

    def of_source(self, source: int) -> Priced:
        return Priced(self.seed, source)

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        least, most = {"draft": (0, 0.6), "catch_up": (0, 1.5), "verify": (0.3, 2), "rest": (0, 0.2)}[phase]
        rng = np.random.default_rng((self.seed, self.source, PHASES.index(phase), size, context_length))
        return float(rng.uniform(least, most))


def prompt_of(seed: int, works: Sequence[DraftWork], output_length: int, spare: int) -> PromptTrace:
    """Random drafts of several sources; `spare` tokens were left when the output ended."""
    rng, rows = np.random.default_rng(seed), output_length - 1
    tables = []
    for work in works:
        sizes = [(2, 3), (3,), (2, 4)][rng.integers(3)]
        room = (output_length - 1 - np.arange(1, rows + 1))[:, None]
        length = np.tile(np.array(sizes) - 1, (rows, 1))
        if work == STORE:
            length = rng.integers(0, length + 1)
        chance = rng.choice([0.0, 0.3, 0.8, 1.0], size=(rows, len(sizes), max(sizes) - 1)).astype(np.float32)
        if work == ASSISTANT:
            drafted = rng.uniform(0, 1, rows + max(sizes)).astype(np.float32)
            chance = np.tile(drafted[np.arange(rows)[:, None, None] + np.arange(max(sizes) - 1)], (1, len(sizes), 1))
        tables.append(
            DraftTable(
                block_sizes=np.array(sizes, np.int32),
                draft_length=length.astype(np.int32),
                num_accepted=rng.integers(0, np.minimum(length, room) + 1).astype(np.int32),
                tokens=np.zeros(chance.shape, np.int32),
                match_probability=chance,
            )
        )
    limit = output_length + spare
    made = synthetic_prompt(0, output_length=output_length, max_new_tokens=limit, prompt_length=PROMPT_LENGTH)
    return replace(made, drafts=tables[0], others=tuple(tables[1:]))


# Exhaustive search, sharing nothing with the oracles but the runtime's `price`


@dataclass(frozen=True)
class State:
    """Position, and of each source its last draft as (position, draft length, accepted)."""

    position: int
    last: tuple[tuple[int, int, int] | None, ...]


def waiting(work: DraftWork, last: tuple[int, int, int] | None, position: int) -> int:
    """Decided positions that a drafter has not read."""
    if work.reads == "nothing":
        return 0
    if work.reads == "features":  # it reads all before the anchor
        return PROMPT_LENGTH + position - 1 if last is None else position - last[0]
    if last is None:
        return PROMPT_LENGTH + position
    at, length, accepted = last  # the anchor was read, and of the drafted tokens all but the last
    return position - at - min(length - 1, accepted)


def start(works: Sequence[DraftWork]) -> State:
    return State(1, (None,) * len(works))


def choices(prompt: PromptTrace, position: int, truncate: bool) -> Iterator[StepChoice]:
    yield StepChoice(0, 1, 0)
    for source, drafts in enumerate(prompt.sources):
        for column, size in enumerate(drafts.block_sizes.tolist()):
            most = min(int(drafts.draft_length[position - 1, column]), prompt.max_new_tokens - position - 1)
            for verified in range(0 if truncate else most, most + 1):
                yield StepChoice(source, size, verified)


def taken(
    prompt: PromptTrace, works: Sequence[DraftWork], cost: CostModel, state: State, choice: StepChoice
) -> tuple[float, int]:
    """Seconds of a step, and its draft length."""
    drafts, length, waits = prompt.sources[choice.source], 0, 0
    if choice.block_size > 1:
        length = int(drafts.draft_length[state.position - 1, drafts.column(choice.block_size)])
    if length:
        waits = waiting(works[choice.source], state.last[choice.source], state.position)
    done = Work(
        draft_size=length + 1 if length else 0,
        waiting=waits,
        verify_width=choice.verify_length + 1,
        context_length=PROMPT_LENGTH + state.position,
        source=choice.source,
    )
    return price(cost, done).total, length


def then(state: State, choice: StepChoice, length: int, accepted: int) -> State:
    last = list(state.last)
    if length:
        last[choice.source] = (state.position, length, accepted)
    return State(state.position + accepted + 1, tuple(last))


def stands(prompt: PromptTrace, state: State, choice: StepChoice) -> int:
    if choice.block_size == 1:
        return 0
    drafts = prompt.sources[choice.source]
    return min(int(drafts.num_accepted[state.position - 1, drafts.column(choice.block_size)]), choice.verify_length)


def least_seconds(
    prompt: PromptTrace, works: Sequence[DraftWork], cost: CostModel, truncate: bool, state: State
) -> float:
    if state.position == prompt.output_length:
        return 0.0
    found = math.inf
    for choice in choices(prompt, state.position, truncate):
        seconds, length = taken(prompt, works, cost, state, choice)
        after = then(state, choice, length, stands(prompt, state, choice))
        found = min(found, seconds + least_seconds(prompt, works, cost, truncate, after))
    return found


def walked(prompt: PromptTrace, works: Sequence[DraftWork], cost: CostModel, path: Path) -> float:
    """Seconds of a path, after checking that the runtime could have walked it."""
    state, seconds = start(works), 0.0
    steps = (path.position, path.source, path.block_size, path.verify_length, path.num_accepted)
    for position, source, size, verified, accepted in zip(*(field.tolist() for field in steps), strict=True):
        choice = StepChoice(source, size, verified)
        assert position == state.position
        assert choice in choices(prompt, position, truncate=True)
        assert accepted == stands(prompt, state, choice)
        spent, length = taken(prompt, works, cost, state, choice)
        seconds, state = seconds + spent, then(state, choice, length, accepted)
    assert state.position == prompt.output_length
    return seconds


def least_expected(prompt: PromptTrace, works: Sequence[DraftWork], cost: CostModel, state: State) -> float:
    """Least expected seconds; what was done may depend on all that happened before."""
    if state.position == prompt.output_length:
        return 0.0
    found = math.inf
    for choice in choices(prompt, state.position, truncate=True):
        seconds, length = taken(prompt, works, cost, state, choice)
        reached, room = 1.0, prompt.output_length - state.position - 1
        for accepted in range(choice.verify_length + 1):
            drafts = prompt.sources[choice.source]
            chance = 0.0
            if accepted < choice.verify_length and accepted < room:
                assert drafts.match_probability is not None
                row, column = state.position - 1, drafts.column(choice.block_size)
                chance = float(drafts.match_probability[row, column, accepted])
            after = then(state, choice, length, accepted)
            seconds += reached * (1 - chance) * least_expected(prompt, works, cost, after)
            reached *= chance
            if not reached:
                break
        found = min(found, seconds)
    return found


# The oracles

seeds = st.integers(0, 2**32 - 1)


@together
@settings(max_examples=12, deadline=None)
@given(seed=seeds, output_length=st.integers(1, 5), spare=st.integers(0, 4))
def test_exhaustive_search_finds_nothing_faster(
    works: tuple[DraftWork, ...], seed: int, output_length: int, spare: int
) -> None:
    prompt, cost = prompt_of(seed, works, output_length, spare), Priced(seed)
    for oracle, truncate in ((oracle_step, False), (oracle_step_truncate, True)):
        path = oracle(prompt, works, cost)
        assert path.seconds == pytest.approx(walked(prompt, works, cost, path), rel=1e-12, abs=1e-12)
        least = least_seconds(prompt, works, cost, truncate, start(works))
        assert path.seconds == pytest.approx(least, rel=1e-12, abs=1e-12)


@together
@pytest.mark.parametrize("seed", range(3))
def test_no_choice_expects_less(works: tuple[DraftWork, ...], seed: int) -> None:
    prompt, cost = prompt_of(seed, works, 4, seed), Priced(seed)
    found = oracle_distributions(prompt, works, cost)
    assert found.seconds == pytest.approx(least_expected(prompt, works, cost, start(works)), rel=1e-6)


@together
def test_fixed_choices_are_walked_and_the_best_has_most_tokens_per_second(works: tuple[DraftWork, ...]) -> None:
    chosen = set()
    for seed in range(6):
        cost, prompt = Priced(seed), prompt_of(seed, works, 14, 2)
        seconds = {}
        for source, drafts in enumerate(prompt.sources):
            for size in (1, *drafts.block_sizes.tolist()):
                path = fixed_path(prompt, works, cost, size, source)
                assert path.seconds == pytest.approx(walked(prompt, works, cost, path), rel=1e-12)
                assert set(path.source.tolist()) == {source if size > 1 else 0}
                seconds[size, source if size > 1 else 0] = path.seconds
        best = best_fixed([prompt], works, cost)
        assert seconds[best] == min(seconds.values())
        assert oracle_step_truncate(prompt, works, cost).seconds <= seconds[best] + 1e-12
        chosen.add(best.source)
    assert len(chosen) > 1


def test_what_waits_while_the_store_drafts_makes_the_model_dearer() -> None:
    class CatchUp:
        """Catching up costs as much as it reads, and the model's drafts are else free; so are the store's."""

        def seconds(self, phase: str, size: int, context_length: int) -> float:
            return {"verify": 1.0, "catch_up": 0.2 * size}.get(phase, 0.0)

        def of_source(self, source: int) -> CatchUp:
            return self

    def table(accepted: list[int], length: int) -> DraftTable:
        stands = np.array(accepted, np.int32)[:, None]
        drafted = np.full(stands.shape, length, np.int32)
        return DraftTable(np.array([4], np.int32), drafted, stands, np.zeros((*stands.shape, 3), np.int32))

    made = synthetic_prompt(0, output_length=9, max_new_tokens=20, prompt_length=PROMPT_LENGTH)
    model, store = table([0, 0, 0, 0, 3, 2, 1, 0], 3), table([3, 2, 1, 0, 0, 0, 0, 0], 3)
    prompt = replace(made, drafts=model, others=(store,))
    path = oracle_step_truncate(prompt, (MODEL, STORE), CatchUp())
    # The first draft of the model reads the prompt and four tokens that the store drafted.
    assert (path.source.tolist(), path.verify_length.tolist()) == ([1, 0], [3, 3])
    assert path.seconds == pytest.approx(2 + 0.2 * (PROMPT_LENGTH + 4))


def test_two_sources_that_wait_are_refused_but_fixed_choices_are_walked() -> None:
    works = (MODEL, ASSISTANT)
    prompt, cost = prompt_of(1, works, 8, 0), Priced(1)
    with pytest.raises(ValueError, match="sources 0 and 1 all read what was decided"):
        oracle_step_truncate(prompt, works, cost)
    best = best_fixed([prompt], works, cost)
    path = fixed_path(prompt, works, cost, *best)
    assert path.seconds == pytest.approx(walked(prompt, works, cost, path))


def test_the_first_source_alone_is_what_it_is_without_the_others() -> None:
    prompt, cost = prompt_of(3, (MODEL, STORE), 12, 1), Priced(3)
    alone = replace(prompt, others=())
    assert oracle_step_truncate(prompt, MODEL, cost).seconds == oracle_step_truncate(alone, MODEL, cost).seconds
    assert oracle_step_truncate(prompt, (MODEL, STORE), cost).seconds <= oracle_step(alone, MODEL, cost).seconds


# Regret


def random_path(prompt: PromptTrace, works: Sequence[DraftWork], cost: CostModel, seed: int) -> Path:
    """Steps chosen at random."""
    rng, steps, state, spent = np.random.default_rng(seed), list[tuple[int, ...]](), start(works), list[float]()
    while state.position < prompt.output_length:
        among = list(choices(prompt, state.position, truncate=True))
        choice = among[rng.integers(len(among))]
        accepted = stands(prompt, state, choice)
        seconds, length = taken(prompt, works, cost, state, choice)
        steps.append((state.position, choice.block_size, length, choice.verify_length, accepted, choice.source))
        spent.append(seconds)
        state = then(state, choice, length, accepted)
    names = ("position", "block_size", "draft_length", "verify_length", "num_accepted", "source")
    counts = dict(zip(names, np.array(steps, np.int32).T, strict=True))
    return Path(tokens=prompt.decided_by_steps, **counts, seconds=math.fsum(spent))


@together
def test_regret_sums_to_what_the_oracle_does_not_take(works: tuple[DraftWork, ...]) -> None:
    assert kinds(len(works)) == (*KINDS, OTHER_SOURCE)
    total = np.zeros(len(KINDS) + 1)
    for seed in range(5):
        prompt, cost = prompt_of(seed, works, 20, 3), Priced(seed)
        known, path = oracle_step_truncate(prompt, works, cost), random_path(prompt, works, cost, seed)
        regret = step_regret(prompt, works, known, path)
        assert (regret >= -1e-12).all()
        assert regret.sum() == pytest.approx(path.seconds - known.seconds, rel=1e-9)
        assert step_regret(prompt, works, known, known).sum() == pytest.approx(0, abs=1e-9)
        total += regret.sum(axis=0)
    assert (total[[0, 1, 4]] > 0).all()


def test_every_way_through_a_tiny_case() -> None:
    """All sequences of sources, sizes and widths, one by one: none is faster than the oracle."""
    works, seconds = (STORE, MODEL), list[float]()
    prompt, cost = prompt_of(8, works, 4, 1), Priced(8)
    options = [list(choices(prompt, position, truncate=True)) for position in (1, 2, 3)]
    for plan in itertools.product(*options):
        state, spent = start(works), 0.0
        while state.position < prompt.output_length:
            choice = plan[state.position - 1]
            step, length = taken(prompt, works, cost, state, choice)
            spent, state = spent + step, then(state, choice, length, stands(prompt, state, choice))
        seconds.append(spent)
    assert oracle_step_truncate(prompt, works, cost).seconds == pytest.approx(min(seconds), rel=1e-12)
