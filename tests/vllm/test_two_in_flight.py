"""Our schedulers without a model: vLLM's objects, a worker that accepts at random, one or two steps in flight."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from bpkit_vllm import AsyncPolicyScheduler, PolicyScheduler
from bpkit_vllm.options import REQUEST_KEY
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from bpkit.policy import Policy, State
from bpkit.types import Context, Draft, Step
from tests.vllm.conftest import engine
from tests.vllm.engine import Engine
from tests.vllm.policies import Nonsense, Raises, Unruly

TOKENS, ROWS = 40, 6


class Diary(Policy):
    """Writes down the order in which it is called."""

    wants = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def begin(self, context: Context) -> State:
        self.said.append("begin")
        return {}

    def select(self, state: State, context: Context) -> Tensor:
        self.said.append("select")
        return context.full(4)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        self.said.append("truncate")
        return draft.draft_length

    def observe(self, state: State, step: Step) -> None:
        self.said.append("observe")


@pytest.fixture(scope="module")
def made(plain: object) -> Iterator[Engine]:
    """An engine whose configuration the schedulers have."""
    with engine("dflash", {"policy": "fixed:4"}, block_size=32) as vllm:
        yield vllm


def scheduler(made: Engine, *, in_flight: int, blocks: int | None = None) -> Any:
    """A scheduler of its own, with so many blocks of keys and values."""
    config = copy.copy(made.llm.llm_engine.vllm_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.async_scheduling = in_flight == 2
    kind = AsyncPolicyScheduler if in_flight == 2 else PolicyScheduler
    ours, manager = made.scheduler, StructuredOutputManager(config)
    room = copy.copy(ours.kv_cache_config)
    room.num_blocks = blocks or room.num_blocks
    return kind(
        config,
        room,
        structured_output_manager=manager,
        block_size=ours.block_size,
        hash_block_size=ours.block_size,
    )


class Worker:
    """Stands for the models: the text of a request is known, and of a draft as much stands as chance will have."""

    def __init__(self, scheduler: Any, in_flight: int) -> None:
        self.scheduler, self.in_flight = scheduler, in_flight
        self.random = random.Random(0)
        self.written: dict[str, int] = {}
        self.drafted: dict[str, int] = {}
        self.verified: list[int] = []
        self.accepted = 0

    def token(self, request_id: str, position: int) -> int:
        return hash((request_id, position)) % 4000 + 10

    def run(self, output: Any) -> ModelRunnerOutput:
        ids, sampled = list(output.num_scheduled_tokens), []
        for name in ids:
            draft = output.scheduled_spec_decode_tokens.get(name, [])
            assert len(draft) <= self.drafted.get(name, 0), "more is verified than was drafted"
            at = self.written.get(name, 0)
            stood = self.random.randint(0, len(draft))
            sampled.append([self.token(name, at + k) for k in range(stood + 1)])
            self.written[name], self.accepted = at + stood + 1, self.accepted + stood
            self.verified.append(len(draft))
            self.drafted[name] = output.num_spec_tokens_to_schedule
        places = {name: place for place, name in enumerate(ids)}
        return ModelRunnerOutput(req_ids=ids, req_id_to_index=places, sampled_token_ids=sampled)

    def serve(self, requests: list[Request], abort: dict[str, int]) -> dict[str, list[int]]:
        """Texts of requests, of which so many run at a time. `abort` gives some up after so many tokens."""
        texts: dict[str, list[int]] = {request.request_id: [] for request in requests}
        waiting, flying, step = deque(requests), deque[Any](), 0
        while waiting or self.scheduler.requests or flying:
            while waiting and len(self.scheduler.requests) < ROWS:
                self.scheduler.add_request(waiting.popleft())
            gone = [name for name, at in abort.items() if len(texts[name]) >= at and name in self.scheduler.requests]
            self.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
            output = self.scheduler.schedule()
            step += 1
            assert step < 2000
            if output.total_num_scheduled_tokens:
                flying.append((output, self.run(output)))
                if len(flying) < self.in_flight:
                    continue
            output, result = flying.popleft()
            for outputs in self.scheduler.update_from_output(output, result).values():
                for one in outputs.outputs:
                    texts[one.request_id] += one.new_token_ids
            if self.in_flight == 1:
                drafts = [[7] * output.num_spec_tokens_to_schedule for _ in result.req_ids]
                self.scheduler.update_draft_token_ids(DraftTokenIds(result.req_ids, drafts))
        return texts


def requests(
    made: Engine, count: int, policies: tuple[str | None, ...] = (None,), tokens: int = TOKENS
) -> list[Request]:
    """Requests with prompts of different lengths, that name policies in turn."""
    found, hasher = [], made.core.request_block_hasher
    for i in range(count):
        named = policies[i % len(policies)]
        extra = None if named is None else {REQUEST_KEY: named}
        sampling = SamplingParams(max_tokens=tokens - i % 5, temperature=0, ignore_eos=True, extra_args=extra)
        found.append(Request(f"r{i}", list(range(10, 20 + i)), sampling, None, block_hasher=hasher))
    return found


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("policy", ["fixed:6", Unruly, Raises, Nonsense])
@pytest.mark.filterwarnings("ignore::bpkit.decode.guard.PolicyFaultWarning")
def test_every_request_has_its_text(made: Engine, in_flight: int, policy: Any) -> None:
    ours = scheduler(made, in_flight=in_flight)
    decided: Any = policy if isinstance(policy, str) else policy()
    ours.use(decided)
    worker, given = Worker(ours, in_flight), requests(made, 20, (None, None, "goodput"))
    abort = {"r3": 0, "r4": 1, "r9": 12}
    found = worker.serve(given, abort)
    for request in given:
        name, length = request.request_id, request.max_tokens
        wanted = [worker.token(name, at) for at in range(length)]
        if name in abort:
            assert found[name] == wanted[: len(found[name])]
            assert len(found[name]) < length
        else:
            assert found[name] == wanted
    assert worker.accepted
    if policy is Unruly:
        assert set(worker.verified) >= {0, 1, 2, 3, 4}, "ragged lengths"
        assert (decided.begun, decided.ended) == (13, 11), "of 14; one was given up before it began, two after"
    nothing_left(ours)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_requests_that_are_put_back_while_steps_are_in_flight(made: Engine, in_flight: int) -> None:
    ours, policy = scheduler(made, in_flight=in_flight, blocks=24), Unruly()
    put_back = watched(ours, "_preempt_request")
    ours.use(policy)
    worker, given = Worker(ours, in_flight), requests(made, 12, tokens=100)
    found = worker.serve(given, {})
    assert put_back
    for request in given:
        name = request.request_id
        assert found[name] == [worker.token(name, at) for at in range(request.max_tokens)]
    assert policy.begun == policy.ended == 12
    nothing_left(ours)


def watched(ours: Any, name: str) -> list[Any]:
    """The calls of a method, as they come."""
    calls, method = list[Any](), getattr(ours, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return method(*arguments, **options)

    setattr(ours, name, call)
    return calls


def nothing_left(ours: Any) -> None:
    for rows in ours.policies._known.values():
        assert (len(rows), len(rows.parked), len(rows.waiting)) == (0, 0, 0)
    assert not ours.policies.rows_of
    assert not ours._planned


@pytest.mark.parametrize(("in_flight", "lag"), [(1, 1), (2, 2)])
def test_a_length_is_chosen_so_many_steps_before_what_it_follows_from_is_known(
    made: Engine, in_flight: int, lag: int
) -> None:
    ours, diary = scheduler(made, in_flight=in_flight), Diary()
    ours.use(diary)
    Worker(ours, in_flight).serve(requests(made, 1), {})
    said = [word for word in diary.said if word != "truncate"]
    assert said[0] == "begin"
    before = said.index("observe")
    assert said[1:before] == ["select"] * (lag + 1)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_request_of_one_token_ends_with_its_step(made: Engine, in_flight: int) -> None:
    ours, policy = scheduler(made, in_flight=in_flight), Unruly()
    ours.use(policy)
    found = Worker(ours, in_flight).serve(requests(made, 3, tokens=5)[:1] + requests(made, 5, tokens=5)[4:], {})
    assert [len(text) for text in found.values()] == [5, 1]
    ours.use("fixed:4")
    alone = requests(made, 5, tokens=5)[4:]
    assert len(Worker(ours, in_flight).serve(alone, {})["r4"]) == 1
    nothing_left(ours)
