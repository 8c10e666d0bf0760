"""A policy serves one decoder, and what is written twice is one policy."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bpkit import Policy, SpeculativeDecoder
from bpkit.decode import owned
from bpkit.decode.clock import CostClock
from bpkit.decode.owned import policy_key
from bpkit.policy import PolicyError, State
from bpkit.testing import TinyPair
from bpkit.types import Context, CostModel, DecoderSpec, Step

OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "eos_token_id": None}


class Remembering(Policy):
    """Keeps what it was bound to and how much it saw, and drafts as much as its drafter was trained for."""

    wants = frozenset()

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.steps = 0

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.decoder, self.cost = decoder, cost

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.decoder.trained_block_size)

    def observe(self, state: State, step: Step) -> None:
        self.steps += 1


class Uncopyable(Remembering):
    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.lock = threading.Lock()


class Cost:
    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return 0.001 * size


@pytest.fixture
def costly(pair: TinyPair) -> SpeculativeDecoder:
    """Under an instance, with costs."""
    return SpeculativeDecoder(
        pair.target, pair.block_diffusion(), Remembering(), tokenizer=pair.tokenizer, clock=CostClock(Cost())
    )


def remembering(decoder: SpeculativeDecoder) -> Remembering:
    assert isinstance(decoder.policy, Remembering)
    return decoder.policy


def test_another_drafter_gets_a_policy_of_its_own(costly: SpeculativeDecoder) -> None:
    first = remembering(costly)
    costly.generate("x = ", **OPTIONS)
    seen = first.steps
    second = costly.with_policy(None, "ngram:block_size=4")
    assert second.policy is not first
    assert remembering(second).steps == seen, "a copy has the memory of the instance"
    second.generate("x = ", **OPTIONS)
    assert first.steps == seen
    assert first.decoder.trained_block_size == 8
    assert first.cost is not None
    assert remembering(second).decoder.trained_block_size == 4
    assert second.policy_name == costly.policy_name


def test_a_drafter_of_one_call_does_not_disturb_the_decoders_policy(costly: SpeculativeDecoder) -> None:
    before = vars(remembering(costly)).copy()
    costly.generate("x = ", drafter="ngram", **OPTIONS)
    assert vars(remembering(costly)) == before


def test_a_written_policy_is_made_again_for_another_drafter(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.2), "exp3", tokenizer=pair.tokenizer)
    decoder.generate("x = ", **OPTIONS)
    assert decoder.policy.state_dict()
    second = decoder.with_policy(None, "ngram")
    assert type(second.policy) is type(decoder.policy)
    assert second.policy is not decoder.policy
    assert second.policy.state_dict() != decoder.policy.state_dict(), "what it learned was of the other drafter"
    assert second.policy_name == "exp3"


def test_an_instance_in_two_hands_is_copied_for_the_second_decoder(pair: TinyPair) -> None:
    policy = Remembering()
    first = SpeculativeDecoder(pair.target, pair.block_diffusion(), policy, tokenizer=pair.tokenizer)
    assert first.policy is policy
    second = SpeculativeDecoder(pair.target, "ngram:block_size=4", policy, tokenizer=pair.tokenizer)
    assert second.policy is not policy
    first.generate("x = ", **OPTIONS)
    assert policy.decoder.drafter_kind == "block-diffusion"
    assert policy.steps > 0
    assert remembering(second).steps == 0


def test_an_instance_is_free_again_when_its_decoder_is_gone(pair: TinyPair) -> None:
    policy = Remembering()
    first = SpeculativeDecoder(pair.target, pair.block_diffusion(), policy)
    del first
    gc.collect()
    assert SpeculativeDecoder(pair.target, "ngram", policy).policy is policy


def test_an_instance_that_cannot_be_copied_is_refused_for_a_second_decoder(pair: TinyPair) -> None:
    policy = Uncopyable()
    first = SpeculativeDecoder(pair.target, "ngram", policy)
    with pytest.raises(PolicyError, match=r"Uncopyable serves another decoder and cannot be copied .*make another"):
        SpeculativeDecoder(pair.target, "ngram:block_size=4", policy)
    assert first.policy is policy
    assert policy.decoder.trained_block_size == 8


# One policy for each way to decide.


def test_a_policy_of_a_call_is_kept_with_its_memory(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.2), "fixed:2", tokenizer=pair.tokenizer)
    made = [decoder.generate("x = ", policy="exp3", **OPTIONS) for _ in range(3)]
    sizes = [[int(step.block_size) for step in generation.steps] for generation in made]
    assert len(set(map(tuple, sizes))) > 1, "exploration must not repeat"
    kept = decoder._for_call("exp3", None)
    assert kept is decoder._for_call({"name": "exp3"}, None)
    assert kept.requests == 3
    assert kept.policy.state_dict() != SpeculativeDecoder(pair.target, "ngram", "exp3").policy.state_dict()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("fixed:4", {"name": "fixed", "block_size": 4}),
        ("fixed:4", "fixed:block_size=4"),
        ("fixed:4", "fixed: 4"),
        ("threshold:0.6,block_size=8", {"block_size": 8, "threshold": 0.6, "name": "threshold"}),
        ("exp3", {"name": "exp3"}),
    ],
)
def test_two_ways_to_write_a_policy_are_one(one: Any, other: Any) -> None:
    assert policy_key(one) == policy_key(other)


def test_other_options_are_another_policy() -> None:
    keys = {policy_key(p) for p in ("fixed:4", "fixed:5", "threshold:0.6", "threshold:0.7", None)}
    assert len(keys) == 5
    one, two = Remembering(), Remembering()
    assert policy_key(one) != policy_key(two)
    with pytest.raises(PolicyError, match="there is no policy 'fixd'"):
        policy_key("fixd:4")


def test_the_decoders_own_policy_and_drafter_may_be_named_again(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, "ngram:max_ngram=2", "fixed:4", tokenizer=pair.tokenizer)
    for policy in (None, "fixed:4", {"name": "fixed", "block_size": 4}, decoder.policy):
        for drafter in (None, "ngram:max_ngram=2", {"name": "ngram", "max_ngram": 2}, decoder.drafter):
            assert decoder._for_call(policy, drafter) is decoder
    decoder.generate("x = ", policy="fixed:4", drafter="ngram:max_ngram=2", **OPTIONS)
    assert decoder.requests == 1


def test_one_drafter_is_made_for_all_policies_of_it(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:4")
    one, two = (decoder._for_call(policy, "ngram:block_size=5") for policy in ("exp3", "fixed:3"))
    assert one.drafter is two.drafter
    assert decoder._for_call("exp3", "ngram:block_size=5") is one
    assert decoder._for_call("exp3", None).drafter is decoder.drafter


def test_an_instance_of_a_call_keeps_what_it_learns(pair: TinyPair, costly: SpeculativeDecoder) -> None:
    policy = Remembering()
    for _ in range(2):
        costly.generate("x = ", policy=policy, **OPTIONS)
    assert costly._for_call(policy, None).policy is policy
    assert costly._for_call(policy, None).requests == 2
    assert policy.steps > 0
    # That of another decoder is copied once, and the copy is kept.
    taken = SpeculativeDecoder(pair.target, "ngram", "fixed:4", tokenizer=pair.tokenizer)
    seen = policy.steps
    for _ in range(2):
        taken.generate("x = ", policy=policy, **OPTIONS)
    assert policy.steps == seen
    assert remembering(taken._for_call(policy, None)).steps > seen
    assert taken._for_call(policy, None).requests == 2


def test_pairs_that_were_used_least_recently_are_forgotten(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, "ngram", "fixed:2")
    first = decoder._for_call("exp3", None)
    for size in range(3, 3 + owned.MOST - 1):
        decoder._for_call(f"fixed:{size}", None)
    assert decoder._for_call("exp3", None) is first, "this is a use"
    for size in range(3, 3 + owned.MOST - 1):
        decoder._for_call(f"fixed:{size},", None)
    assert decoder._for_call("exp3", None) is first
    for size in range(100, 100 + owned.MOST):
        decoder._for_call({"name": "fixed", "block_size": size}, None)
    assert decoder._for_call("exp3", None) is not first


def test_a_policy_in_a_file_is_kept_until_the_file_changes(pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = (
        "from bpkit import Policy\n\n\nclass Mine(Policy):\n    wants = frozenset()\n\n"
        "    def select(self, state, context):\n        return context.full(SIZE)\n"
    )
    file.write_text(text.replace("SIZE", "3"))
    decoder = SpeculativeDecoder(pair.target, "ngram", "fixed:2", tokenizer=pair.tokenizer)
    first = decoder._for_call(f"{file}:Mine", None)
    assert decoder._for_call(f"{file}:Mine", None) is first
    file.write_text(text.replace("SIZE", "10"))
    assert decoder._for_call(f"{file}:Mine", None) is not first
