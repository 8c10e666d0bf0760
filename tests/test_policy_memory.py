"""`RememberingPolicy`: what all policies that remember share, and memories that were saved by earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpkit.policy import PolicyError, PolicyMemory, RememberingPolicy, State
from bpkit.registry.resolve import resolve_policy
from bpkit.types import Context
from tests.records import context

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


def test_rows_begin_with_the_memory_and_their_mean_becomes_one() -> None:
    state = Counts().rows(context(2))
    assert {name: value.tolist() for name, value in state.items()} == {
        "tokens": [1, 1],
        "by_place": [[0.5, 0.25], [0.5, 0.25]],
    }
    assert {value.dtype for value in state.values()} == {torch.float64}
    state["tokens"][0] = 4
    state["by_place"][1, 0] = 1.5
    assert Counts.mean_of(state) == Counts(tokens=2.5, by_place=[1.0, 0.25])
    assert Counts() == Counts(tokens=1.0, by_place=[0.5, 0.25]), "rows are copies"


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
