"""`RememberingPolicy`: what all policies that remember share, and memories that were saved by earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import PolicyError, PolicyMemory, RememberingPolicy, State, fade
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.types import Context
from tests.records import bound, context, step

SAVED: dict[str, dict[str, Any]] = {
    "ema:start=4": {"block_size": 8, "average": 3.5, "steps": 12},
    "goodput": {"accepted": [2.5, 1.0], "tested": [3.0, 2.5]},
    "eesd": {"accepted": 7.0, "rejected": 2.5},
    "adaedl": {"threshold": 0.71, "acceptance": 0.4},
    "exp3:block_sizes=1+4": {
        "schema_version": 1,
        "losses": {"1": 1.5, "4": 0.5},
        "rounds": 3.0,
        "tokens": 5.0,
        "seconds": 0.2,
    },
    "bandit:block_sizes=1+4": {
        "schema_version": 1,
        "learned_with": {"target": "target", "drafter": "drafter"},
        "arms": {
            size: {
                "pulls": 2,
                "count": 2.0,
                "tokens": 4.0,
                "tokens_squared": 10.0,
                "seconds": 0.2,
                "seconds_squared": 0.02,
                "tokens_seconds": 0.4,
            }
            for size in ("1", "4")
        },
    },
    "tapout:rules=fixed@4": {
        "schema_version": 1,
        "reward": "blend",
        "rules": {
            "fixed@4": {
                "pulls": 1,
                "count": 1.0,
                "tokens": 0.5,
                "tokens_squared": 0.25,
                "seconds": 1.0,
                "seconds_squared": 1.0,
                "tokens_seconds": 0.5,
            }
        },
    },
}
"""By policy; as they were written before the policies shared one class."""


class Counts(PolicyMemory):
    tokens: float = 1.0
    by_place: list[float] = [0.5, 0.25]


class Counting(RememberingPolicy[Counts]):
    Memory = Counts
    wants = frozenset()

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(4)

    def fitted(self, memory: Counts) -> Counts:
        if memory.tokens > 9:
            raise PolicyError("too many tokens")
        return memory


@pytest.mark.parametrize("spec", SAVED)
def test_a_memory_that_was_saved_before_is_taken_back(spec: str) -> None:
    policy = resolve_policy(spec)
    policy.load_state_dict(json.loads(json.dumps(SAVED[spec])))
    policy.bind(context(1).spec)
    assert policy.state_dict() == SAVED[spec]


@pytest.mark.parametrize("spec", SAVED)
def test_nothing_learned_is_an_empty_memory_and_one_begins_afresh_with_it(spec: str) -> None:
    policy = resolve_policy(spec)
    assert policy.state_dict() == {}
    policy.load_state_dict(SAVED[spec])
    policy.load_state_dict({})
    assert policy.state_dict() == {}


def test_rows_begin_with_the_memory_and_are_copies() -> None:
    memory = Counts()
    state = memory.rows(context(2))
    assert state["tokens"].tolist() == [1, 1]
    assert state["by_place"].tolist() == [[0.5, 0.25], [0.5, 0.25]]
    assert {value.dtype for value in state.values()} == {torch.float64}
    state["tokens"][0] = 4
    assert memory == Counts()
    assert memory.after(state).tokens == 4, "what the rows began with is kept apart"


def test_every_row_adds_what_it_learned_since_it_began() -> None:
    state = Counts().rows(context(2))
    state["tokens"] += torch.tensor([3.0, 0.5])
    state["by_place"][1, 0] += 1
    assert Counts(tokens=11, by_place=[2, 0]).after(state) == Counts(tokens=14.5, by_place=[3, 0])


def test_rows_of_fading_values_count_as_if_one_had_followed_the_other() -> None:
    class Means(PolicyMemory):
        fading, latest, bounds = frozenset({"mean"}), frozenset({"last"}), (0.0, 4.0)
        mean: float = 2.0
        last: int = 0
        total: int = 0

    first, second = [1.0, 3.0], [0.0, 4.0, 2.0]
    state, alone = Means().rows(context(2)), 2.0
    for seen in first + second:
        alone = 0.75 * alone + 0.25 * seen
    for both in zip(first, second, strict=False):
        state["mean"] = 0.75 * state["mean"] + 0.25 * torch.tensor(both)
        fade(state, 0.75)
    state["mean"] = torch.stack([state["mean"][0], 0.75 * state["mean"][1] + 0.25 * second[2]])
    fade(state, 0.75, torch.tensor([False, True]))
    state["last"], state["total"] = torch.tensor([5, 7]), torch.tensor([20, 30])
    made = Means().after(state)
    assert made == Means(mean=made.mean, last=7, total=4), "within bounds, and the choice of the last"
    assert made.mean == pytest.approx(alone)
    assert {name: value.dtype for name, value in state.items() if name in ("last", "total")} == {
        "last": torch.int64,
        "total": torch.int64,
    }


BY_ROWS = {
    "ema:block_sizes=1+4+16,interval=2": ("average", "steps"),
    "goodput:across_requests=true": ("accepted", "tested"),
    "eesd:across_requests=true": ("accepted", "rejected"),
    "adaedl:across_requests=true": ("acceptance",),
}
"""Policies whose rows learn by themselves, and what they know after rows side by side as after the same in turn."""
REQUESTS = ([(3, 3), (7, 2), (0, 0), (5, 5)], [(4, 0), (0, 0), (6, 1)])
"""Verified and accepted tokens of the steps of each."""


def one_after_the_other(spec: str) -> RememberingPolicy[Any]:
    """The policy after both requests, each begun when the one before had ended."""
    policy = bound(resolve_policy(spec))
    for steps in REQUESTS:
        state = policy.begin(context())
        for verified, accepted in steps:
            policy.observe(state, step([verified], [accepted]))
        policy.end(state)
        for name, value in policy.memory:
            assert state[name][0].tolist() == value, "alone, a row becomes the memory"
    return policy  # type: ignore[no-any-return]


def side_by_side(spec: str, together: bool) -> RememberingPolicy[Any]:
    """The same after both at the same time, which end in one step or one after the other."""
    policy = bound(resolve_policy(spec))
    state, steps = policy.begin(context(2)), [*REQUESTS[1]]
    for (verified, accepted), (others, stood) in zip(REQUESTS[0], steps, strict=False):
        policy.observe(state, step([verified, others], [accepted, stood]))
    first, second = ({name: value[row : row + 1] for name, value in state.items()} for row in (0, 1))
    verified, accepted = REQUESTS[0][3]
    policy.observe(first, step([verified], [accepted]))
    if together:
        policy.end({name: torch.cat([value, second[name]]) for name, value in first.items()})
    else:
        policy.end(first)
        policy.end(second)
    return policy  # type: ignore[no-any-return]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("spec", BY_ROWS)
def test_a_third_request_knows_what_two_learned_side_by_side(spec: str, together: bool) -> None:
    in_turn, made = one_after_the_other(spec), side_by_side(spec, together)
    for name in BY_ROWS[spec]:
        expected = in_turn.begin(context())[name]
        assert torch.allclose(made.begin(context())[name], expected, rtol=1e-12), name
        assert not torch.equal(bound(resolve_policy(spec)).begin(context())[name], expected)


def test_moves_of_a_threshold_add_up_and_stay_within_bounds() -> None:
    policy = bound(resolve_policy("adaedl:across_requests=true,threshold=0.998"))
    state = policy.begin(context(3))
    policy.observe(state, step([2, 2, 0], [0, 0, 0]))
    policy.end(state)
    assert policy.memory.threshold == pytest.approx(1.0)
    policy.end(state)
    assert policy.memory.threshold == 1.0


@pytest.mark.parametrize("spec", ["bandit:1+4", "ucb:1+4", "exp3:1+4,reward=tokens", "tapout:rules=fixed@4"])
def test_what_is_learned_at_once_is_known_to_all_and_each_row_counts_once(spec: str) -> None:
    together, alone = bound(resolve_policy(spec)), bound(resolve_policy(spec))
    now, single = context(3), context()
    state = together.begin(now)
    together.select(state, now)
    together.observe(state, step([3, 3, 3], [0, 2, 3], 0.3, block_size=[4, 4, 4]))
    known = together.state_dict()
    assert known
    together.end(state)
    assert together.state_dict() == known, "nothing counts twice"
    if spec.startswith("exp3"):
        return  # one draw is one round, whatever the rows: its own test says how they share it
    for accepted in (0, 2, 3):
        state = alone.begin(single)
        alone.select(state, single)
        alone.observe(state, step([3], [accepted], 0.1, block_size=[4]))
    assert flat(known) == pytest.approx(flat(alone.state_dict()))


@pytest.mark.parametrize("spec", ["eesd:across_requests=true", "ema:warmup=0,interval=1", "ucb"])
def test_no_evidence_of_rows_that_come_and_go_is_lost(pair: TinyPair, spec: str) -> None:
    decoder = SpeculativeDecoder(
        pair.target, pair.block_diffusion(), resolve_policy(spec), tokenizer=pair.tokenizer, strict=True
    )
    made = decoder.generate(["def f(x):", "abc", "1, 2, 3, 4", "x"], max_new_tokens=12, batch_size=2)
    steps = [each for result in made for each in result.steps]
    known = decoder.policy.state_dict()
    if spec.startswith("eesd"):
        assert known["accepted"] == 1 + sum(int(each.num_accepted) for each in steps)
        assert known["rejected"] == 1 + sum(int(each.verify_length - each.num_accepted) for each in steps)
    elif spec.startswith("ema"):
        assert known["steps"] == len(steps)
    else:
        assert sum(arm["pulls"] for arm in known["arms"].values()) == len(steps)
        tokens = sum(arm["tokens"] for arm in known["arms"].values())
        assert tokens == sum(int(each.acceptance_length) for each in steps)


def flat(known: dict[str, Any]) -> dict[str, Any]:
    """All values of nested dicts that are numbers, by their path."""
    found = {}
    for name, value in known.items():
        if isinstance(value, dict):
            found.update({f"{name}.{key}": each for key, each in flat(value).items()})
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def test_a_memory_that_is_none_or_does_not_fit_leaves_the_old_one() -> None:
    policy = Counting()
    policy.memory = Counts(tokens=3.0)
    for state, said in (
        ({"tokens": "many", "more": 1}, r"no memory of Counting \(tokens: .*; unknown key more"),
        ({"tokens": 10.0}, "too many"),
    ):
        with pytest.raises(PolicyError, match=said):
            policy.load_state_dict(state)
    assert policy.memory.tokens == 3.0


def test_a_memory_goes_into_a_file_and_comes_back(tmp_path: Path) -> None:
    file, policy, other = tmp_path / "new" / "memory.json", Counting(), Counting()
    policy.memory = Counts(tokens=3.0, by_place=[])
    policy.save(file)
    other.load(file)
    assert other.memory == policy.memory
    file.write_text("{")
    with pytest.raises(PolicyError, match=r"memory\.json: this cannot be read as JSON .*; delete the file"):
        other.load(file)
    file.write_text('{"tokens": 10}')
    with pytest.raises(PolicyError, match=r"memory\.json: too many tokens; delete the file"):
        other.load(file)


def test_no_two_policies_share_a_memory() -> None:
    one, other = Counting(), Counting()
    one.memory.by_place.append(1.0)
    assert other.memory == Counts()
