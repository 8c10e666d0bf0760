"""Observers inside vLLM: what they are told, what a step of many rows costs them, and vLLM's own /metrics."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bpkit_vllm import records
from bpkit_vllm.records import Records

from bpkit.decode.observers import Ending, ObservedRequest, Observer, ObserverError
from bpkit.registry.resolve import resolve_policy
from bpkit.types import DecoderSpec, Prefill, Record, Seconds, Step

SPEC = DecoderSpec("target", "drafter", "block-diffusion", 8, 16, 4, 10, verify_rule="rejection")


class Diary(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[ObservedRequest] = []
        self.records: list[tuple[int, Record]] = []
        self.endings: dict[int, Ending] = {}

    def begin(self, request: ObservedRequest) -> None:
        self.begun.append(request)

    def record(self, request: ObservedRequest, record: Record) -> None:
        self.records.append((request.number, record))

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        self.endings[request.number] = ending


def begun(told: Records, *numbers: int, temperature: float = 0.0) -> None:
    policy = resolve_policy("fixed:4")
    for number in numbers:
        told.begin(number, "fixed:4", policy, SPEC, 5, 20, SimpleNamespace(temperature=temperature, seed=7))


def step(accepted: dict[int, int], fallbacks: int = 0) -> Step:
    """A step of these rows, with three drafted tokens each."""
    stood = torch.tensor(list(accepted.values()))
    three = torch.full_like(stood, 3)
    tokens = torch.arange(4).expand(len(stood), 4)
    seconds = Seconds(policy=0.25, rest=0.5)
    return Step(three + 1, three, three, stood, tokens, three, seconds, fallbacks, row_ids=tuple(accepted))


def test_each_row_is_told_of_with_its_own_records_and_ending() -> None:
    diary = Diary()
    told = Records([diary])
    begun(told, 40, 41)
    told.record(Prefill(torch.tensor([[1], [2]]), Seconds(rest=1.0), row_ids=(40, 41)))
    begun(told, 42, temperature=0.5)
    told.record(step({41: 3, 40: 0}, fallbacks=2))
    told.end(40, complete=True)
    told.record(step({41: 1, 42: 2}))
    told.end(41, complete=False, fallbacks=1)
    told.end(99, complete=True)  # one that was turned away before it began
    told.close()
    first, second, third = diary.begun
    assert (first.policy, first.policy_repr, first.target) == ("fixed:4", "Fixed(block_size=4)", "target")
    assert (first.rule, first.clock, first.prompt_length, first.max_new_tokens) == ("rejection", "WallClock", 5, 20)
    assert [(r.temperature, r.seed) for r in diary.begun] == [(0.0, None), (0.0, None), (0.5, 7)]
    of = {request.number: [r for number, r in diary.records if number == request.number] for request in diary.begun}
    assert [len(of[request.number]) for request in diary.begun] == [2, 3, 1]
    assert [r.num_accepted.tolist() for r in of[second.number] if isinstance(r, Step)] == [[3], [1]]
    assert diary.endings[first.number] == Ending(True, 2, 1, Seconds(policy=0.25, rest=1.5), 2, 0)
    assert diary.endings[second.number] == Ending(False, 7, 2, Seconds(policy=0.5, rest=2.0), 3, 0)
    assert diary.endings[third.number].complete is False, "given up when the engine stopped"


def test_without_observers_nothing_is_kept() -> None:
    told = Records()
    begun(told, 1)
    told.record(step({1: 2}))
    told.end(1, complete=True)
    told.close()


def test_prometheus_where_nobody_would_see_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with pytest.raises(ObserverError, match=r"set PROMETHEUS_MULTIPROC_DIR to an empty folder .* prometheus:port=9464"):
        Records(["prometheus"])
    Records(["prometheus:port=0"]).close()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    Records([{"name": "prometheus"}]).close()


@dataclass
class Counted:
    steps: int
    rows: int
    seconds: float
    fallbacks: int


def test_the_log_says_what_decisions_took_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(records, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(records.log, "handlers", [caplog.handler])  # vLLM's loggers do not pass on what they are told
    monkeypatch.setattr(records.log, "propagate", False)
    told: Any = Records()
    with caplog.at_level(logging.INFO, logger="vllm.bpkit"):
        told.summary({"fixed:4": Counted(10, 40, 0.001, 1)})
        assert not caplog.messages
        now += 11
        told.summary({"fixed:4": Counted(100, 250, 0.01, 3), "goodput": Counted(0, 0, 0.0, 0)})
        now += 1
        told.summary({"fixed:4": Counted(150, 450, 0.02, 3)})
        told.summary({"fixed:4": Counted(200, 650, 0.03, 3)}, last=True)
    assert caplog.messages == [
        "bpkit policy fixed:4: 100 steps of 2.5 rows, 0.100 ms a decision, 3 faults mended (3 since the start)",
        "bpkit policy fixed:4: 100 steps of 4.0 rows, 0.200 ms a decision, 0 faults mended (3 since the start)",
    ]
