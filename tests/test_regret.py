"""Regret: it sums to what the policy takes more than the oracle, it is never negative, and it is named right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable
from bpkit.trace.oracle.paths import fixed_path, oracle_step_truncate
from bpkit.trace.oracle.regret import KINDS, NotTraced, features_seconds, step_regret
from bpkit.trace.records import DraftTable, PromptTrace, Taken
from bpkit.trace.replay import Replayed, Replayer
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION, NGRAM, Context, DecoderSpec, Draft, Feature, work_of

KINDS_OF_DRAFTER = (BLOCK_DIFFUSION, AUTOREGRESSIVE, NGRAM)
every_kind = pytest.mark.parametrize("kind", KINDS_OF_DRAFTER)
SIZES = (2, 3, 4, 5, 6, 7, 8)


class Dice(Policy):
    """Any size, any truncation, any early end."""

    wants = frozenset({Feature.DRAFT_PROBABILITY})

    def __init__(self, seed: int, sizes: tuple[int, ...] = SIZES) -> None:
        super().__init__()
        self.rng, self.sizes = np.random.default_rng(seed), (1, *sizes)

    def select(self, state: Any, context: Context) -> Tensor:
        return context.full(int(self.rng.choice(self.sizes)))

    def extend(self, state: Any, draft: Draft) -> Tensor:
        return torch.tensor([bool(self.rng.uniform() < 0.7)])

    def truncate(self, state: Any, draft: Draft) -> Tensor:
        return draft.full(int(self.rng.integers(0, 9))).minimum(draft.draft_length)


class BlindDice(Dice):
    """For drafters without a distribution."""

    wants = frozenset()


def spec(kind: str) -> DecoderSpec:
    return DecoderSpec("target", "drafter", kind, 8, 8, hidden_size=8, vocab_size=64)


def random_cost(seed: int) -> CostTable:
    """Staircases up and down."""
    rng = np.random.default_rng(seed)

    def some(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    return CostTable(
        draft={size: some(0, 0.6) for size in SIZES},
        catch_up={waiting: some(0, 0.8) for waiting in (1, 2, 3, 5, 8, 16)},
        features={size: some(0.01, 0.1) for size in SIZES},
        verify={width: {12: some(0.3, 2), 40: some(0.3, 2)} for width in range(1, 9)},
        rest=some(0, 0.2),
    )


def prompt_for(kind: str, seed: int, block_sizes: tuple[int, ...] = SIZES) -> PromptTrace:
    """A made-up prompt whose drafts are such as this kind of drafter makes."""
    prompt = synthetic_prompt(seed, output_length=30, max_new_tokens=30 + seed % 3, block_sizes=block_sizes, seed=seed)
    drafts, rng = prompt.drafts, np.random.default_rng(seed)
    length, accepted = drafts.draft_length, drafts.num_accepted
    if kind == AUTOREGRESSIVE:  # a shorter draft is the beginning of a longer one
        accepted = np.minimum(accepted[:, -1:], length)
    if kind == NGRAM:  # it finds what it finds
        length = np.minimum(length, rng.integers(0, 8, (len(length), 1)))
    accepted = np.minimum(accepted, length).astype(np.int32)
    return replace(prompt, drafts=replace(drafts, draft_length=length.astype(np.int32), num_accepted=accepted))


def replayed(prompt: PromptTrace, kind: str, cost: CostTable, seed: int, **options: Any) -> Replayed:
    return Replayer(spec(kind), Dice(seed, **options), cost, strict=True).run(prompt)


def regret_of(prompt: PromptTrace, kind: str, cost: CostTable, taken: Taken) -> NDArray[np.float64]:
    work = work_of(kind)
    return step_regret(prompt, work, oracle_step_truncate(prompt, work, cost), taken)


@every_kind
@pytest.mark.parametrize("seed", range(6))
def test_regret_sums_to_what_a_policy_takes_more_than_the_oracle(kind: str, seed: int) -> None:
    prompt, cost = prompt_for(kind, seed), random_cost(seed)
    found = replayed(prompt, kind, cost, seed)
    regret = regret_of(prompt, kind, cost, found)
    assert regret.shape == (found.steps, len(KINDS))
    assert (regret >= 0).all()
    features = features_seconds(prompt, cost, found)
    assert features > 0
    best = oracle_step_truncate(prompt, work_of(kind), cost).seconds
    assert regret.sum() + features == pytest.approx(found.seconds(cost) - best, rel=1e-9)
    # No step is at fault both ways.
    assert ((regret[:, 0] == 0) | (regret[:, 1] == 0)).all()
    assert ((regret[:, 2] == 0) | (regret[:, 3] == 0)).all()


@every_kind
def test_dice_make_every_mistake(kind: str) -> None:
    cost, total = random_cost(0), np.zeros(len(KINDS))
    for seed in range(6):
        prompt = prompt_for(kind, seed)
        total += regret_of(prompt, kind, cost, replayed(prompt, kind, cost, seed)).sum(axis=0)
    assert (total > 0).all()


@every_kind
def test_regret_of_fixed_sizes_and_of_the_oracle(kind: str) -> None:
    prompt, cost = prompt_for(kind, 3), random_cost(3)
    best = oracle_step_truncate(prompt, work_of(kind), cost)
    for size in (1, *SIZES):
        path = fixed_path(prompt, work_of(kind), cost, size)
        regret = regret_of(prompt, kind, cost, path)
        assert regret.sum() == pytest.approx(path.seconds - best.seconds, rel=1e-9)
    assert (regret_of(prompt, kind, cost, best) == 0).all()


def test_early_ends_are_drafts_of_smaller_sizes_if_those_were_traced() -> None:
    cost = random_cost(1)
    lengths = []
    for seed in range(3):
        found = replayed(prompt_for(AUTOREGRESSIVE, seed), AUTOREGRESSIVE, cost, seed)
        lengths += (found.block_size - 1 - found.draft_length).tolist()
    assert max(lengths) > 0, "no draft was ended early"
    prompt = prompt_for(AUTOREGRESSIVE, 0, (4, 8))
    gaps = replayed(prompt, AUTOREGRESSIVE, cost, 0, sizes=(4, 8))
    with pytest.raises(NotTraced, match="is not traced"):
        regret_of(prompt, AUTOREGRESSIVE, cost, gaps)


# Names, by hand: a step of size 1, 2, 4 takes 1, 2, 3 if the whole draft is verified

BY_HAND = CostTable(
    unit="plain steps",
    draft={2: 0.5, 4: 1.0},
    features={4: 0.25},
    verify={1: 1.0, 2: 1.5, 3: 1.75, 4: 2.0},
)


def by_hand(stands: bool) -> PromptTrace:
    """Twelve tokens to decide; drafts stand whole, or not at all."""
    prompt = synthetic_prompt(0, output_length=13, max_new_tokens=100, block_sizes=(2, 4))
    lengths = np.broadcast_to(np.array([1, 3], np.int32), (12, 2)).copy()
    accepted = np.minimum(lengths, (11 - np.arange(12))[:, None]) if stands else np.zeros((12, 2))
    table = DraftTable(np.array([2, 4], np.int32), lengths, accepted.astype(np.int32), np.ones((12, 2, 3), np.int32))
    return replace(prompt, drafts=table)


def named(prompt: PromptTrace, taken: Taken) -> dict[str, float]:
    found = regret_of(prompt, BLOCK_DIFFUSION, BY_HAND, taken).sum(axis=0)
    return {kind: value for kind, value in zip(KINDS, found.tolist(), strict=True) if value > 1e-12}


def steps(position: list[int], block_size: list[int], verify_length: list[int]) -> Taken:
    sizes, verified = np.array(block_size, np.int32), np.array(verify_length, np.int32)
    return Taken(
        tokens=12,
        position=np.array(position, np.int32),
        block_size=sizes,
        draft_length=sizes - 1,
        verify_length=verified,
        num_accepted=verified,
    )


def fixed_steps(prompt: PromptTrace, size: int) -> Taken:
    return fixed_path(prompt, work_of(BLOCK_DIFFUSION), BY_HAND, size)


def test_drafts_that_fall_were_too_large_and_verified_too_much() -> None:
    falls = by_hand(stands=False)  # best is not to draft: 12 steps of 1
    assert named(falls, fixed_steps(falls, 1)) == {}
    # 12 steps of 3: a draft for 1 of which 3 tokens are verified for 1 more.
    wasted = named(falls, fixed_steps(falls, 4))
    assert wasted == pytest.approx({"drafted_too_large": 12.0, "verified_too_much": 12.0})
    thrown_away = named(falls, steps(list(range(1, 13)), [4] * 12, [0] * 12))
    assert thrown_away == pytest.approx({"drafted_too_large": 12.0})


def test_drafts_that_stand_were_too_small_and_verified_too_little() -> None:
    stands = by_hand(stands=True)  # best is size 4: 3 steps of 3
    assert named(stands, fixed_steps(stands, 4)) == {}
    assert named(stands, fixed_steps(stands, 1)) == pytest.approx({"drafted_too_small": 3.0})
    assert named(stands, fixed_steps(stands, 2)) == pytest.approx({"drafted_too_small": 3.0})
    # One token short: 2.75 and a plain step where 3 would have done.
    short = named(stands, steps([1, 4, 5, 9], [4, 1, 4, 4], [2, 0, 3, 3]))
    assert short == pytest.approx({"verified_too_little": 0.75})


def test_features_are_paid_where_something_was_drafted() -> None:
    prompt = by_hand(stands=True)
    taken = replace(steps([1, 5, 6], [4, 1, 2], [3, 0, 1]), features=True)
    assert features_seconds(prompt, BY_HAND, taken) == pytest.approx(0.5)
    assert features_seconds(prompt, BY_HAND, replace(taken, features=False)) == 0
    assert features_seconds(prompt, BY_HAND, replace(taken, draft_length=np.zeros(3, np.int32))) == 0


def test_one_token_has_no_steps_to_regret() -> None:
    prompt = synthetic_prompt(0, output_length=1, max_new_tokens=4)
    path = oracle_step_truncate(prompt, work_of(BLOCK_DIFFUSION), BY_HAND)
    assert regret_of(prompt, BLOCK_DIFFUSION, BY_HAND, path).shape == (0, 4)


@pytest.mark.parametrize("name", ["block-diffusion", "autoregressive", "n-gram"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_regret_sums_on_traces_of_models(pair: TinyPair, name: str, temperature: float) -> None:
    drafters: dict[str, Any] = {"block-diffusion": pair.block_diffusion, "autoregressive": pair.autoregressive}
    drafter = drafters.get(name, NgramDrafter)()
    decoder = SpeculativeDecoder(pair.target, drafter, "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions(SIZES, 24, {"temperature": temperature}, 1 if temperature else None)
    prompt = Tracer(decoder, options).trace(0, Prompt("a", "tiny", "abc abc abc abc "))
    cost, kind = random_cost(4), decoder.spec.drafter_kind
    policy = BlindDice if name == "n-gram" else Dice
    found = Replayer(decoder.spec, policy(0), cost, strict=True).run(prompt)
    regret = regret_of(prompt, kind, cost, found)
    best = oracle_step_truncate(prompt, work_of(kind), cost).seconds + features_seconds(prompt, cost, found)
    assert (regret >= 0).all()
    assert regret.sum() == pytest.approx(found.seconds(cost) - best, rel=1e-9)
