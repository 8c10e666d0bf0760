"""`priority` and `source_bandit`, which choose among sources of drafts: decisions by hand, and both in a decoder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from bpkit_bandit.source_bandit import SourceBandit
from bpkit_fixed.priority import Priority

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.sources import Sources
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import Policy, PolicyError
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.types import NGRAM, Context, DecoderSpec, Feature, SourceSpec, Step, work_of
from tests import records
from tests.records import bound

STORE = SourceSpec("store", NGRAM, 6, 12, work_of(NGRAM))
OTHER_STORE = SourceSpec("other store", NGRAM, 5, 12, work_of(NGRAM))
TEXTS = ("a, b, a, b, a, ", "Once", '{"a": 1, "a": 1,')


def spec_of(*others: SourceSpec) -> DecoderSpec:
    """The model is source 0, with a trained block size of 8 and a limit of 16."""
    return replace(records.decoder(), others=others)


def context(offer: list[list[int]], match: list[list[int]] | None = None, seed: int = 0) -> Context:
    made = records.context(len(offer), seed)
    features = {Feature.SOURCE_OFFER: offer, Feature.SOURCE_MATCH: match or offer}
    made.features = {name: torch.tensor(value) for name, value in features.items()}
    return made


def plan(policy: Policy, now: Context) -> list[tuple[int, int]]:
    """(source, block size) of each row."""
    made: Any = policy.select({}, now)
    return list(zip(made.source.tolist(), made.block_size.tolist(), strict=True))


def test_options_load_without_torch() -> None:
    code = "import bpkit_fixed.priority, bpkit_bandit.source_bandit, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [Priority, SourceBandit])
def test_every_value_of_the_grid_is_valid(kind: type[Policy]) -> None:
    assert math.prod(len(values) for values in kind.Config.grid.values()) <= 48
    for name, values in kind.Config.grid.items():
        for value in values:
            bound(kind(**{name: value}), spec_of(STORE))


@pytest.mark.parametrize("spec", ["priority", "priority:order=0+1,min_match=2", "source_bandit:min_pulls=1"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_plain_decoding(pair: TinyPair, spec: str, temperature: float) -> None:
    sources = Sources([NgramDrafter(block_size=5), pair.agreeable()])
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    made = {
        name: SpeculativeDecoder(pair.target, sources, resolve_policy(name), tokenizer=pair.tokenizer, strict=True)
        for name in ("fixed:1", spec)
    }
    plain = made["fixed:1"].generate(list(TEXTS), batch_size=1, **options)
    for rows in (3, 1):
        ours = made[spec].generate(list(TEXTS), batch_size=rows, **options)
        assert [one.tokens.tolist() for one in ours] == [one.tokens.tolist() for one in plain]
    drafted = {int(step.source) for one in ours for step in one.steps if int(step.draft_length)}
    assert drafted == {0, 1}


# priority -------------------------------------------------------------------------------------------------------


def test_the_first_that_has_something_drafts_at_its_own_size() -> None:
    policy = bound(Priority(order="2+1+0", block_sizes="4+7+3"), spec_of(STORE, OTHER_STORE))
    now = context([[15, 5, 5], [15, 5, 0], [15, 0, 0]], [[0, 1, 1], [0, 1, 0], [0, 0, 0]])
    assert plan(policy, now) == [(2, 4), (1, 7), (0, 3)]
    only_stores = bound(Priority(order=(1, 2), block_sizes=(4, 5)), spec_of(STORE, OTHER_STORE))
    assert plan(only_stores, now) == [(1, 4), (1, 4), (0, 1)], "no draft where none has anything"


def test_free_sources_come_first_by_default_and_draft_as_trained() -> None:
    now = context([[15, 5, 5], [15, 0, 5], [15, 0, 0]], [[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    policy = bound(Priority(), spec_of(STORE, OTHER_STORE))
    assert plan(policy, now) == [(1, 6), (2, 5), (0, 8)]
    sized = bound(Priority(store_block_size=12, model_block_size=2), spec_of(STORE, OTHER_STORE))
    assert plan(sized, now) == [(1, 12), (2, 12), (0, 2)]
    assert plan(bound(Priority(order=0), spec_of(STORE)), context([[15, 5]])) == [(0, 8)], (
        "a model always has something"
    )


def test_short_matches_do_not_count_and_offers_without_a_match_do() -> None:
    now = context([[15, 5]] * 4, [[0, 1], [0, 2], [0, 3], [0, 0]])
    policy = bound(Priority(min_match=3), spec_of(STORE))
    assert [source for source, _ in plan(policy, now)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"order": "1+2"}, r"`order` is 1\+2, and this decoder has 2 source"),
        ({"order": (1, 1)}, "each once"),
        ({"order": ()}, "is empty"),
        ({"block_sizes": "4"}, r"`block_sizes` is 4, and the order is 1\+0: give one size for each"),
        ({"block_sizes": "4+17"}, r"block size 17 of source 0 \(drafter\) is above 16"),
        ({"store_block_size": 13}, r"block size 13 of source 1 \(store\) is above 12"),
    ],
)
def test_priority_refuses_what_does_not_fit_the_decoder(options: dict[str, Any], error: str) -> None:
    with pytest.raises(PolicyError, match=error):
        bound(Priority(**options), spec_of(STORE))


@pytest.mark.parametrize("options", [{"order": "1+x"}, {"order": -1}, {"block_sizes": "0+4"}, {"min_match": 0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(options))):
        Priority(**options)


# source_bandit --------------------------------------------------------------------------------------------------


def step(source: list[int], size: list[int], tokens: list[int], seconds: float) -> Step:
    made = records.step([b - 1 for b in size], [t - 1 for t in tokens], seconds)
    return replace(made, source=torch.tensor(source))


def taught(policy: SourceBandit, times: int = 200) -> SourceBandit:
    """After steps in which the store is the fastest, the model with 4 the second, and a model with 8 the slowest."""
    bound(policy, spec_of(STORE))
    for _ in range(times):
        for source, size, tokens, seconds in ((1, 4, 4, 0.1), (0, 4, 3, 0.2), (0, 8, 3, 0.5), (0, 1, 1, 0.1)):
            policy.observe({}, step([source], [size], [tokens], seconds))
    return policy


def test_arms_are_tokens_over_seconds_of_each_source_and_size() -> None:
    policy = bound(SourceBandit(block_sizes="4+8"), spec_of(STORE))
    policy.observe({}, step([0, 1, 0, 1], [4, 4, 1, 16], [2, 4, 1, 5], 0.4))
    arms = policy.memory.arms
    assert {name: (arm.pulls, arm.tokens) for name, arm in arms.items()} == {
        "0:4": (1, 2),
        "1:4": (1, 4),
        "no draft": (1, 1),
    }
    assert all(arm.seconds == pytest.approx(0.1) for arm in arms.values())
    before = policy.state_dict()
    policy.observe({}, step([0], [4], [2], math.nan))
    assert policy.state_dict() == before


def test_the_fastest_arm_on_offer_is_picked() -> None:
    policy = taught(SourceBandit(block_sizes="4+8", min_pulls=1), 300)
    policy.memory.arms["1:8"] = policy.memory.arms["0:8"]
    for seed in range(20):
        both = context([[15, 5], [15, 0]], seed=seed)
        assert plan(policy, both) == [(1, 4), (0, 4)]
    only_store = bound(SourceBandit(block_sizes="4"), replace(spec_of(), work=work_of(NGRAM)))
    assert {plan(only_store, context([[0]], seed=seed))[0] for seed in range(20)} == {(0, 1)}, "nothing is on offer"


def test_untried_arms_come_first_and_none_that_cannot_be_drafted() -> None:
    policy = bound(SourceBandit(block_sizes="4+16"), spec_of(STORE))
    picked = Counter(plan(policy, context([[15, 5]], seed=seed))[0] for seed in range(200))
    assert set(picked) == {(0, 1), (0, 4), (0, 16), (1, 4)}
    taught(policy, 1)
    policy.observe({}, step([1], [4], [4], 0.1))
    assert plan(policy, context([[15, 5]]))[0] != (1, 4), "others have had fewer steps"


def test_a_source_bandit_finds_the_arm_that_pays() -> None:
    policy = bound(SourceBandit(block_sizes="4+8", discount=0.99), spec_of(STORE))
    picked: Counter[tuple[int, int]] = Counter()
    for turn in range(500):
        offer = 5 if turn % 2 else 0
        ((source, size),) = plan(policy, context([[15, offer]], seed=turn))
        tokens = 1 if size == 1 else (4, 3)[source] if size == 4 else 3
        policy.observe({}, step([source], [size], [tokens], 0.1 + (0.2 if source == 0 and size > 1 else 0)))
        if turn > 300:
            picked[source, size] += 1
    assert picked[0, 4] > 60
    assert picked[1, 4] + picked[1, 8] > 85


def test_source_bandit_memory_survives_json_and_strangers_are_refused() -> None:
    policy = taught(SourceBandit(block_sizes="4+8"), 3)
    stored = json.loads(json.dumps(policy.state_dict()))
    assert bound(SourceBandit(), spec_of(STORE)).state_dict() == {}
    for first in ("load", "bind"):
        fresh = SourceBandit(block_sizes="4+8")
        if first == "load":
            fresh.load_state_dict(stored)
            bound(fresh, spec_of(STORE))
        else:
            bound(fresh, spec_of(STORE)).load_state_dict(stored)
        assert fresh.memory == policy.memory
    with pytest.raises(PolicyError, match=r"option 'block_sizes'"):
        bound(SourceBandit(block_sizes="4"), spec_of(STORE)).load_state_dict(stored)
    with pytest.raises(PolicyError, match=r"learned with target and sources target \+ drafter \+ store"):
        bound(SourceBandit(block_sizes="4+8"), spec_of(OTHER_STORE)).load_state_dict(stored)
    with pytest.raises(PolicyError, match="memory"):
        SourceBandit().load_state_dict({"something": 1})
