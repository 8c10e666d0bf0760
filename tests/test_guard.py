"""A policy can only cost speed: whatever it does wrong, the text stays, one warning names it, the result counts it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from bpkit import Context, Draft, Feature, Policy, PolicyError, SpeculativeDecoder, Step
from bpkit.decode.guard import PolicyFault, PolicyFaultWarning
from bpkit.decode.result import Generation
from bpkit.policy import State
from bpkit.testing import TinyPair

if TYPE_CHECKING:
    from tests.conftest import PlainDecoding

PROMPT = "def f(a, b):"
COUNT = 24
SEED = 4


def raises(like: Tensor) -> Any:
    raise ZeroDivisionError("no such luck")


# What a method of a policy may do wrong; each is given what a right answer would look like, int64 [batch].
NO_NUMBER: dict[str, Callable[[Tensor], Any]] = {
    "raises": raises,
    "NaN": lambda like: like.double() * math.nan,
    "infinite": lambda like: like.double() + math.inf,
    "a fraction": lambda like: like + 0.5,
    "bool": lambda like: like > 0,
    "complex": lambda like: like + 0j,
    "no batch axis": lambda like: like[0],
    "an axis too many": lambda like: like[:, None],
    "a row too many": lambda like: torch.cat([like, like]),
    "no rows": lambda like: like[:0],
    "a Python int": lambda like: 4,
    "a list": lambda like: [4],
    "None": lambda like: None,
}
NO_SIZE: dict[str, Callable[[Tensor], Any]] = {
    "0": lambda like: like * 0,
    "-3": lambda like: like * 0 - 3,
    "10**9": lambda like: like * 0 + 10**9,
    "2**62": lambda like: like * 0 + 2**62,
    "1e30": lambda like: like.double() * 0 + 1e30,
}
NO_LENGTH = {name: fault for name, fault in NO_SIZE.items() if name != "0"}
RIGHT_BUT_ODD: dict[str, Callable[[Tensor], Any]] = {
    "whole floats": lambda like: like.double(),
    "int32": lambda like: like.int(),
    "uint8": lambda like: like.to(torch.uint8),
}


class Wrong(Policy):
    """Does one thing wrong in one method, every time or from a given call on."""

    wants = frozenset()

    def __init__(self, method: str, fault: Callable[[Tensor], Any], *, after: int = 0) -> None:
        super().__init__()
        self.method, self.fault, self.after, self.calls = method, fault, after, 0

    def answer(self, method: str, right: Any, like: Tensor) -> Any:
        if method != self.method:
            return right
        self.calls += 1
        return self.fault(like) if self.calls > self.after else right

    def begin(self, context: Context) -> State:
        state: State = self.answer("begin", {"seen": context.full(0)}, context.full(5))
        return state

    def select(self, state: State, context: Context) -> Tensor:
        size: Tensor = self.answer("select", context.full(5), context.full(5))
        return size


class WrongTruncate(Wrong):
    def truncate(self, state: State, draft: Draft) -> Tensor:
        length: Tensor = self.answer("truncate", draft.draft_length, draft.draft_length)
        return length


class WrongExtend(Wrong):
    def extend(self, state: State, draft: Draft) -> Tensor:
        on: Tensor = self.answer("extend", draft.draft_length > 0, draft.draft_length)
        return on


class WrongObserve(Wrong):
    def observe(self, state: State, step: Step) -> None:
        self.answer("observe", None, step.num_accepted)


def decode(pair: TinyPair, policy: Policy, *, strict: bool = False, temperature: float = 1.0) -> Generation:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.2), policy, strict=strict)
    return decoder.generate(
        pair.ids(PROMPT), max_new_tokens=COUNT, temperature=temperature, top_k=0, seed=SEED, eos_token_id=None
    )


@pytest.fixture(scope="module")
def wanted(pair: TinyPair, plain: PlainDecoding) -> list[int]:
    return plain(pair.target, pair.ids(PROMPT), max_new_tokens=COUNT, seed=SEED).tokens


def check_is_mended(
    pair: TinyPair, wanted: list[int], make: Callable[[], Wrong], method: str, *, faults: int | None = None
) -> Generation:
    """The text is as it should be, one warning says who and where, every fault is counted; strict decoding raises."""
    policy = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = decode(pair, policy)
    assert made.tokens[0].tolist() == wanted
    said = [str(w.message) for w in caught if issubclass(w.category, PolicyFaultWarning)]
    assert len(said) == 1, said
    assert f"policy {type(policy).__name__}.{method}: " in said[0]
    assert made.fallbacks == (policy.calls if faults is None else faults) > 0
    with pytest.raises(PolicyFault, match=f"policy {type(policy).__name__}.{method}: "):
        decode(pair, make(), strict=True)
    return made


@pytest.mark.parametrize("fault", {**NO_NUMBER, **NO_SIZE}.items(), ids=lambda f: f[0])
def test_a_wrong_select_is_mended(pair: TinyPair, wanted: list[int], fault: Any) -> None:
    made = check_is_mended(pair, wanted, lambda: Wrong("select", fault[1]), "select")
    sizes = {int(step.block_size) for step in made.steps}
    # Too large a size is clamped to the largest; anything else becomes the trained size.
    assert sizes == ({16} if fault[0] in ("10**9", "2**62", "1e30") else {8})


@pytest.mark.parametrize("fault", {**NO_NUMBER, **NO_LENGTH}.items(), ids=lambda f: f[0])
def test_a_wrong_truncate_is_mended(pair: TinyPair, wanted: list[int], fault: Any) -> None:
    made = check_is_mended(pair, wanted, lambda: WrongTruncate("truncate", fault[1]), "truncate")
    for step in made.steps[:-1]:
        assert int(step.verify_length) == min(int(step.draft_length), COUNT - step.position - 1)


@pytest.mark.parametrize("name", ["raises", "no batch axis", "a row too many", "a Python int", "None"])
def test_a_wrong_extend_is_mended(pair: TinyPair, wanted: list[int], name: str) -> None:
    made = check_is_mended(pair, wanted, lambda: WrongExtend("extend", NO_NUMBER[name]), "extend")
    assert {int(step.draft_length) for step in made.steps} == {4}, "drafting goes on"


@pytest.mark.parametrize("name", ["NaN", "whole floats", "int32"])
def test_an_extend_that_is_no_bool_leaves_the_text_alone(pair: TinyPair, wanted: list[int], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyFaultWarning)
        made = decode(pair, WrongExtend("extend", {**NO_NUMBER, **RIGHT_BUT_ODD}[name]))
    assert made.tokens[0].tolist() == wanted


@pytest.mark.parametrize("name", ["raises", "a Python int", "a list", "None"])
def test_a_wrong_begin_is_mended(pair: TinyPair, wanted: list[int], name: str) -> None:
    check_is_mended(pair, wanted, lambda: Wrong("begin", NO_NUMBER[name]), "begin", faults=1)


def test_an_observe_that_raises_is_mended_and_counted_at_every_step(pair: TinyPair, wanted: list[int]) -> None:
    policy = WrongObserve("observe", raises)
    with pytest.warns(
        PolicyFaultWarning,
        match=r"WrongObserve.observe: ZeroDivisionError: no such luck \(test_guard.py, line \d+\); using no feed",
    ):
        made = decode(pair, policy)
    assert made.tokens[0].tolist() == wanted
    assert policy.calls == len(made.steps)
    assert made.fallbacks == len(made.steps)
    with pytest.raises(PolicyFault, match=r"WrongObserve\.observe"):
        decode(pair, WrongObserve("observe", raises), strict=True)


def test_an_end_that_raises_is_mended_and_counted(pair: TinyPair, wanted: list[int]) -> None:
    class BadEnd(Policy):
        wants = frozenset()

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(5)

        def end(self, state: State) -> None:
            raise OSError("disk full")

    with pytest.warns(PolicyFaultWarning, match=r"policy BadEnd\.end: OSError: disk full"):
        made = decode(pair, BadEnd())
    assert made.tokens[0].tolist() == wanted
    assert made.fallbacks == 1
    with pytest.raises(PolicyFault, match=r"BadEnd\.end"):
        decode(pair, BadEnd(), strict=True)


def test_a_begin_that_raises_is_counted_also_when_no_step_follows(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), Wrong("begin", raises))
    with pytest.warns(PolicyFaultWarning):
        made = decoder.generate(pair.ids(PROMPT), max_new_tokens=1, temperature=0)
    assert made.steps == []
    assert made.fallbacks == 1


@pytest.mark.parametrize("name", RIGHT_BUT_ODD)
@pytest.mark.parametrize("policy", [Wrong, WrongTruncate])
def test_whole_numbers_of_another_dtype_are_taken(
    pair: TinyPair, wanted: list[int], policy: type[Wrong], name: str
) -> None:
    method = "select" if policy is Wrong else "truncate"
    made = decode(pair, policy(method, RIGHT_BUT_ODD[name]), strict=True)
    assert made.tokens[0].tolist() == wanted
    assert made.fallbacks == 0
    assert {int(step.block_size) for step in made.steps} == {5}


def test_a_fault_that_comes_late_is_counted_from_then_on(pair: TinyPair, wanted: list[int]) -> None:
    policy = Wrong("select", raises, after=2)
    with pytest.warns(PolicyFaultWarning):
        made = decode(pair, policy)
    assert made.tokens[0].tolist() == wanted
    assert [step.fallbacks for step in made.steps] == [0, 0, *[1] * (len(made.steps) - 2)]
    assert made.fallbacks == len(made.steps) - 2 > 0


def test_faults_in_several_methods_are_each_warned_of_once_and_all_counted(pair: TinyPair, wanted: list[int]) -> None:
    class AllWrong(Policy):
        wants = frozenset()

        def begin(self, context: Context) -> State:
            raise KeyError("begin")

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(99)

        def extend(self, state: State, draft: Draft) -> Tensor:
            raise AttributeError("extend")

        def truncate(self, state: State, draft: Draft) -> Tensor:
            return draft.full(-1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = decode(pair, AllWrong())
    assert made.tokens[0].tolist() == wanted
    said = sorted(str(w.message).partition(":")[0] for w in caught if issubclass(w.category, PolicyFaultWarning))
    assert said == [f"policy AllWrong.{method}" for method in ("begin", "extend", "select", "truncate")]
    # Of 16 positions in a block 15 are drafted, and the drafter asks after all of them but the last.
    assert made.fallbacks == 1 + len(made.steps) * (1 + 14 + 1)


def test_a_feature_that_was_not_asked_for_is_a_fault_that_says_what_to_add(pair: TinyPair, wanted: list[int]) -> None:
    class Forgets(Policy):
        wants = frozenset()

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(4) + int(context[Feature.LAST_HIDDEN].sum() > 0)

    with pytest.warns(PolicyFaultWarning, match="'last_hidden' is not here: add it to the policy's `wants`"):
        made = decode(pair, Forgets())
    assert made.tokens[0].tolist() == wanted


class Meddler(Policy):
    """Writes into what it was handed, as an absent-minded `clamp_` does."""

    wants = frozenset({Feature.DRAFT_TOKENS})

    def __init__(self, meddle_select: Callable[[Context], Any], meddle_truncate: Callable[[Draft], Any]) -> None:
        super().__init__()
        self.meddle_select, self.meddle_truncate = meddle_select, meddle_truncate

    def select(self, state: State, context: Context) -> Tensor:
        size = context.full(5)
        self.meddle_select(context)
        return size

    def truncate(self, state: State, draft: Draft) -> Tensor:
        self.meddle_truncate(draft)
        return draft.draft_length


MEDDLING: dict[str, tuple[Callable[[Context], Any], Callable[[Draft], Any]]] = {
    "remaining to 0": (lambda c: c.remaining.zero_(), lambda d: None),
    "remaining to 10**6": (lambda c: c.remaining.fill_(10**6), lambda d: None),
    "position": (lambda c: c.position.add_(3), lambda d: None),
    "context_length": (lambda c: c.context_length.zero_(), lambda d: None),
    "draft_length to 100": (lambda c: None, lambda d: d.draft_length.fill_(100)),
    "draft_length to -1": (lambda c: None, lambda d: d.draft_length.fill_(-1)),
    "draft_length clamped to 2": (lambda c: None, lambda d: d.draft_length.clamp_(max=2)),
    "draft block_size": (lambda c: None, lambda d: d.block_size.fill_(1)),
    "draft tokens": (lambda c: None, lambda d: d[Feature.DRAFT_TOKENS].zero_()),
}


@pytest.mark.parametrize("name", MEDDLING)
def test_a_policy_that_writes_into_what_it_was_handed_leaves_the_text_alone(
    pair: TinyPair, wanted: list[int], name: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyFaultWarning)
        made = decode(pair, Meddler(*MEDDLING[name]))
    assert made.tokens[0].tolist() == wanted


def test_an_observe_that_writes_into_the_step_leaves_the_text_alone(pair: TinyPair, wanted: list[int]) -> None:
    class Eraser(Policy):
        wants = frozenset()

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(5)

        def observe(self, state: State, step: Step) -> None:
            step.tokens.zero_()
            step.num_accepted.clamp_(max=0)

    made = decode(pair, Eraser())
    assert made.tokens[0].tolist() == wanted


def test_a_policy_without_wants_is_refused_with_the_line_to_add() -> None:
    class Speechless(Policy):
        def select(self, state: State, context: Context) -> Tensor:
            return context.full(4)

    with pytest.raises(PolicyError, match=r"Speechless does not say.*`wants = frozenset\(\)`"):
        Speechless()


def test_policies_have_random_numbers_of_their_own_that_repeat_and_never_touch_the_text(
    pair: TinyPair, wanted: list[int]
) -> None:
    class Dice(Policy):
        wants = frozenset()

        def select(self, state: State, context: Context) -> Tensor:
            return torch.randint(1, 9, (context.batch_size,), generator=context.generator)

    first, second = decode(pair, Dice(), strict=True), decode(pair, Dice(), strict=True)
    sizes = [int(step.block_size) for step in first.steps]
    assert sizes == [int(step.block_size) for step in second.steps]
    assert len(set(sizes)) > 2
    assert first.tokens[0].tolist() == wanted
