"""Requests that are given up, put back and read in pieces, and engines with little room."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.vllm.conftest import PROMPTS, engine
from tests.vllm.engine import Engine
from tests.vllm.policies import Unruly

MANY, TOKENS = 12, 96
BLOCKS = 36
"""Of keys and values, in which some seven of the requests find room."""
POSITIONS = 192
"""Of a pass, which is fewer than the first prompts have."""


@pytest.fixture(scope="module")
def whole(plain: object) -> list[list[int]]:
    """Longer texts of plain decoding, at the concurrency of these tests."""
    with engine() as vllm:
        return vllm.run(PROMPTS[:MANY], concurrency=MANY, max_tokens=TOKENS).texts


@pytest.fixture(scope="module")
def cramped(whole: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose requests do not fit, in passes that their prompts do not fit into."""
    log = tmp_path_factory.mktemp("cramped") / "steps.jsonl"
    options = {"policy": "fixed:4", "observers": [f"jsonl:{log}"]}
    room = {"block_size": 32, "num_gpu_blocks_override": BLOCKS, "max_num_batched_tokens": POSITIONS}
    with engine("dflash", options, **room, max_num_seqs=MANY, enable_prefix_caching=True) as made:
        made.log = log
        yield made


def test_texts_where_requests_are_put_back_and_read_in_pieces(cramped: Engine, whole: list[list[int]]) -> None:
    policy, pieces = Unruly(), list[str]()

    def look(step: int) -> Sequence[int]:
        pieces.extend(request.request_id for request in cramped.scheduler.running if request.is_prefill_chunk)
        return ()

    cramped.scheduler.use(policy)
    found = cramped.run(PROMPTS[:MANY], concurrency=MANY, max_tokens=TOKENS, after_step=look)
    assert found.texts == whole
    assert cramped.counter("vllm:num_preemptions") > 0
    assert pieces, "a prompt that took several passes"
    assert policy.begun == policy.ended == MANY, "who is put back does not begin again"
    ends = [line for line in lines_of(cramped) if line["event"] == "end"]
    assert [line["complete"] for line in ends] == [True] * MANY
    again = cramped.run(PROMPTS[:3], concurrency=1, max_tokens=TOKENS)
    assert again.texts == whole[:3]
    again = cramped.run(PROMPTS[:3], concurrency=1, max_tokens=TOKENS)
    assert again.texts == whole[:3]
    assert cramped.counter("vllm:prefix_cache_hits") > 0, "prompts that were read before"
    nothing_left(cramped)


def test_requests_that_are_given_up_leave_nothing_behind(cramped: Engine, whole: list[list[int]]) -> None:
    cramped.scheduler.use(Unruly())
    begun, put_back = len(lines_of(cramped)), 0

    def give_up(step: int) -> Sequence[int]:
        """One of those that run, now and then, and whoever was put back."""
        nonlocal put_back
        waits = [
            int(request.request_id.split("-")[0]) for request in cramped.scheduler.waiting if request.num_preemptions
        ]
        put_back += len(waits)
        return [*waits, step // 10] if step % 10 == 0 and step < 50 else waits

    found = cramped.run(PROMPTS[:MANY], concurrency=MANY, max_tokens=TOKENS, after_step=give_up)
    assert put_back
    given_up = [text for text in found.texts if len(text) < TOKENS]
    assert put_back < len(given_up) < MANY
    assert all(text == all_of_it[: len(text)] for text, all_of_it in zip(found.texts, whole, strict=True))
    lines = lines_of(cramped)[begun:]
    started = {line["request"] for line in lines if line["event"] == "prefill"}
    ends = {line["request"]: line["complete"] for line in lines if line["event"] == "end"}
    assert ends.keys() == started
    assert sum(ends.values()) == MANY - len(given_up)
    nothing_left(cramped)


def lines_of(served: Engine) -> list[dict[str, Any]]:
    return [json.loads(line) for line in served.log.read_text().splitlines()]


def nothing_left(served: Engine) -> None:
    assert not served.scheduler.policies.rows_of
    assert not served.scheduler.policies.records._rows
    for rows in served.scheduler.policies._known.values():
        assert (len(rows), len(rows.parked), len(rows.waiting)) == (0, 0, 0)
