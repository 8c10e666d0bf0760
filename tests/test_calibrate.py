"""Calibration: known costs are found again from the live loop, noise is told, and the command keeps its word."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from bpkit.cli.main import build_app
from bpkit.decode.clock import price
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import Drafter
from bpkit.decode.result import RowFailure
from bpkit.draft.ngram import NgramDrafter
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.trace.cost import CostError, CostTable, read_cost
from bpkit.trace.cost.calibrate import CalibrationSettings, RecordingClock, calibrate, run_batch
from bpkit.trace.cost.estimate import estimate, merged_ranges, waiting_range
from bpkit.trace.cost.held_out import held_out_error
from bpkit.trace.cost.random_sizes import RandomSizes
from bpkit.trace.cost.statistics import slope_within, trimmed
from bpkit.trace.cost.timed import TimedPrompts, TimedSteps
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION, NGRAM, Context, DecoderSpec, Draft, Seconds, Work, work_of

LARGEST = 6
PROMPTS = [Prompt(f"p{i}", "any", "x = [" + ", ".join(map(str, range(i, 3 * i + 4))) + "]\ny = ") for i in range(8)]
OPTIONS = {"max_new_tokens": 160, "temperature": 0.0}

# Staircases that no smooth curve goes through, in seconds.
DRAFT = {2: 0.010, 3: 0.030, 4: 0.020, 5: 0.020, 6: 0.045}
FEATURES = {2: 0.001, 3: 0.001, 4: 0.004, 5: 0.002, 6: 0.003}
VERIFY = {1: 0.100, 2: 0.150, 3: 0.130, 4: 0.131, 5: 0.200, 6: 0.190}
CATCH_UP, REST, DECISION, PREFILL = 0.005, 0.007, 0.002, 0.25


class KnownClock:
    """Says of every step what the staircases say; verify grows with context, and the rest with the width."""

    def __init__(self, rest_per_width: float = 0.0) -> None:
        self.rest_per_width = rest_per_width

    def now(self) -> float:
        return 0.0

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        if work is None:
            return Seconds(verify=PREFILL)
        draft = DRAFT[work.draft_size] + CATCH_UP * (work.waiting > 1) if work.draft_size else 0.0
        features = FEATURES[work.draft_size] if work.features else 0.0
        rest = REST + self.rest_per_width * (work.verify_width - 1)
        return Seconds(draft=draft, verify=true_verify(work), policy=DECISION + features, rest=rest)


def true_verify(work: Work) -> float:
    return VERIFY[work.verify_width] * (1 + work.context_length / 1000)


def settings(**more: Any) -> CalibrationSettings:
    return CalibrationSettings(**{"max_block_size": LARGEST, "rounds": 2, "options": OPTIONS, **more})


def decoder_of(pair: TinyPair, drafter: Drafter, clock: Any = None, **more: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target, drafter, tokenizer=pair.tokenizer, clock=clock or KnownClock(), **more)


@pytest.fixture(scope="module")
def found(pair: TinyPair) -> CostTable:
    """What calibration finds where the true costs are known."""
    return calibrate(
        decoder_of(pair, pair.block_diffusion()), PROMPTS, settings(spread=1e-6, command="bpkit calibrate")
    )


# Known costs are found again


@pytest.mark.slow
def test_drafts_catching_up_features_and_the_rest_are_found_again(found: CostTable) -> None:
    assert found.draft == pytest.approx(DRAFT, rel=1e-5)
    assert found.features == pytest.approx(FEATURES, rel=1e-5)
    assert found.rest == pytest.approx(REST)
    assert list(found.catch_up.values()) == pytest.approx([CATCH_UP] * len(found.catch_up), rel=1e-4)
    assert min(found.catch_up) == 2
    assert found.seconds("catch_up", 1, 0) == 0.0
    assert found.seconds("catch_up", 2, 0) == pytest.approx(CATCH_UP, rel=1e-4)


@pytest.mark.slow
def test_prompts_are_priced_by_their_tokens(found: CostTable, pair: TinyPair) -> None:
    lengths = [len(pair.tokenizer(prompt.text)["input_ids"]) for prompt in PROMPTS]
    assert found.prices_prefill
    assert min(lengths) <= min(found.prefill) <= max(found.prefill) <= max(lengths)
    assert set(found.prefill.values()) == {PREFILL}
    cells = [cell for cell in found.spread if cell.phase == "prefill"]
    assert [cell.size for cell in cells] == sorted(found.prefill)
    assert sum(cell.count for cell in cells) == 2 * len(PROMPTS)


def test_passes_that_read_prompts_of_one_length_are_timed(pair: TinyPair) -> None:
    decoder = decoder_of(pair, NgramDrafter(block_size=2))
    short, alike = settings(options={"max_new_tokens": 3, "temperature": 0.0}), replace(PROMPTS[0], id="again")
    tokens = len(pair.tokenizer(alike.text)["input_ids"])

    def timed(*prompts: Prompt) -> list[TimedPrompts]:
        return TimedPrompts.of(run_batch(decoder, list(enumerate(prompts)), short))

    assert timed(alike) == [TimedPrompts(tokens, PREFILL)]
    assert timed(PROMPTS[0], alike) == [TimedPrompts(2 * tokens, PREFILL)]
    assert timed(PROMPTS[0], PROMPTS[1]) == []  # two passes: the last tokens have one of their own
    cut = run_batch(decoder, [(0, alike), (1, alike)], settings(), deadline=0.0)
    assert TimedPrompts.of(cut) == []


def test_prompts_are_priced_in_ranges_that_double() -> None:
    timed = [TimedPrompts(tokens, tokens / 1000) for tokens in range(64, 200)] + [TimedPrompts(10, 0.0)]
    figures = estimate(batch_steps(0, 300, (1,)), LARGEST, work_of(BLOCK_DIFFUSION), prompts=timed).prefill
    assert figures == pytest.approx({96: 0.0955, 164: 0.1635}, rel=1e-3)


@pytest.mark.slow
def test_target_passes_are_found_again_at_every_context_length(found: CostTable) -> None:
    for width in VERIFY:
        by_context = found.verify[width]
        assert isinstance(by_context, dict)
        assert len(by_context) >= 2
        for context in range(min(by_context), max(by_context), 10):
            true = true_verify(Work(0, 0, width, context))
            assert found.seconds("verify", width, context) == pytest.approx(true, rel=0.02)


@pytest.mark.slow
def test_the_table_says_how_it_was_measured(found: CostTable) -> None:
    measured = found.measured
    assert measured is not None
    assert measured.ended == "2 rounds were over"
    assert measured.rounds == 2
    assert 1e-6 < (measured.worst_spread or 0) < 0.01  # contexts of a range differ
    assert measured.modelled_over_measured == pytest.approx(1.0, abs=0.01)
    assert measured.drift == pytest.approx(0.0, abs=0.02)
    assert (measured.command, measured.options, measured.dtype) == ("bpkit calibrate", OPTIONS, "float32")
    assert measured.threads == torch.get_num_threads()
    assert {"cpu", "gpu", "torch", "transformers", "bpkit"} <= set(measured.machine)
    main = [cell for cell in found.spread if cell.phase in ("draft", "verify") and cell.context_length is None]
    assert Counter(cell.phase for cell in main) == {"draft": len(DRAFT), "verify": len(VERIFY)}
    assert sum(cell.count for cell in main if cell.phase == "verify") == measured.steps
    assert all(cell.quartiles is not None and cell.variation is not None for cell in main)


@pytest.mark.slow
def test_what_grows_with_the_width_is_not_lost_in_the_rest(pair: TinyPair) -> None:
    clock = KnownClock(rest_per_width=0.03)
    cost = calibrate(decoder_of(pair, pair.block_diffusion(), clock), PROMPTS[:5], settings(rounds=1))
    assert cost.rest == pytest.approx(REST)
    for width in (1, 3, 6):
        work = Work(draft_size=0, waiting=0, verify_width=width, context_length=cost.middle_context)
        assert price(cost, work).total == pytest.approx(clock.charge(Seconds(), work).total - DECISION, rel=0.05)


def test_a_larger_tree_is_drafted_at_the_price_of_the_block() -> None:
    timed = [
        (Work(min(size, 4), 1, width, 10), Seconds(draft=0.1 * min(size, 4), verify=1 + 0.1 * width, rest=0.1))
        for size in range(2, 9)
        for width in range(1, size + 1)
        for _ in range(40)
    ]
    timed += [(Work(0, 0, 1, 10), Seconds(verify=1.1, rest=0.1))] * 40
    figures = estimate(TimedSteps.of(timed), 8, work_of(BLOCK_DIFFUSION))
    assert [figures.seconds("draft", size, 10) for size in (2, 4, 6, 8)] == pytest.approx([0.2, 0.4, 0.4, 0.4])
    assert figures.seconds("verify", 8, 10) == pytest.approx(1.8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTOREGRESSIVE, NGRAM])
def test_other_drafters_are_priced_by_what_they_drafted(pair: TinyPair, kind: str) -> None:
    drafter: Drafter = pair.autoregressive() if kind == AUTOREGRESSIVE else NgramDrafter(block_size=LARGEST)
    cost = calibrate(decoder_of(pair, drafter), PROMPTS, settings(rounds=1))
    assert cost.draft == pytest.approx(DRAFT, rel=1e-5)
    assert set(cost.verify) == set(VERIFY)
    if kind == NGRAM:  # it reads nothing and has no distribution
        assert cost.catch_up == {}
        assert cost.features == {}
    else:
        assert cost.features == pytest.approx(FEATURES, rel=1e-5)
        assert list(cost.catch_up.values()) == pytest.approx([CATCH_UP] * len(cost.catch_up), rel=1e-4)


def test_rejection_sampling_is_measured_without_what_it_forbids(pair: TinyPair) -> None:
    decoder = decoder_of(pair, pair.block_diffusion(), rule="rejection")
    cost = calibrate(decoder, PROMPTS, settings(rounds=1, options={"max_new_tokens": 160, "temperature": 1.0}))
    assert cost.draft == pytest.approx(DRAFT, rel=1e-5)
    assert cost.features == pytest.approx(FEATURES, rel=1e-5)


def test_the_decoder_is_left_as_it_was(pair: TinyPair) -> None:
    decoder = decoder_of(pair, pair.block_diffusion(), policy="fixed:3")
    policy, clock = decoder.policy, decoder.clock
    calibrate(decoder, PROMPTS[:1], settings(rounds=1, max_block_size=2))
    assert decoder.policy is policy
    assert decoder.clock is clock
    assert not decoder.strict


# Noise


class NoisyClock(KnownClock):
    """Every step is off by up to 30%, and one in fifty took twenty times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        true = super().charge(measured, work)
        off = float(self.rng.uniform(0.7, 1.3)) * (20 if self.rng.uniform() < 0.02 else 1)
        return Seconds(off * true.draft, off * true.verify, off * true.policy, off * true.rest)


@pytest.mark.slow
def test_noise_and_outliers_are_averaged_away_and_told(pair: TinyPair) -> None:
    cost = calibrate(decoder_of(pair, pair.block_diffusion(), NoisyClock()), PROMPTS, settings(rounds=1, spread=1e-6))
    assert cost.measured is not None
    assert cost.measured.ended == "the round was over"
    assert cost.measured.modelled_over_measured < 0.85  # the outliers were a quarter of the time
    assert 0.005 < (cost.measured.worst_spread or 0) < 0.1
    for cell in cost.spread:
        if cell.phase == "draft" and cell.size in DRAFT:
            assert abs(cell.seconds - DRAFT[cell.size]) < 4 * (cell.standard_error or 0)
    spreads = [cell.spread for cell in cost.spread if cell.phase in ("draft", "verify") and cell.context_length is None]
    assert cost.measured.worst_spread == pytest.approx(max(spreads), abs=1e-5)


@pytest.mark.slow
def test_more_rounds_are_run_until_the_spread_is_small(pair: TinyPair) -> None:
    def rounds(spread: float) -> int:
        decoder = decoder_of(pair, pair.block_diffusion(), NoisyClock())
        measured = calibrate(decoder, PROMPTS[:2], settings(rounds=6, spread=spread, max_block_size=2)).measured
        assert measured is not None
        assert measured.worst_spread is not None
        assert (measured.worst_spread < spread) == (measured.ended.startswith("every"))
        return measured.rounds

    assert rounds(0.2) == 1
    assert 1 < rounds(0.012) < 6


def test_when_time_is_up_it_ends_after_the_request_in_hand(pair: TinyPair) -> None:
    seen: list[tuple[str, int, int]] = []
    decoder = decoder_of(pair, pair.block_diffusion())
    cost = calibrate(decoder, PROMPTS, settings(max_minutes=0.0, max_block_size=2), lambda *told: seen.append(told))
    assert cost.measured is not None
    assert cost.measured.ended == "0 minutes were over"
    assert seen == [("round 1, not all sizes seen yet", 0, len(PROMPTS))]


def test_too_few_steps_are_no_table(pair: TinyPair) -> None:
    short = settings(rounds=1, options={"max_new_tokens": 3, "temperature": 0.0})
    with pytest.raises(CostError, match="too few to tell the costs up to block size 6: give more prompts"):
        calibrate(decoder_of(pair, pair.block_diffusion()), PROMPTS[:1], short)


def test_a_block_size_that_the_drafter_cannot_draft_is_refused(pair: TinyPair) -> None:
    with pytest.raises(ValueError, match=r"max_block_size 99 is not within 2 \.\. 16"):
        calibrate(decoder_of(pair, pair.block_diffusion()), PROMPTS, settings(max_block_size=99))


# Statistics


def test_the_trimmed_mean_and_its_standard_error() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(10, 1, 1000), [1e6] * 20])
    mean, error = trimmed(values)
    assert mean == pytest.approx(10, abs=0.15)
    draws = [trimmed(np.random.default_rng(seed).normal(10, 1, 1000))[0] for seed in range(300)]
    assert error == pytest.approx(float(np.std(draws)), rel=0.2)
    assert trimmed(np.array([3.0])) == (3.0, None)


def test_ranges_with_few_numbers_are_merged_and_none_is_lost() -> None:
    numbers = np.array([2] * 10 + [3] + [4] * 10 + [5] * 2)
    groups = [sorted(set(numbers[mask].tolist())) for mask in merged_ranges(numbers, waiting_range, 5)]
    assert groups == [[2], [3, 4, 5]]
    masks = list(merged_ranges(numbers, waiting_range, 5))
    assert np.sum(masks, axis=0).tolist() == [1] * len(numbers)
    assert [len(list(merged_ranges(numbers[:0], waiting_range, 5)))] == [0]


def test_drafts_are_told_apart_from_catching_up_where_one_hides_the_other() -> None:
    """Large blocks nearly always with much waiting, small ones with little: plain means would confuse the two."""
    rng, timed = np.random.default_rng(0), []
    for _ in range(3000):
        size = int(rng.integers(2, 5))
        waiting = int(rng.choice([1, 2, 6], p=[0.1, 0.2, 0.7] if size == 4 else [0.7, 0.2, 0.1]))
        seconds = DRAFT[size] + {1: 0.0, 2: 0.003, 6: 0.02}[waiting]
        timed.append((Work(size, waiting, size, 50), Seconds(draft=seconds, verify=1.0, rest=0.1)))
    timed += [(Work(0, 0, 1, 50), Seconds(verify=1.0, rest=0.1))] * 30
    figures = estimate(TimedSteps.of(timed), 4, work_of(BLOCK_DIFFUSION))
    assert figures.draft == pytest.approx({size: DRAFT[size] for size in (2, 3, 4)}, rel=1e-3)
    assert figures.catch_up == pytest.approx({2: 0.003, 6: 0.02}, rel=1e-3)


# Several rows

PADDING_SAVES = {"draft": 0.0004, "verify": 0.003}


def batch_step(rng: np.random.Generator, rows: int, *, bend: float = 0.0, noise: float = 0.0) -> tuple[Work, Seconds]:
    """A step with rows of all sizes: stairs in width, a line in rows (but for a `bend`), padding cheaper."""
    size = 0 if rng.random() < 0.15 else int(rng.integers(2, LARGEST + 1))
    width = int(rng.integers(1, size + 1)) if size else 1
    narrow = rng.random(rows) < rng.random()
    narrow[rng.integers(rows)] = False
    sizes = np.where(narrow, rng.integers(1, size + 1, rows), size) if size else np.zeros(rows, int)
    widths = np.where(narrow, rng.integers(1, width + 1, rows), width)
    work = Work(
        draft_size=size,
        waiting=int(rng.integers(1, 13)) if size else 0,
        verify_width=width,
        context_length=int(rng.integers(100, 400)),
        rows=rows,
        drafted=int(sizes[sizes > 1].sum()),
        verified=int(widths.sum()),
    )
    return work, batch_seconds(work, bend, *np.exp(noise * rng.normal(size=3)).tolist())


def batch_seconds(work: Work, bend: float = 0.0, *off: float) -> Seconds:
    drafting, passing, other = off or (1.0, 1.0, 1.0)
    rows, many = work.rows, 1 + bend * (work.rows in (3, 5, 6, 7))
    draft = 0.0
    if work.draft_size:
        padding = rows * work.draft_size - work.drafted
        draft = (
            DRAFT[work.draft_size] * (1 + rows / 8) + CATCH_UP * (work.waiting > 8) - PADDING_SAVES["draft"] * padding
        )
    padding = rows * work.verify_width - work.verified
    verify = VERIFY[work.verify_width] * (1 + rows / 4) * (1 + work.context_length / 1000)
    return Seconds(
        draft=many * drafting * draft,
        verify=many * passing * (verify - PADDING_SAVES["verify"] * padding),
        policy=DECISION,
        rest=other * REST * (1 + rows / 10),
    )


def batch_steps(seed: int, count: int, rows: Sequence[int], **how: float) -> TimedSteps:
    rng = np.random.default_rng(seed)
    return TimedSteps.of([batch_step(rng, number, **how) for number in rows for _ in range(count)])


def test_steps_of_several_rows_are_found_again_and_lie_on_lines_in_between() -> None:
    cost = estimate(batch_steps(0, 1500, (1, 2, 4, 8), noise=0.02), LARGEST, work_of(BLOCK_DIFFUSION), (1, 2, 4, 8))
    assert set(cost.rows) == {2, 4, 8}
    for rows, figures in cost.rows.items():
        assert figures.draft == pytest.approx({size: own * (1 + rows / 8) for size, own in DRAFT.items()}, rel=0.02)
        assert figures.rest == pytest.approx(REST * (1 + rows / 10), rel=0.01)
    assert cost.rows[8].padding.model_dump() == pytest.approx(PADDING_SAVES, rel=0.15)
    rng = np.random.default_rng(1)
    for rows in range(1, 9):
        work, true = batch_step(rng, rows)
        assert price(cost, work).total == pytest.approx(true.total - DECISION, rel=0.06)


class BatchClock:
    """Says of every step of rows what the stairs and lines say."""

    def now(self) -> float:
        return 0.0

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        return Seconds() if work is None else batch_seconds(work)


def test_steps_of_several_rows_are_measured_in_the_loop(pair: TinyPair) -> None:
    """What the loop says of its steps is what they are priced by: rows, padded sizes, and positions without padding."""
    seen: list[tuple[str, int, int]] = []
    cost = calibrate(
        decoder_of(pair, NgramDrafter(block_size=LARGEST), BatchClock()),
        PROMPTS[:6],
        settings(batch_sizes=(4,), spread=1e-6, options={"max_new_tokens": 128, "temperature": 0.0}),
        lambda *told: seen.append(told),
    )
    assert set(cost.rows) == {4}
    figures = cost.rows[4]
    assert figures.draft == pytest.approx({size: own * (1 + 4 / 8) for size, own in DRAFT.items()}, rel=0.05)
    assert figures.rest == pytest.approx(REST * (1 + 4 / 10))
    assert figures.padding.model_dump() == pytest.approx(PADDING_SAVES, rel=0.2)
    assert cost.measured is not None
    assert cost.measured.prompts == 6
    found = cost.measured.held_out
    assert found is not None
    assert set(found.by_rows) >= {1, 4}
    assert found.mean_error < 0.04
    assert {total for _, _, total in seen} == {2 * 2}  # two batch sizes; it takes two runs of four to run six prompts
    assert [done for _, done, _ in seen] == 2 * list(range(4))


def test_a_run_of_several_rows_is_cut_short_when_time_is_up(pair: TinyPair) -> None:
    decoder = decoder_of(pair, NgramDrafter(block_size=2), BatchClock())
    decoder.clock = recorder = RecordingClock(BatchClock())
    batch = list(enumerate(PROMPTS[:3]))
    run_batch(decoder, batch, settings(), deadline=0.0)
    assert recorder.timed == []  # the record of the prompts came first
    run_batch(decoder, batch, settings(options={"max_new_tokens": 3, "temperature": 0.0}))
    assert [work.rows for work, _ in recorder.timed] == [3] * len(recorder.timed) != []


def test_what_fails_in_a_run_of_several_rows_ends_the_measuring(pair: TinyPair) -> None:
    decoder = decoder_of(pair, NgramDrafter(block_size=2), BatchClock())
    short = settings(options={"max_new_tokens": 3, "temperature": 0.0})
    with pytest.raises(RowFailure, match="prompt 1: "):
        run_batch(decoder, list(enumerate([PROMPTS[0], replace(PROMPTS[1], text="")])), short)


def test_one_row_is_not_touched_by_steps_of_others() -> None:
    several, one = batch_steps(0, 300, (1, 2, 3), noise=0.1), batch_steps(0, 300, (1,), noise=0.1)
    alone = estimate(one, LARGEST, work_of(BLOCK_DIFFUSION))
    assert estimate(several, LARGEST, work_of(BLOCK_DIFFUSION), (1, 2)).model_copy(update={"rows": {}}) == alone
    assert alone.rows == {}


def test_padding_that_saves_nothing_for_sure_saves_nothing() -> None:
    rng, timed = np.random.default_rng(0), []
    for _ in range(800):
        work, seconds = batch_step(rng, 4)
        timed.append((work, Seconds(verify=VERIFY[work.verify_width] * rng.normal(1, 0.1), draft=seconds.draft)))
    timed += [batch_step(rng, 1) for _ in range(300)]
    cost = estimate(TimedSteps.of(timed), LARGEST, work_of(BLOCK_DIFFUSION), (4,))
    assert cost.rows[4].padding.verify == 0.0
    assert cost.rows[4].padding.draft == pytest.approx(PADDING_SAVES["draft"], rel=0.1)


@pytest.mark.parametrize(("bend", "least", "most"), [(0.0, 0.0, 0.05), (0.25, 0.15, 0.3)])
def test_the_error_of_what_was_held_out_is_told(bend: float, least: float, most: float) -> None:
    """Numbers of rows that were not measured are on no line where the bend is: the error must say so."""
    cost = estimate(batch_steps(0, 800, (1, 2, 4, 8), noise=0.1), LARGEST, work_of(BLOCK_DIFFUSION), (1, 2, 4, 8))
    steps = batch_steps(1, 400, range(1, 9), noise=0.1, bend=bend)
    found = held_out_error(steps, steps.modelled(cost), (1, 2, 4, 8))
    assert found is not None
    assert set(found.by_rows) == set(range(1, 9))
    assert found.between_error is not None
    assert least <= found.between_error < most
    assert all(found.by_rows[rows] < 0.05 for rows in (1, 2, 4, 8))
    assert found.mean_error == pytest.approx(np.average(list(found.by_rows.values())), abs=0.02)
    assert (found.worst_error > 0.15, found.within_tenth < 0.7) == (bend > 0, bend > 0)
    assert 0.8 * 3200 < found.steps <= 3200
    assert 0.01 < found.noise < 0.04
    assert f"{int(found.worst_mix.split()[0])} rows, width" in found.worst_mix
    few = batch_steps(1, 2, range(1, 9))
    assert held_out_error(few, few.modelled(cost), (1, 2, 4, 8)) is None


def test_too_few_steps_of_several_rows_are_no_table() -> None:
    rng = np.random.default_rng(0)
    steps = TimedSteps.of([batch_step(rng, rows) for rows, count in ((1, 400), (4, 5)) for _ in range(count)])
    with pytest.raises(CostError, match="5 measured steps of 4 rows are too few to tell the costs up to block size 6"):
        estimate(steps, LARGEST, work_of(BLOCK_DIFFUSION), (1, 4))
    with pytest.raises(CostError, match="0 measured steps"):
        estimate(steps, LARGEST, work_of(BLOCK_DIFFUSION), (1, 2))


def test_slopes_among_like_steps_are_found_past_outliers() -> None:
    rng = np.random.default_rng(0)
    groups, x = rng.integers(0, 12, 3000), rng.normal(size=3000)
    y = 10.0 * groups - 0.5 * x + rng.normal(size=3000) * 0.2 + 50 * (rng.random(3000) < 0.05)
    slope, error = slope_within(groups, x, y)
    assert slope == pytest.approx(-0.5, abs=0.02)
    assert 0 < error < 0.02
    both, _ = slope_within(groups, x, y + 3 * x**2, x**2)
    assert both == pytest.approx(-0.5, abs=0.02)
    assert slope_within(groups, x, y, np.ones(3000)) == pytest.approx((slope, error), rel=1e-3)
    assert slope_within(groups, x, y, 2 * x) == (0.0, float("inf"))
    assert slope_within(groups, np.ones(3000), y) == (0.0, float("inf"))
    assert slope_within(np.arange(5), x[:5], y[:5]) == (0.0, float("inf"))


# The policy


def test_random_sizes_deal_every_size_and_width_and_runs_of_plain_steps() -> None:
    policy, numbers = RandomSizes(largest=5), torch.Generator().manual_seed(0)
    spec = DecoderSpec("target", "drafter", BLOCK_DIFFUSION, 5, 10, 8, 8)
    context = Context(spec, torch.tensor([3, 3]), torch.tensor([9, 9]), torch.tensor([7, 7]), numbers)
    state = policy.begin(context)
    pairs, runs, run = Counter[tuple[int, int]](), [], 0
    for _ in range(6000):
        size = policy.select(state, context)
        kept = policy.truncate(state, Draft(context, size, size - 1, torch.zeros(2, 4, dtype=torch.long)))
        assert size.shape == kept.shape == (2,)
        pairs[int(size[0]), int(kept[0]) + 1] += 1
        if int(size[0]) == 1:
            run += 1
        elif run:
            runs.append(run)
            run = 0
    assert set(pairs) == {(1, 1), *((size, width) for size in range(2, 6) for width in range(1, size + 1))}
    widths = Counter[int]()
    for (_, width), count in pairs.items():
        widths[width] += count
    assert min(widths.values()) > 300
    assert max(runs) > 16
    assert min(runs) == 1
    assert 0.1 < pairs[1, 1] / 6000 < 0.4


def test_random_sizes_of_several_rows_share_the_widest_and_differ_below() -> None:
    policy, numbers, rows = RandomSizes(largest=5), torch.Generator().manual_seed(0), 4
    spec = DecoderSpec("target", "drafter", BLOCK_DIFFUSION, 5, 10, 8, 8)
    counts = torch.full((rows,), 9)
    context = Context(spec, counts, counts, counts, numbers)
    state = policy.begin(context)
    widest, shares, plain = Counter[tuple[int, int]](), [], []
    for _ in range(4000):
        size = policy.select(state, context)
        kept = policy.truncate(state, Draft(context, size, size - 1, torch.zeros(rows, 4, dtype=torch.long)))
        assert size.shape == kept.shape == (rows,)
        assert ((kept >= 0) & (kept < size)).all()
        width = kept + 1
        widest[int(size.max()), int(width.max())] += 1
        shares.append(float(width.sum()) / (rows * int(width.max())))
        plain.append(int((size == 1).sum()))
    assert set(widest) == {(1, 1), *((size, width) for size in range(2, 6) for width in range(1, size + 1))}
    assert min(widest.values()) > 60
    assert 0.3 < np.mean(np.array(shares) == 1.0) < 0.7
    assert min(shares) < 0.45
    assert set(plain) == set(range(rows + 1))  # rows without a draft beside others with one


# The command


@pytest.fixture
def on_tiny(tiny_folder: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in PROMPTS[:4]))
    models = ["--target", str(tiny_folder / "target"), "--drafter", str(tiny_folder / "drafter")]
    return [*models, "--prompts", str(prompts), "--threads", "1", "--max-block-size", "3"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ["calibrate", *arguments], prog_name="bpkit")


def test_the_command_measures_writes_and_prints(on_tiny: list[str], tmp_path: Path) -> None:
    out, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    done = run(*on_tiny, "--out", str(out), "--plot", str(plot), "--rounds", "1", "--spread", "0.01")
    assert done.exit_code == 0, done.output
    for word in ("break-even", "T(1)/T(v)", "spread", "the round was over"):
        assert word in done.stdout
    cost = read_cost(out).table()
    assert set(cost.draft) == {2, 3}
    assert set(cost.verify) == {1, 2, 3}
    assert cost.measured is not None
    assert cost.measured.steps > 100
    assert plot.stat().st_size > 5000
    shown = run("--show", str(out))
    assert shown.exit_code == 0
    assert shown.stdout == done.stdout


def test_the_command_measures_several_rows(on_tiny: list[str], tmp_path: Path) -> None:
    out, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    how = ["--batch-sizes", "2,1", "--rounds", "2", "--spread", "0.01", "--max-new-tokens", "80"]
    done = run(*on_tiny, "--out", str(out), "--plot", str(plot), *how)
    assert done.exit_code == 0, done.output
    for words in ("steps of all rows together", "Held out:", "% in the mean mix", "2 rounds were over"):
        assert words in done.stdout
    cost = read_cost(out).table()
    assert set(cost.rows) == {2}
    assert set(cost.rows[2].draft) == {2, 3}
    assert set(cost.rows[2].verify) == {1, 2, 3}
    assert {cell.phase for cell in cost.rows[2].spread} >= {"draft", "verify", "rest"}
    assert cost.measured is not None
    assert cost.measured.held_out is not None
    assert set(cost.measured.held_out.by_rows) <= {1, 2}
    mix = Work(3, 2, 3, 60, rows=2, drafted=5, verified=4)
    assert 0 < price(cost, mix).total < 2 * price(cost, Work(3, 2, 3, 60)).total + 1
    assert run("--show", str(out)).stdout == done.stdout


@pytest.mark.parametrize("text", ["0,2", "1+2", "two", "", "1,,2"])
def test_batch_sizes_are_whole_numbers_with_commas(text: str) -> None:
    done = run("--out", "cost.json", "--batch-sizes", text)
    assert done.exit_code == 2
    assert "with commas between them, such as 1,2,4,8" in done.stderr


def test_presets_are_listed_and_shown() -> None:
    listed, shown = run("--list-presets"), run("--show", "dflash-h200-qwen3-4b")
    assert (listed.exit_code, shown.exit_code) == (0, 0)
    for text in (listed.stdout, shown.stdout):
        assert "2602.06036" in text
        assert "Assumed" in text
    assert "1.33" in shown.stdout


def test_without_anything_to_do_the_command_says_what_to_give() -> None:
    done = run()
    assert done.exit_code == 2
    assert "--out cost.json" in done.stderr
    assert run("--out", "/nowhere/cost.json").exit_code == 2


def test_an_interrupted_calibration_keeps_the_old_file(
    on_tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bpkit.trace.cost.calibrate.calibrate", interrupt)
    out = tmp_path / "cost.json"
    done = run(*on_tiny, "--out", str(out))
    assert done.exit_code == 130
    assert f"Nothing was written: {out} is not there." in done.stderr
    out.write_text("old")
    assert "is as it was" in run(*on_tiny, "--out", str(out)).stderr
    assert out.read_text() == "old"


@pytest.mark.slow
def test_on_the_shipped_pair(tmp_path: Path) -> None:
    """Orders of magnitude only: the machine may be busy."""
    out = tmp_path / "cost.json"
    done = run("--out", str(out), "--threads", "1", "--limit", "4", "--rounds", "1", "--max-new-tokens", "96")
    assert done.exit_code == 0, done.output
    cost = read_cost(out).table()
    assert set(cost.draft) == set(range(2, 17))
    assert set(cost.verify) == set(range(1, 17))
    assert cost.seconds("verify", 1, 100) < cost.seconds("verify", 16, 100)
    assert cost.draft[16] < cost.seconds("verify", 1, 100)  # the drafter is a third of the target
    assert 1 < cost.break_even(2) < cost.break_even(16) < 8
    assert cost.measured is not None
    assert 0.5 < cost.measured.modelled_over_measured < 1.1
