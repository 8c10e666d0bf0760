"""Tuning: what is tried, what stays as typed, and that the best on validation prompts is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpkit.judge.evaluation import tune as tuning
from bpkit.judge.evaluation.play import Player, Stage, knows_no_cost, trimmed_mean
from bpkit.judge.evaluation.recipe import Recipe
from bpkit.judge.evaluation.tune import Tuned, rounds, tune_options
from bpkit.judge.progress import NoProgress
from bpkit.policy import PolicyError
from bpkit.testing.traces import synthetic_prompts
from bpkit.trace.cost import CostTable
from bpkit.trace.store.manifest import TraceError
from bpkit.types import BLOCK_DIFFUSION, DecoderSpec

SPEC = DecoderSpec("t", "d", BLOCK_DIFFUSION, trained_block_size=8, max_block_size=8, hidden_size=8, vocab_size=64)
STAGE = Stage(SPEC)
PROMPTS = synthetic_prompts(6, output_length=20, max_new_tokens=20)
TRACED = (2, 3, 4, 6, 8)
FREE = CostTable(name="free", unit="plain steps", verify={1: 1.0, 8: 1.0})
DEAR = CostTable(name="dear", unit="plain steps", verify={v: 1.0 + 0.8 * (v - 1) for v in range(1, 9)})

POLICIES = """
from typing import Any, ClassVar
from bpkit import Policy, PolicyConfig, PolicyError

class Size(PolicyConfig):
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"size": (2, 4, 5, 8), "name": ("a", "b")}
    size: int = 3
    name: str = "a"

class Sized(Policy):
    Config = Size
    wants = frozenset()
    def select(self, state, context):
        return context.full(self.config.size)

class Untraced(PolicyConfig):
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"size": (5, 7)}
    size: int = 5

class Nowhere(Sized):
    Config = Untraced

class Keeps(Sized):
    def bind(self, decoder, cost=None):
        self.cost = cost

class Asks(Sized):
    def bind(self, decoder, cost=None):
        self.price = cost.seconds("verify", 1, 0) if cost is not None else 0

class Looks(Sized):
    def bind(self, decoder, cost=None):
        self.large = decoder.max_block_size

class Learns(Sized):
    def observe(self, state, step):
        pass
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policies") / "tunable.py"
    path.write_text(POLICIES, encoding="utf-8")
    return path


def tuned(spec: object, *costs: CostTable) -> dict[str, Tuned]:
    recipe = Recipe(spec)  # type: ignore[arg-type]
    models = {cost.name: cost for cost in costs or (FREE,)}
    charged = dict.fromkeys(models, False)
    return tune_options(recipe, STAGE, models, PROMPTS, charged=charged, progress=NoProgress())


def test_all_combinations_are_tried_and_the_policy_as_it_stands(file: Path) -> None:
    tried = Recipe(f"{file}:Sized").variations(TRACED)
    assert [recipe.options for recipe in tried] == [
        {},
        *({"size": size, "name": name} for size in (2, 4, 5, 8) for name in "ab"),
    ]


def test_what_the_user_set_is_not_tuned(file: Path) -> None:
    tried = Recipe(f"{file}:Sized:size=2").variations(TRACED)
    assert [recipe.options for recipe in tried] == [{}, {"name": "b"}]  # `a` is what it is already
    assert all(recipe.describe()["size"] == 2 for recipe in tried)
    assert len(Recipe("fixed:4").variations(TRACED)) == 1
    assert len(Recipe("fixed").variations(TRACED)) == 1


def test_block_sizes_are_those_of_the_trace() -> None:
    tried = Recipe("threshold:0.5").variations(TRACED)
    assert [recipe.options.get("block_size") for recipe in tried] == [None, *TRACED]
    assert Recipe("bandit").fitted(TRACED).describe()["block_sizes"] == [1, 2, 4, 6, 8]
    assert Recipe("bandit:block_sizes=4+16").fitted(TRACED).describe()["block_sizes"] == [1, 4, 16]


def test_the_best_is_chosen_under_each_cost_model(file: Path) -> None:
    found = tuned(f"{file}:Sized", FREE, DEAR)
    rates = {}
    for cost in (FREE, DEAR):
        for size in (2, 3, 4, 8):
            player = Player(STAGE, Recipe(f"{file}:Sized:{size}"), {cost.name: cost})
            for prompt in PROMPTS:
                player.run(prompt)
            tally = player.tallies[cost.name]
            rates[cost.name, size] = sum(tally.tokens) / sum(tally.modelled)
        best = max((2, 3, 4, 8), key=lambda size: rates[cost.name, size])
        assert found[cost.name].recipe.describe()["size"] == best
    assert found["free"].recipe != found["dear"].recipe
    assert found["free"].method == "exhaustive"
    assert (found["free"].candidates, found["free"].prompts) == (9, 6)


def test_a_combination_that_was_not_traced_drops_out(file: Path) -> None:
    assert tuned(f"{file}:Sized")["free"].recipe.describe()["size"] != 5
    with pytest.raises(TraceError, match=r"block size [57] was asked for"):
        tuned(f"{file}:Nowhere")


def test_halving_goes_through_with_the_best(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned("threshold", DEAR)["dear"]
    assert whole.method == "exhaustive"
    monkeypatch.setattr(tuning, "EXHAUSTIVE", 10)
    monkeypatch.setattr(tuning, "A_ROUND", 100)
    monkeypatch.setattr(tuning, "FEWEST", 3)
    halved = tuned("threshold", DEAR)["dear"]
    assert halved.method == "successive halving"
    assert halved.candidates == whole.candidates == 51
    players = [Player(STAGE, choice.recipe, {"dear": DEAR}) for choice in (whole, halved)]
    for player in players:
        for prompt in PROMPTS:
            player.run(prompt)
    spent = [sum(player.tallies["dear"].modelled) for player in players]
    assert spent[0] <= spent[1] <= 1.05 * spent[0]


def test_rounds_end_with_one_and_never_exceed_the_prompts() -> None:
    for candidates in (2, 3, 4, 27, 91, 500):
        for prompts in (1, 5, 40, 1000):
            plan = rounds(candidates, prompts)
            assert plan[-1][0] == 1
            assert all(until <= prompts for _, until in plan)
            assert [kept for kept, _ in plan] == sorted((kept for kept, _ in plan), reverse=True)


def test_who_can_know_the_cost_model(file: Path) -> None:
    for spec in ("fixed", "threshold", "svip", f"{file}:Sized", f"{file}:Looks"):
        assert knows_no_cost(Recipe(spec), SPEC), spec
    for spec in ("bandit", "ucb", "schedule", f"{file}:Keeps", f"{file}:Asks", f"{file}:Learns"):
        assert not knows_no_cost(Recipe(spec), SPEC), spec


def test_one_replay_is_priced_like_a_replay_of_its_own() -> None:
    both = Player(STAGE, Recipe("threshold"), {"free": FREE, "dear": DEAR})
    alone = Player(STAGE, Recipe("threshold"), {"dear": DEAR})
    for prompt in PROMPTS:
        both.run(prompt)
        alone.run(prompt)
    assert both.tallies["dear"].modelled == alone.tallies["dear"].modelled
    assert both.tallies["free"].modelled != alone.tallies["dear"].modelled


def test_made_policies_and_memory_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="made already"):
        Recipe(Recipe("fixed").make()).make()
    with pytest.raises(PolicyError, match="without memory"):
        Recipe(f"bandit:memory={tmp_path}/m.json").fitted(TRACED)


def test_hiccups_are_trimmed() -> None:
    import numpy as np

    values = np.full(100, 1e-4)
    values[:9] = 1.0
    assert trimmed_mean(values) == pytest.approx(1e-4)
    assert trimmed_mean(np.zeros(0)) == 0


def test_a_policy_remembers_only_what_outlives_a_request() -> None:
    assert Recipe("bandit").remembers
    assert Recipe("goodput:across_requests=true").remembers
    assert not Recipe("goodput:across_requests=false").remembers
    assert not Recipe("threshold").remembers
