"""Metrics and log of an engine in this process: they are beside vLLM's own, and say the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from bpkit_vllm import records
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.prometheus import get_prometheus_registry

from tests.vllm.conftest import PROMPTS, engine
from tests.vllm.engine import Engine
from tests.vllm.policies import Raises

Samples = dict[tuple[str, str], float]
"""By the name of a metric, and the policy that it is of."""


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("observed") / "steps.jsonl"
    options = {"policy": "fixed:5", "observers": ["prometheus", f"jsonl:{log}"]}
    with engine("dflash", options, max_num_seqs=8) as made:
        made.log = log
        yield made


def scraped() -> Samples:
    """What vLLM's /metrics would say of policies, summed over other labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(generate_latest(get_prometheus_registry()).decode()):
        for sample in family.samples:
            place = sample.name, sample.labels.get("policy", "")
            found[place] = found.get(place, 0.0) + sample.value
    return found


def grown(before: Samples, name: str, policy: str) -> float:
    return scraped()[name, policy] - before.get((name, policy), 0.0)


def steps_of(log: Any, policy: str) -> list[dict[str, Any]]:
    """Lines of steps under a policy since the last time, and nothing of them afterwards."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = {line["request"] for line in lines if line["event"] == "prefill" and line["policy"] == policy}
    return [line for line in lines if line["event"] == "step" and line["request"] in requests]


def test_metrics_of_two_policies_are_beside_those_of_vllm(observed: Engine) -> None:
    before = scraped()
    found = observed.run(PROMPTS[:8], concurrency=8, policies=(None, "goodput"))
    assert ("vllm:spec_decode_num_draft_tokens_total", "") in scraped()
    totals = {"drafted": 0.0, "verified": 0.0, "accepted": 0.0}
    for policy in ("fixed:5", "goodput"):
        steps = steps_of(observed.log, policy)
        assert grown(before, "bpkit_steps_total", policy) == len(steps) > 0
        assert grown(before, "bpkit_requests_total", policy) == 4
        assert grown(before, "bpkit_tokens_total", policy) == 4 * 32
        assert grown(before, "bpkit_fallbacks_total", policy) == 0
        passes = grown(before, "bpkit_decision_seconds_count", policy)
        assert len(steps) / 4 <= passes <= len(steps), "one decision for all rows of a pass"
        assert 0 < grown(before, "bpkit_decision_seconds_sum", policy) < grown(before, "bpkit_step_seconds_sum", policy)
        for what in totals:
            totals[what] += grown(before, f"bpkit_{what}_tokens_total", policy)
    assert totals["verified"] == found.metrics["num_draft_tokens"]
    assert totals["accepted"] == found.metrics["num_accepted_tokens"]


@pytest.mark.filterwarnings("ignore::bpkit.decode.guard.PolicyFaultWarning")
def test_faults_are_counted_once_each_and_said_in_the_log(
    observed: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(records.log, "handlers", [caplog.handler])
    monkeypatch.setattr(records.log, "propagate", False)
    caplog.set_level(logging.INFO, logger="vllm.bpkit")
    before, failing = scraped(), Raises()
    observed.scheduler.use(failing)
    observed.run(PROMPTS[:8], concurrency=8)
    rows = observed.scheduler.policies.default
    assert rows.fallbacks > 8
    assert grown(before, "bpkit_fallbacks_total", "Raises") == rows.fallbacks
    observed.scheduler.policies.summary(last=True)
    said = [line for line in caplog.messages if "Raises" in line]  # a second one if the run took long
    assert f"({rows.fallbacks} since the start)" in said[-1]
    assert sum(int(line.split(": ")[1].split()[0]) for line in said) == rows.steps
