"""Tuning: what is tried, what stays as typed, and that the best on validation prompts is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpkit.judge.evaluation import policies as tuning
from bpkit.judge.evaluation.candidate import Candidate, PolicyReplay
from bpkit.judge.evaluation.policies import Tuned, rounds, tune_options
from bpkit.judge.statistics import trimmed_mean
from bpkit.policy import PolicyError
from bpkit.progress import NoProgress
from bpkit.testing.traces import synthetic_prompts
from bpkit.trace.cost import CostTable
from bpkit.trace.store.manifest import TraceError
from bpkit.types import BLOCK_DIFFUSION, DecoderSpec

SPEC = DecoderSpec("t", "d", BLOCK_DIFFUSION, trained_block_size=8, max_block_size=8, hidden_size=8, vocab_size=64)
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
    candidate = Candidate(spec)  # type: ignore[arg-type]
    models = {cost.name: cost for cost in costs or (FREE,)}
    return tune_options(candidate, SPEC, models, PROMPTS, progress=NoProgress())


def replayed(spec: str | Candidate, *costs: CostTable) -> dict[str, tuple[int, list[float]]]:
    """Tokens in all, and modelled seconds of each prompt, by cost model."""
    candidate = spec if isinstance(spec, Candidate) else Candidate(spec)
    replay = PolicyReplay(candidate, SPEC, {cost.name: cost for cost in costs})
    for prompt in PROMPTS:
        replay.run(prompt)
    done = {cost.name: replay.prompts(cost.name) for cost in costs}
    return {
        name: (sum(one.tokens for one, _ in prompts), [seconds for _, seconds in prompts])
        for name, prompts in done.items()
    }


def test_all_combinations_are_tried_and_the_policy_as_it_stands(file: Path) -> None:
    tried = Candidate(f"{file}:Sized").variations(TRACED)
    assert [one.options for one in tried] == [
        {},
        *({"size": size, "name": name} for size in (2, 4, 5, 8) for name in "ab"),
    ]


def test_what_the_user_set_is_not_tuned(file: Path) -> None:
    tried = Candidate(f"{file}:Sized:size=2").variations(TRACED)
    assert [one.options for one in tried] == [{}, {"name": "b"}]  # `a` is what it is already
    assert all(candidate.describe()["size"] == 2 for candidate in tried)
    assert len(Candidate("fixed:4").variations(TRACED)) == 1
    assert len(Candidate("fixed").variations(TRACED)) == 1


def test_block_sizes_are_those_of_the_trace() -> None:
    tried = Candidate("threshold:0.5").variations(TRACED)
    assert [candidate.options.get("block_size") for candidate in tried] == [None, *TRACED]
    assert Candidate("bandit").fitted(TRACED).describe()["block_sizes"] == [1, 2, 4, 6, 8]
    assert Candidate("bandit:block_sizes=4+16").fitted(TRACED).describe()["block_sizes"] == [1, 4, 16]


def test_the_best_is_chosen_under_each_cost_model(file: Path) -> None:
    found = tuned(f"{file}:Sized", FREE, DEAR)
    rates = {}
    for cost in (FREE, DEAR):
        for size in (2, 3, 4, 8):
            tokens, seconds = replayed(f"{file}:Sized:{size}", cost)[cost.name]
            rates[cost.name, size] = tokens / sum(seconds)
        best = max((2, 3, 4, 8), key=lambda size: rates[cost.name, size])
        assert found[cost.name].candidate.describe()["size"] == best
    assert found["free"].candidate != found["dear"].candidate
    assert found["free"].method == "exhaustive"
    assert (found["free"].candidates, found["free"].prompts) == (9, 6)


def test_a_combination_that_was_not_traced_drops_out(file: Path) -> None:
    assert tuned(f"{file}:Sized")["free"].candidate.describe()["size"] != 5
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
    spent = [sum(replayed(choice.candidate, DEAR)["dear"][1]) for choice in (whole, halved)]
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
        assert Candidate(spec).knows_no_cost(SPEC), spec
    for spec in ("bandit", "ucb", "schedule", f"{file}:Keeps", f"{file}:Asks", f"{file}:Learns"):
        assert not Candidate(spec).knows_no_cost(SPEC), spec


def test_one_replay_is_priced_like_a_replay_of_its_own() -> None:
    both, alone = replayed("threshold", FREE, DEAR), replayed("threshold", DEAR)
    assert both["dear"] == alone["dear"]
    assert both["free"] != alone["dear"]


def test_made_policies_and_memory_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="made already"):
        Candidate(Candidate("fixed").make()).make()
    with pytest.raises(PolicyError, match="without memory"):
        Candidate(f"bandit:memory={tmp_path}/m.json").fitted(TRACED)


def test_hiccups_are_trimmed() -> None:
    import numpy as np

    values = np.full(100, 1e-4)
    values[:9] = 1.0
    assert trimmed_mean(values) == pytest.approx(1e-4)
    assert trimmed_mean(np.zeros(0)) == 0


def test_a_policy_remembers_only_what_outlives_a_request() -> None:
    assert Candidate("bandit").remembers
    assert Candidate("goodput:across_requests=true").remembers
    assert not Candidate("goodput:across_requests=false").remembers
    assert not Candidate("threshold").remembers
