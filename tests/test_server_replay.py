"""A server that is replayed decides as live decoding of many rows does, step for step, and its time adds up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from bpkit.decode.clock import CostClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.prompts import Prompt, choose_prompts
from bpkit.registry.discovery import registry
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompts
from bpkit.trace.collect import TraceOptions, Tracer, generation_options
from bpkit.trace.cost import CostError, CostTable
from bpkit.trace.cost.table import Padding, RowsTable
from bpkit.trace.load import ChangingLoad, ClosedLoop, Load, PoissonLoad
from bpkit.trace.records import PromptTrace
from bpkit.trace.server import Served, ServerReplayer
from bpkit.types import DecoderSpec, Feature, Record, Step
from tests.test_replay import OF_THE_CONTEXT, OF_THE_SHIPPED_PAIR, drafters, fitting, made

if TYPE_CHECKING:
    from tests.conftest import ShippedPair


def rows_table(rows: int) -> RowsTable:
    """A table for so many rows, with padding that saves something."""
    return RowsTable(
        draft={size: 0.001 + 0.0001 * size * rows**0.5 for size in range(2, 33)},
        catch_up={2: 1e-4, 8: 3e-4 * rows, 64: 1e-3 * rows},
        features=dict.fromkeys(range(2, 33), 0.0001 * rows),
        verify={
            width: {16: 0.005 + 0.0003 * width * rows, 256: 0.006 + 0.0004 * width * rows} for width in range(1, 34)
        },
        rest=2e-4,
        padding=Padding(draft=5e-5, verify=2e-4),
    )


COST = CostTable(
    **rows_table(1).model_dump(exclude={"padding", "spread"}),
    prefill={1: 0.004, 64: 0.01},
    rows={rows: rows_table(rows) for rows in (2, 4, 8)},
)
TEXTS = (
    "f(x) = 2 * x",
    "abc abc abc abc ",
    "Q: 1+1?\nA:",
    "0, 1, 2, 3, 4",
    "x",
    "y = x + 1; z = ",
    "aaaa",
    "Hello, ",
    "1,2\n3,4\n",
    "def f(",
)
COUNTS = ("block_size", "draft_length", "verify_length", "num_accepted", "position", "source")


def check(decoder: SpeculativeDecoder, policy: Any, traces: list[PromptTrace], options: TraceOptions, rows: int) -> int:
    """Decode all prompts side by side under both; returns the number of steps."""
    live = SpeculativeDecoder(
        decoder.target,
        decoder.drafter,
        made(policy),
        clock=CostClock(COST),
        cost=COST,
        strict=True,
        max_block_size=max(options.block_sizes),
    )
    prompts = [torch.tensor(trace.prompt_tokens).long()[None] for trace in traces]
    expected: list[tuple[list[int], Step]] = []
    with live.run_many(prompts, batch_size=rows, **generation_options(options)) as run:
        for record in run:
            if isinstance(record, Step):
                expected.append(([place for place, _ in run.rows_of(record)], record))
    records: list[Record] = []
    replayer = ServerReplayer(live.spec, made(policy), COST, seed=options.seed, strict=True)
    served = replayer.serve(traces, range(len(traces)), ClosedLoop(rows), lambda record, clock: records.append(record))
    found = [record for record in records if isinstance(record, Step)]
    assert len(found) == len(expected)
    for one, (places, other) in zip(found, expected, strict=True):
        assert list(one.row_ids) == places
        assert one.stopped == other.stopped
        assert one.seconds == pytest.approx(other.seconds)
        for name in COUNTS:
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
        for row in range(len(one.row_ids)):
            assert one.row(row).tokens.tolist() == other.row(row).tokens.tolist()
    assert served.tokens.sum() == sum(trace.decided_by_steps for trace in traces)
    return len(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "temperature"), [("block-diffusion", 1.0), ("autoregressive", 0.0), ("n-gram", 0.0), ("agreeable", 1.0)]
)
def test_a_server_is_live_decoding_of_many_rows_on_a_tiny_pair(pair: TinyPair, kind: str, temperature: float) -> None:
    decoder = SpeculativeDecoder(pair.target, drafters(pair)[kind], "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions(
        tuple(range(2, 7 if kind == "agreeable" else 11)),  # traced draft by draft, each size by itself
        12,
        {"temperature": temperature},
        None if temperature == 0 else 5,
        OF_THE_CONTEXT | ({Feature.DRAFT_HIDDEN} & decoder.drafter.provides),
    )
    tracer = Tracer(decoder, options)
    traces = [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(TEXTS)]
    policies = fitting(decoder, [*registry().policies, "fixed:1", "fixed:6"])
    assert len(policies) >= 5
    for policy in policies:
        assert check(decoder, policy, traces, options, rows=8) > 0


@pytest.mark.slow
def test_a_server_is_live_decoding_of_eight_rows_on_the_shipped_pair(shipped: ShippedPair) -> None:
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:6", tokenizer=shipped.tokenizer)
    options = TraceOptions(tuple(range(2, 17)), 16, {"temperature": 0.0}, None, OF_THE_CONTEXT | {Feature.DRAFT_HIDDEN})
    tracer = Tracer(decoder, options)
    traces = [tracer.trace(i, prompt) for i, prompt in enumerate(choose_prompts(None, [], 3))]
    policies = fitting(decoder, OF_THE_SHIPPED_PAIR)
    assert policies == OF_THE_SHIPPED_PAIR
    for policy in policies:
        assert check(decoder, policy, traces, options, rows=8) > 0


SPEC = DecoderSpec("target", "drafter", "block-diffusion", 8, 8, hidden_size=8, vocab_size=100)


def served(policy: Any, load: Load, count: int, **options: Any) -> Served:
    prompts = synthetic_prompts(5)
    return ServerReplayer(SPEC, policy, COST, strict=True, **options).serve(
        prompts, [number % 5 for number in range(count)], load
    )


def test_time_is_that_of_steps_and_prompts() -> None:
    run = served("fixed:4", ClosedLoop(1), 10)
    prompts = synthetic_prompts(5)
    reading = 2 * sum(COST.seconds("prefill", prompt.prompt_length, 0) for prompt in prompts)
    assert run.time[-1] == pytest.approx(run.seconds.sum() + reading)
    assert run.ended[-1] == run.time[-1]
    assert run.rows.tolist() == [1] * len(run.rows)
    assert run.full == len(run.time)
    assert (run.ended >= run.first).all()
    assert 0.9 * len(run.time) < run.tested[0] <= (run.drafted > 0).sum(), "at the end nothing may be verified"
    assert run.accepted.sum() + len(run.time) == run.tokens.sum()


def test_a_closed_loop_keeps_its_rows_until_nobody_waits() -> None:
    run = served("fixed:2", ClosedLoop(4), 12)
    assert set(run.rows[: run.full].tolist()) == {4}
    assert run.rows[run.full :].max() < 4
    assert run.arrived[:4].tolist() == [0.0] * 4
    assert run.arrived[4] > 0


def test_clients_of_a_closed_loop_may_begin_one_after_the_other() -> None:
    run = served("fixed:2", ClosedLoop(4, spread=0.4), 20)
    assert run.rows[0] == 1
    assert run.rows[: run.filled].max() < 4
    assert run.time[run.filled] > 0.4
    assert set(run.rows[run.filled : run.full].tolist()) == {4}


def test_rows_follow_a_load_that_changes() -> None:
    load = ChangingLoad((1, 4, 1), requests_per_row=3)
    run = served("fixed:2", load, load.requests)
    assert load.requests == 18
    assert run.rows[0] == 1
    assert run.rows.max() == 4
    assert run.rows[-1] == 1


def test_requests_wait_for_their_arrival_and_for_room() -> None:
    quiet = served("fixed:4", PoissonLoad(0.5, 8, max_rows=4, seed=1), 8)
    assert quiet.arrived.tolist() == pytest.approx(PoissonLoad(0.5, 8, max_rows=4, seed=1).times)
    assert (quiet.first - quiet.arrived).max() < 1
    assert quiet.time[-1] > quiet.arrived[-1]
    busy = served("fixed:4", PoissonLoad(1000.0, 8, max_rows=2, seed=1), 8)
    assert busy.rows.max() == 2
    assert (busy.first - busy.arrived).max() > (quiet.first - quiet.arrived).max()


def test_prompts_are_read_in_what_running_rows_leave_of_a_step() -> None:
    whole = served("fixed:4", ClosedLoop(4), 12)
    parts = served("fixed:4", ClosedLoop(4), 12, max_tokens=10)
    assert parts.tokens.sum() == whole.tokens.sum()
    assert len(parts.time) > len(whole.time), "some wait while others' steps use what there is"
    plenty = served("fixed:4", ClosedLoop(4), 12, max_tokens=1000)
    assert plenty.rows.tolist() == whole.rows.tolist(), "all prompts that fit are read in one turn"


def test_prompts_in_passes_of_running_rows_take_what_their_tokens_add() -> None:
    own = served("fixed:4", ClosedLoop(4), 12)
    mixed = served("fixed:4", ClosedLoop(4), 12, mixes_passes=True)
    assert mixed.seconds.tolist() == own.seconds.tolist()
    assert 0 < mixed.time[-1] - mixed.seconds.sum() < own.time[-1] - own.seconds.sum()


def test_decisions_take_time_where_they_are_charged() -> None:
    run = served("goodput:1-4+6+8", ClosedLoop(4), 8, charges_decisions=True)
    assert (run.decisions > 0).all()
    free = served("goodput:1-4+6+8", ClosedLoop(4), 8)
    assert not free.decisions.any()
    assert free.seconds.tolist() == run.seconds.tolist()


def test_what_cannot_be_priced_ends_a_simulation() -> None:
    with pytest.raises(CostError, match="16"):
        served("fixed:4", ClosedLoop(16), 20)
    with pytest.raises(ValueError, match="without requests"):
        ServerReplayer(SPEC, "fixed:4", COST).serve(synthetic_prompts(2), [], ClosedLoop(2))
