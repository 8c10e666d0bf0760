"""Whatever policies do, the texts are those of vLLM's plain decoding at the same concurrency, in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bpkit.policy import Policy
from bpkit.trace.cost import PackedCost, write_cost
from tests.vllm.conftest import CONCURRENCY, engine
from tests.vllm.engine import METHODS, Engine
from tests.vllm.policies import Nonsense, Raises, Slow, Unruly

Texts = dict[int, list[list[int]]]
COST = PackedCost(name="engine", passes={1: 0.010, 16: 0.011, 64: 0.030}, row=0.0002, draft={8: 0.002, 64: 0.004})


@pytest.fixture(scope="module", params=METHODS)
def served(request: pytest.FixtureRequest, plain: Texts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine of each method, that writes what its steps did to `log`."""
    folder = tmp_path_factory.mktemp(request.param)
    write_cost(COST, folder / "cost.json")
    options = {
        "policy": "fixed:4",
        "cost": str(folder / "cost.json"),
        "observers": [f"jsonl:{folder / 'steps.jsonl'}"],
        "max_decision_us": 100_000,
    }
    with engine(request.param, options) as made:
        made.log = folder / "steps.jsonl"
        yield made


def logged(file: Path) -> list[dict[str, Any]]:
    """What was logged since the last time this was asked."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("")
    return lines


def settled(served: Engine) -> None:
    """Nothing of a request is left when all have ended."""
    assert not served.scheduler.policies.rows_of
    for rows in served.scheduler.policies.active:
        assert (len(rows), len(rows.parked), len(rows.waiting)) == (0, 0, 0)


@pytest.mark.parametrize("concurrency", CONCURRENCY)
def test_requests_with_policies_of_their_own(served: Engine, plain: Texts, concurrency: int) -> None:
    logged(served.log)
    served.scheduler.use("fixed:4")
    named = (None, "fixed:6", "goodput", "fixed:1", "joint", "turbospec", "ucb")
    found = served.run(CONCURRENCY[concurrency], concurrency=concurrency, policies=named)
    assert found.texts == plain[concurrency]
    settled(served)
    lines = logged(served.log)
    steps = [line for line in lines if line["event"] == "step"]
    ends = [line for line in lines if line["event"] == "end"]
    assert found.metrics["num_draft_tokens"] == sum(line["verify_length"] for line in steps) > 0
    assert found.metrics["num_accepted_tokens"] == sum(line["num_accepted"] for line in steps) > 0
    assert found.metrics["num_drafts"] == sum(line["verify_length"] > 0 for line in steps)
    assert len(ends) == len(found.texts)
    assert sum(line["num_tokens"] for line in ends) == sum(map(len, found.texts))
    assert not any(line["fallbacks"] for line in ends)
    policies = {line["request"]: line["policy"] for line in lines if line["event"] == "prefill"}
    assert set(policies.values()) == {"fixed:4" if name is None else name for name in named[: len(found.texts)]}
    for line in steps:
        size = {"fixed:4": 4, "fixed:6": 6, "fixed:1": 1}.get(policies[line["request"]])
        assert line["verify_length"] <= line["draft_length"] <= line["block_size"] - 1
        assert size is None or line["block_size"] == size or line["step"] == 0


@pytest.mark.parametrize("policy", [Unruly, Raises, Nonsense, Slow])
@pytest.mark.filterwarnings("ignore::bpkit.decode.guard.PolicyFaultWarning")
def test_policies_that_fail_cost_no_request(served: Engine, plain: Texts, policy: type[Policy]) -> None:
    logged(served.log)
    made = policy()
    served.scheduler.use(made)
    found = served.run(CONCURRENCY[8], concurrency=8)
    assert found.texts == plain[8]
    settled(served)
    lines = logged(served.log)
    steps = [line for line in lines if line["event"] == "step"]
    faults = sum(line["fallbacks"] for line in steps)
    if isinstance(made, Unruly) and policy is Unruly:
        assert not faults
        assert made.begun == made.ended == len(found.texts)
        assert made.seen >= set(range(5)), "ragged lengths, 0 among them"
    else:
        assert faults
    if isinstance(made, Slow):  # rows wait for it, and are not told of meanwhile
        assert 0 < made.asked < found.steps / 2, "it was left out"
    else:
        assert found.metrics["num_draft_tokens"] == sum(line["verify_length"] for line in steps)
        assert found.metrics["num_accepted_tokens"] == sum(line["num_accepted"] for line in steps)
