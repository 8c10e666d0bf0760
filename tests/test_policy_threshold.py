"""`threshold`, `svip` and `schedule`, on drafts and steps built by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from bpkit_threshold.schedule import Schedule
from bpkit_threshold.thresholds import Svip, Threshold

from bpkit.policy import Policy, PolicyError, State
from bpkit.registry.discovery import build
from bpkit.types import DecoderSpec, Draft, Feature
from tests.records import bound, context, decoder, draft, step

NAN = math.nan


def probabilities(rows: list[list[float]], lengths: list[int] | None = None) -> Draft:
    return draft(lengths, draft_probability=rows)


def entropies(rows: list[list[float]], lengths: list[int] | None = None) -> Draft:
    return draft(lengths, draft_entropy=rows)


def test_hook_modules_and_options_load_without_torch() -> None:
    code = (
        "import bpkit_threshold, bpkit_threshold.thresholds, bpkit_threshold.schedule, sys;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_names_load_their_classes_and_options() -> None:
    policies = build([EntryPoint("threshold", "bpkit_threshold", "bpkit")]).policies
    here = {"threshold": Threshold, "svip": Svip, "schedule": Schedule}
    assert {name: policies[name].load() for name in here} == here
    first_options = {name: next(iter(policies[name].load_config().model_fields)) for name in here}  # type: ignore[union-attr]
    assert first_options == {"threshold": "threshold", "svip": "h", "schedule": "start"}


@pytest.mark.parametrize("kind", [Threshold, Svip])
def test_stop_rules_draft_the_trained_block_size_or_the_given_one(kind: type[Policy]) -> None:
    assert bound(kind()).select({}, context(3)).tolist() == [8, 8, 8]
    chosen = bound(kind(block_size=5)).select({}, context(2))
    assert chosen.tolist() == [5, 5]
    assert chosen.dtype == torch.int64


@pytest.mark.parametrize(
    ("kind", "option"),
    [(Threshold, {"threshold": 1.1}), (Threshold, {"threshold": -0.1}), (Svip, {"h": -1}), (Schedule, {"start": 0})],
)
def test_impossible_options_are_refused(kind: type[Policy], option: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(option))):
        kind(**option)


# threshold ------------------------------------------------------------------------------------------------------


def test_threshold_keeps_each_row_while_its_product_is_high_enough() -> None:
    policy = Threshold(threshold=0.5)
    # Products: .9 .81 .73 .66 | .8 .48 .. (a later 1 does not help) | .4
    rows = [[0.9, 0.9, 0.9, 0.9], [0.8, 0.6, 1.0, 1.0], [0.4, 1.0, 1.0, 1.0]]
    assert policy.truncate({}, probabilities(rows)).tolist() == [4, 1, 0]


def test_threshold_is_a_product_and_not_a_bound_on_each_probability() -> None:
    assert Threshold(threshold=0.4).truncate({}, probabilities([[0.6, 0.6, 0.6]])).tolist() == [1]


def test_threshold_that_is_met_exactly_keeps_the_token() -> None:
    assert Threshold(threshold=0.25).truncate({}, probabilities([[0.5, 0.5, 0.5]])).tolist() == [2]


def test_threshold_at_its_ends() -> None:
    rows = probabilities([[1.0, 1.0, 0.99], [0.0, 0.0, 0.0]])
    assert Threshold(threshold=0).truncate({}, rows).tolist() == [3, 3]
    assert Threshold(threshold=1).truncate({}, rows).tolist() == [2, 0]


@pytest.mark.parametrize("padding", [1.0, 0.0, NAN])
def test_padding_of_shorter_rows_does_not_matter(padding: float) -> None:
    rows = [[0.9, 0.9, 0.9], [0.9, padding, padding], [padding, padding, padding]]
    kept = Threshold(threshold=0.5).truncate({}, probabilities(rows, lengths=[3, 1, 0]))
    assert kept.tolist() == [3, 1, 0]


def test_not_a_number_is_doubt() -> None:
    assert Threshold(threshold=0.0).truncate({}, probabilities([[0.9, NAN, 0.9]])).tolist() == [1]
    assert Svip(h=9.0).truncate({}, entropies([[0.1, 0.1, NAN]])).tolist() == [2]


def test_rows_do_not_influence_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(6, 5, generator=generator).sqrt().tolist()
    policy = Threshold(threshold=0.3)
    together = policy.truncate({}, probabilities(rows)).tolist()
    alone = [int(policy.truncate({}, probabilities([row]))) for row in rows]
    assert together == alone
    assert len(set(alone)) > 1, "rows that all end alike would prove nothing"


@pytest.mark.parametrize("policy", [Threshold(), Svip()])
def test_no_draft_is_cut_to_nothing_and_not_extended(policy: Policy) -> None:
    feature = next(iter(policy.wants))
    rows: dict[str, list[list[float]]] = {feature: [[], []]}
    nothing = draft([0, 0], **rows)
    assert policy.truncate({}, nothing).tolist() == [0, 0]
    assert policy.extend({}, nothing).tolist() == [False, False]


def test_threshold_extends_until_the_product_falls_below() -> None:
    policy = Threshold(threshold=0.5)
    rows = [[0.9, 0.9, 0.9], [0.8, 0.7, 0.8], [0.4, 1.0, 1.0]]  # products at the end: .73, .45, .4
    went_on = [policy.extend({}, probabilities([row[:n] for row in rows])).tolist() for n in (1, 2, 3)]
    assert went_on == [[True, True, False], [True, True, False], [True, False, False]]
    assert policy.extend({}, probabilities(rows)).dtype == torch.bool


# svip -----------------------------------------------------------------------------------------------------------


def test_svip_stops_at_the_first_position_with_high_entropy() -> None:
    # h = 0.5: entropy up to 0.25
    rows = [[0.1, 0.24, 0.2], [0.1, 0.26, 0.0], [0.3, 0.0, 0.0]]
    assert Svip(h=0.5).truncate({}, entropies(rows)).tolist() == [3, 1, 0]
    assert Svip(h=0.5).extend({}, entropies(rows)).tolist() == [True, False, False]


def test_svip_compares_the_root_of_the_entropy() -> None:
    assert Svip(h=0.6).truncate({}, entropies([[0.5]])).tolist() == [0], "sqrt(0.5) = 0.71"
    assert Svip(h=2.0).truncate({}, entropies([[3.0]])).tolist() == [1], "sqrt(3) = 1.73"


def test_svip_trusts_an_entropy_that_rounding_made_negative() -> None:
    assert Svip(h=0.0).truncate({}, entropies([[-1e-8, 0.0, 1e-3]])).tolist() == [2]


def test_svip_keeps_to_the_length_of_each_row() -> None:
    kept = Svip(h=0.6).truncate({}, entropies([[0.1, 0.1, 0.1], [0.1, 0.0, 0.0]], lengths=[3, 1]))
    assert kept.tolist() == [3, 1]


def test_svip_may_run_under_the_rejection_rule() -> None:
    assert Svip.wants == {Feature.DRAFT_ENTROPY}


# schedule -------------------------------------------------------------------------------------------------------


def begun(policy: Schedule, batch: int, spec: DecoderSpec | None = None) -> State:
    bound(policy, spec)
    return policy.begin(context(batch))


def test_schedule_starts_with_the_trained_block_size_or_the_given_draft_length() -> None:
    for policy, block_size in ((Schedule(), 8), (Schedule(start=3), 4), (Schedule(start=99), 16)):
        state = begun(policy, 2)
        assert policy.select(state, context(2)).tolist() == [block_size, block_size]


def test_schedule_moves_each_row_by_its_own_outcome() -> None:
    policy = Schedule(start=5)
    state = begun(policy, 3)
    policy.observe(state, step([5, 5, 5], [5, 4, 0]))
    chosen = policy.select(state, context(3))
    assert chosen.tolist() == [8, 5, 5], "in drafted tokens: 7, 4, 4"
    assert chosen.dtype == torch.int64


def test_schedule_keeps_between_one_token_and_the_largest_block() -> None:
    policy = Schedule(start=2)
    state = begun(policy, 2, decoder(largest=6))
    for _ in range(9):
        policy.observe(state, step([1, 1], [1, 0]))
    assert policy.select(state, context(2)).tolist() == [6, 2]


def test_schedule_counts_a_draft_that_was_cut_short_as_whole() -> None:
    policy = Schedule(start=5)
    state = begun(policy, 2)
    policy.observe(state, step([2, 2], [2, 1], drafted=[5, 5]))
    assert policy.select(state, context(2)).tolist() == [8, 5]


def test_schedule_learns_nothing_from_a_step_without_a_draft() -> None:
    policy = Schedule(start=5)
    state = begun(policy, 2)
    policy.observe(state, step([0, 5], [0, 5]))
    assert policy.select(state, context(2)).tolist() == [6, 8]


def test_schedule_keeps_nothing_of_a_request() -> None:
    policy = Schedule(start=5)
    first = begun(policy, 1)
    policy.observe(first, step([5], [5]))
    second = policy.begin(context(1))
    assert policy.select(second, context(1)).tolist() == [6]
    assert policy.select(first, context(1)).tolist() == [8]


def test_schedule_without_room_for_a_draft_decodes_plainly() -> None:
    policy = Schedule()
    state = begun(policy, 1, decoder(trained=1, largest=1))
    policy.observe(state, step([0], [0]))
    assert policy.select(state, context(1)).tolist() == [1]
